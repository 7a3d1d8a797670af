"""Dropout inside `torch.utils.checkpoint`: the recomputation in the backward gets the noise of the first computation.

What is checkpointed runs a second time during the backward, when the pass is long over and its interception gone;
left alone it would meet real dropout there and give wrong gradients without a word. So while an interception is
active, the two entrances of checkpointing are replaced, and what they are to run again runs under an interception
that repeats the rule at the same sites. Recomputations that come in by other doors are refused.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves

from lightning_dropreg.errors import InconsistentPassesError, UnsupportedOperationError, UnsupportedSiteError
from lightning_dropreg.interception.naming import name_caller
from lightning_dropreg.interception.sites import RepeatableRule, Site
from lightning_dropreg.numerics.torch_private import (
    checkpoint_entrances,
    in_checkpoint,
    is_made_a_graph,
    stance,
    watching_saved_tensors,
)

__all__ = [
    "Repeating",
    "Replay",
    "check_recomputation",
    "compiled",
    "enter",
    "in_checkpointed_region",
    "leave",
    "uncompiled",
]


class Repeating(Protocol):
    """What an interception must tell about itself, so that its pass can be gone through again.

    Attributes:
        sites: The sites reached so far.
        site_nodes: The node of the autograd graph at which each site's result was made.
        checkpoints: How many checkpointed regions the running code is in.
        written_out: Whether the pass will be differentiated twice or forward.
    """

    sites: Any
    site_nodes: list[Any]
    checkpoints: int
    written_out: bool

    @property
    def position(self) -> int:
        """Number of the next site in the pass."""

    @property
    def repeatable(self) -> bool:
        """Whether the rule of the pass can do the same thing again."""

    def replaying(self, start: int) -> AbstractContextManager[Any]:
        """Return an interception that does again what this one did from site number `start` on."""


class _Active(threading.local):
    def __init__(self) -> None:
        self.modes: list[Repeating] = []
        self.stance: AbstractContextManager[None] | None = None


_active = _Active()
_lock = threading.Lock()
_count = 0
_ENTRANCES = checkpoint_entrances()
_torchs_own = {kind: getattr(torch_checkpoint, name) for kind, name in _ENTRANCES.items()}
_watching = ExitStack()


def enter(mode: Repeating) -> None:
    """Make `mode` the one that checkpoints in this thread belong to.

    What is compiled runs uncompiled meanwhile, but for parts that `lightning_dropreg.passes.part` knows to look into.
    """
    global _count  # noqa: PLW0603
    if not _active.modes and "torch._dynamo" in sys.modules:  # else nothing can be compiled
        _active.stance = uncompiled()
        _active.stance.__enter__()
    _active.modes.append(mode)
    with _lock:
        _count += 1
        if _count == 1:
            _watching.enter_context(watching_saved_tensors())
            for kind, name in _ENTRANCES.items():
                setattr(torch_checkpoint, name, _OURS[kind])


def leave() -> None:
    """Undo the last `enter`."""
    global _count  # noqa: PLW0603
    _active.modes.pop()
    if not _active.modes and _active.stance is not None:
        _active.stance.__exit__(None, None, None)
        _active.stance = None
    with _lock:
        _count -= 1
        if not _count:
            _watching.close()
            for kind, name in _ENTRANCES.items():
                setattr(torch_checkpoint, name, _torchs_own[kind])


def in_checkpointed_region() -> bool:
    """Whether the running code will be run again in the backward."""
    return bool(_active.modes) and _active.modes[-1].checkpoints > 0


class Replay:
    """A rule that does at each site what another rule did there before.

    Args:
        rule: The other rule.
        sites: The sites that it met.
        start: The number of the first one to be met again.
    """

    def __init__(self, rule: RepeatableRule, sites: list[Site], start: int) -> None:
        self.rule = rule
        self.sites = sites
        self.position = start

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`.

        Returns:
            What the rule returned before.

        Raises:
            InconsistentPassesError: If `site` is not the one that was there before.
        """
        index, self.position = self.position, self.position + 1
        first = self.sites[index] if index < len(self.sites) else None
        if first is None or (first.p, first.shape, first.kind) != (site.p, site.shape, site.kind):
            raise InconsistentPassesError(
                f"A checkpointed part of the model met dropout site {first} when it was computed and {site} when it "
                "was computed again for the backward. It must do the same thing both times."
            )
        return self.again(index, h)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return self.rule.again(index, h)


def _without_reentrance(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stand in for torch's generator around a checkpointed call; `fn` is what it runs again in the backward."""
    if not _active.modes or is_made_a_graph():
        yield from _torchs_own["generator"](fn, *args, **kwargs)
        return
    mode = _active.modes[-1]
    _check_repeatable(mode)
    start = mode.position

    def again(*args: Any, **kwargs: Any) -> Any:  # compiled parts as they were in the checkpoint the first time
        with mode.replaying(start), uncompiled():
            return fn(*args, **kwargs)

    mode.checkpoints += 1
    try:
        yield from _torchs_own["generator"](again, *args, **kwargs)
    finally:
        mode.checkpoints -= 1


class _Reentrant:
    """Stands in for `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Do as torch does, with `function` under the active interception both times.

        Returns:
            What `function` returned.

        Raises:
            UnsupportedOperationError: If the estimator cannot differentiate it.
        """
        if not _active.modes:
            return _torchs_own["function"].apply(function, preserve_rng_state, *args)
        mode = _active.modes[-1]
        _check_repeatable(mode)
        if mode.written_out:
            raise UnsupportedOperationError(
                f"{name_caller()} is checkpointed with use_reentrant=True, which this estimator cannot differentiate. "
                "Use torch.utils.checkpoint with use_reentrant=False, or estimator='antithetic'."
            )
        start, computed = mode.position, False

        def run(*args: Any) -> Any:
            nonlocal computed
            if not computed:
                computed = True
                return function(*args)
            with mode.replaying(start), uncompiled():
                return function(*args)

        mode.checkpoints += 1
        first = len(mode.sites)
        try:
            outputs = _torchs_own["function"].apply(run, preserve_rng_state, *args)
        finally:
            mode.checkpoints -= 1
        # the sites inside have no node in the autograd graph; the checkpoint itself stands for them
        nodes = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn]
        mode.site_nodes[first:] = [nodes[0] if nodes else None] * (len(mode.sites) - first)
        return outputs


_OURS = {"generator": _without_reentrance, "function": _Reentrant}


def uncompiled() -> AbstractContextManager[None]:
    """Let compiled modules run as they were written, to look at them."""
    return stance("force_eager")


def compiled() -> AbstractContextManager[None]:
    """Let compiled modules run compiled within `uncompiled`."""
    return stance("default")


def _check_repeatable(mode: Repeating) -> None:
    if not mode.repeatable:
        raise UnsupportedOperationError(
            f"{name_caller()} is checkpointed, and the recomputation in the backward knows nothing of the forward-mode "
            "derivatives. Use estimator='antithetic' or 'double_backward', or switch checkpointing off."
        )


def check_recomputation(mode: Repeating) -> None:
    """Refuse a site that will be computed again in the backward without our knowing.

    Raises:
        UnsupportedSiteError: If the site lies in a checkpoint that did not come by
            `torch.utils.checkpoint.checkpoint`, or in the forward of a custom `torch.autograd.Function`.
    """
    if mode.checkpoints:
        return
    if in_checkpoint():
        found = "a checkpoint that was not made by torch.utils.checkpoint.checkpoint"
    elif not torch.is_grad_enabled() and _in_custom_function():
        found = "the forward of a custom torch.autograd.Function"
    else:
        return
    raise UnsupportedSiteError(
        f"Dropout in {name_caller()} happens inside {found}, whose backward would not know what was done in its place. "
        "Use torch.utils.checkpoint.checkpoint, or move the dropout out of it."
    )


def _in_custom_function() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
