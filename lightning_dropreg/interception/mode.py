"""Finds dropout sites and losses in code that knows nothing of this package.

A `torch.overrides.TorchFunctionMode` sees every call of a function of ``torch`` while it is active, from whatever
module or line. `Interception` replaces what the dropouts do by a rule of the caller's choice and notes what the
losses were given; everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dropreg.checks import check_drop_prob
from lightning_dropreg.errors import DropregError, InvalidArgumentError, LossNotRecognizedError, UnsupportedSiteError
from lightning_dropreg.interception import checkpointing
from lightning_dropreg.interception.handlers import HANDLERS
from lightning_dropreg.interception.handlers.attention import attention_is_ignored
from lightning_dropreg.interception.naming import name_caller
from lightning_dropreg.interception.sites import RepeatableRule, Rule, Site
from lightning_dropreg.losses import RECOGNIZED, REFUSED, Loss
from lightning_dropreg.losses.custom import describe, is_registered
from lightning_dropreg.losses.logits import FOLLOWED, LogitsTrail
from lightning_dropreg.numerics.context import holding, patched
from lightning_dropreg.numerics.dtypes import is_in_bfloat16

__all__ = ["Interception", "constants_marked", "marks_constants"]


_marking: ContextVar[bool] = ContextVar("marking", default=False)


def constants_marked() -> AbstractContextManager[None]:
    """Give sites on inputs that need no gradient a node in the autograd graph, so that every way from them is seen."""
    return holding(_marking, True)


def marks_constants() -> bool:
    """Whether `constants_marked` is in force."""
    return _marking.get()


class Interception(TorchFunctionMode):
    """Applies a rule at the dropout sites and records the losses of the code that runs inside it.

    Args:
        rule: What to do at each site.
        record_losses: Whether to take recognized losses apart; without, they are left alone.
        replacements: Functions to run in place of others.
        name_sites: Whether to look up which module each site belongs to (slow, for people to read).
        written_out: Whether the pass will be differentiated twice or forward, so that fused kernels without formulas
            for that are to be avoided.
        problems: Collects the errors of sites and losses that are not understood, which then do what they always do;
            without it the first one is raised.
        lenient: Whether losses that are not understood do what they always do, without a word.

    Attributes:
        sites: The sites in the order in which they were reached.
        site_nodes: The node of the autograd graph at which each site's result was made; None for a constant.
        losses: The losses in the order in which they were computed.
        inactive: How many dropouts were reached whose drop probability is 0 at the moment (a schedule may raise it).
        resting: What is there of dropouts that were told not to drop, because they are in evaluation mode.
        refused: What was found wrong with losses that have no known curvature.
        in_bfloat16: Whether a site was reached in bfloat16.
        reads_gradients: Whether the running code looked at the ``.grad`` of a tensor.
        ignores_attention: Whether dropout on attention probabilities is left out.
        checkpoints: How many checkpointed regions the running code is in.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        record_losses: bool = False,
        name_sites: bool = False,
        replacements: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
        written_out: bool = False,
        problems: list[DropregError] | None = None,
        lenient: bool = False,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.lenient = lenient
        self.record_losses = record_losses
        self.name_sites = name_sites
        self.replacements = replacements or {}
        self.written_out = written_out
        self.problems = problems
        self.ignores_attention = attention_is_ignored()
        self.checkpoints = 0
        self._first = 0
        self._kind: str | None = None
        self.sites: list[Site] = []
        self.site_nodes: list[Any] = []
        self.losses: list[Loss] = []
        self._logits = LogitsTrail()
        self.inactive = 0
        self.resting: dict[str, None] = {}
        self.in_bfloat16 = False
        self.reads_gradients = False
        self.refused: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route one call; `args` and `kwargs` are those of `func`."""
        kwargs = kwargs or {}
        if func not in _KNOWN and not is_registered(func):
            return self.replacements.get(func, func)(*args, **kwargs) if self.replacements else func(*args, **kwargs)
        try:
            handler = _WATCHED.get(func)
            if handler is not None:
                return handler(self, func, *args, **kwargs)
            if is_registered(func):
                return self._registered(func, *args, **kwargs)
            if self.record_losses:
                loss = RECOGNIZED.get(func)
                if loss is not None:
                    return self._record(*loss(*args, **kwargs), args[0] if args else kwargs.get("input"))
                if func in REFUSED:
                    self.refused.append(f"{func.__name__} was called, but {REFUSED[func]}")
                result = self.plain(func, *args, **kwargs)
                self._logits.follow(func, result, args, kwargs)
                return result
            return self.plain(func, *args, **kwargs)
        except (UnsupportedSiteError, InvalidArgumentError, LossNotRecognizedError) as problem:
            if self.lenient and isinstance(problem, LossNotRecognizedError):
                return self.plain(func, *args, **kwargs)
            if self.problems is None:
                raise
            self.problems.append(problem)
            return func(*args, **kwargs)

    def __enter__(self) -> Interception:
        """Start to intercept."""
        TorchFunctionMode.__enter__(self)
        checkpointing.enter(self)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop to intercept."""
        checkpointing.leave()
        TorchFunctionMode.__exit__(self, *exception)

    @property
    def position(self) -> int:
        """Number of the next site in the pass."""
        return self._first + len(self.sites)

    @property
    def repeatable(self) -> bool:
        """Whether the rule can do the same thing again."""
        return isinstance(self.rule, RepeatableRule)

    def replaying(self, start: int) -> Interception:
        """Return an interception that does again what this one did from site number `start` on."""
        assert isinstance(self.rule, RepeatableRule)
        sites = self.rule.sites if isinstance(self.rule, checkpointing.Replay) else self.sites
        replay = Interception(
            checkpointing.Replay(self.rule, sites, start),
            record_losses=self.record_losses,
            replacements=self.replacements,
            written_out=self.written_out,
            lenient=self.lenient,
        )
        replay.ignores_attention = self.ignores_attention  # in the backward, where nobody's choice is in force
        replay._first = start
        replay.checkpoints = 1
        return replay

    def plain(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func`, or what replaces it in this pass, with nothing intercepted."""
        return self.replacements.get(func, func)(*args, **kwargs)

    def at_rest(self, p: float, kind: str) -> None:
        """Take note of a dropout that was told not to drop: what it belongs to is in evaluation mode."""
        if p > 0:
            self.resting[name_caller() if self.name_sites else f"{self._kind or kind} with p={p:g}"] = None

    def sites_of_kind(self, kind: str) -> AbstractContextManager[None]:
        """Call the sites reached inside by the name of the construct that they are part of."""
        return patched((self, "_kind", kind))

    def _registered(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a loss that the user made known, with the mode on inside; what it calls is part of it."""
        record = self.record_losses
        with patched((self, "record_losses", False)), self:
            if not record:
                return func._dropreg_loss(*args, **kwargs)  # type: ignore[attr-defined]
            result = describe(func, *args, **kwargs)
        return self._record(*result)

    def _record(self, reduced: Tensor, loss: Loss, input: Any = None) -> Tensor:
        if loss.elements.requires_grad:
            logits = self._logits.behind(input)
            if logits is not None:
                loss.take_logits(logits)
            self.losses.append(loss)
        return reduced

    def site(self, h: Tensor, p: float, mask_shape: tuple[int, ...], kind: str, inplace: bool) -> Tensor:
        """Apply the rule at a site; one with ``p = 0`` is counted and left alone.

        Args:
            h: The tensor to drop from.
            p: Drop probability.
            mask_shape: Shape of the mask, broadcastable to the shape of `h`.
            kind: Name of the kind of dropout.
            inplace: Whether the caller expects `h` itself to change.

        Returns:
            What takes the place of the dropout's result.
        """
        check_drop_prob(p, kind)
        if p == 0.0:
            self.inactive += 1
            return h
        checkpointing.check_recomputation(self)
        site = Site(name_caller() if self.name_sites else "", p, tuple(h.shape), mask_shape, self._kind or kind)
        self.sites.append(site)
        self.in_bfloat16 = self.in_bfloat16 or is_in_bfloat16(h)
        dropped = self.rule(site, h.clone() if inplace else h)
        if _marking.get() and not dropped.requires_grad and torch.is_grad_enabled():
            with suppress(RuntimeError):  # within torch.vmap nothing can be marked
                marked = dropped.view_as(dropped).requires_grad_()  # a rule may have returned the user's own tensor
                dropped = marked.view_as(marked)  # has a node in the graph
        self.site_nodes.append(dropped.grad_fn)
        return h.copy_(dropped) if inplace else dropped


def _read_gradient(mode: Interception, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mode.reads_gradients = True
    return func(*args, **kwargs)


_WATCHED = {**HANDLERS, Tensor.grad.__get__: _read_gradient}  # type: ignore[union-attr]
_KNOWN = frozenset({*_WATCHED, *RECOGNIZED, *REFUSED, *FOLLOWED})
"""Functions of which something is to be noted; all others only run."""
