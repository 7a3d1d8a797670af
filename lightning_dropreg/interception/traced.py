"""What stands in the place of an `Interception` while a compiled part of a model runs.

Dynamo traces a `TorchFunctionMode` with its handlers into the graph, if it keeps to what can be traced: no look at the
stack, no generators, nothing that differs from one call to the next but tensors. `Traced` is made afresh for every call
of a compiled part; what it met there (numbers and names, a side effect that Dynamo brings out of the graph) is handed
back to the interception in whose pass the call was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dropreg.interception import checkpointing
from lightning_dropreg.interception.handlers import HANDLERS
from lightning_dropreg.interception.handlers.stochastic_depth import HANDLERS as BY_THEIR_CALLERS
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.interception.sites import Site, TracedRule
from lightning_dropreg.losses import RECOGNIZED, Loss
from lightning_dropreg.losses.custom import describe, is_registered
from lightning_dropreg.numerics.dtypes import is_in_bfloat16
from lightning_dropreg.numerics.torch_private import traced_from_outside_only

__all__ = ["Met", "Traced", "entered", "hand_back"]


class Met(NamedTuple):
    """A dropout that a graph has reached.

    Attributes:
        p: Drop probability; 0 for one that is counted and left alone.
        shape: Shape of the tensor that is dropped from.
        mask_shape: Shape of the mask.
        kind: What drops.
        in_bfloat16: Whether in bfloat16.
    """

    p: float
    shape: tuple[int, ...]
    mask_shape: tuple[int, ...]
    kind: str
    in_bfloat16: bool = False


class Traced(TorchFunctionMode):
    """Applies a rule at the dropout sites of a compiled part (a `lightning_dropreg.interception.sites.Mode`).

    Args:
        rule: What to do at each site.
        first: The number of the first one in the pass.
        record_losses: Whether recognized losses are taken apart, outside the graph, which breaks there.
        ignores_attention: Whether dropout on attention probabilities is left out.
        asks_callers: Whether stochastic depth is looked for, at the price of a break of the graph wherever it might be.

    Attributes:
        sites: What was reached, in order.
        losses: The losses in the order in which they were computed.
        resting: Kinds and probabilities of dropouts that were told not to drop.
    """

    def __init__(
        self, rule: TracedRule, first: int, record_losses: bool, ignores_attention: bool, asks_callers: bool
    ) -> None:
        super().__init__()
        self.rule = rule
        self.record_losses = record_losses
        self.ignores_attention = ignores_attention
        self.asks_callers = asks_callers
        self.written_out = False
        self.next = torch.tensor(first)
        self._first = first
        self._number = 0
        self.sites: list[Met] = []
        self.losses: list[Loss] = []
        self.resting: list[tuple[float, str]] = []
        self.inactive = 0
        self.checkpoints = 0
        self.site_nodes: list[Any] = []
        self._kind: str | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route one call; `args` and `kwargs` are those of `func`."""
        if torch.compiler.is_compiling() and not (self.asks_callers and func in BY_THEIR_CALLERS):
            return self._route(func, args, kwargs or {})
        return self._route_outside(func, args, kwargs or {})

    def _route(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is Tensor.unflatten:  # written in Python, with a super() that breaks the graph under any mode
            return torch.unflatten(*args, **kwargs)
        if func is torch_checkpoint.checkpoint:  # offered by Dynamo alone
            return _checkpoint(self, func, *args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None and (self.asks_callers or func not in BY_THEIR_CALLERS):  # else without breaking graphs
            return handler(self, func, *args, **kwargs)
        if self.record_losses and (func in RECOGNIZED or (isinstance(func, FunctionType) and is_registered(func))):
            return _record(self, func, args, kwargs)
        return func(*args, **kwargs)

    _route_outside = torch.compiler.disable(_route)

    def site(self, h: Tensor, p: float, mask_shape: tuple[int, ...], kind: str, inplace: bool) -> Tensor:
        """See `lightning_dropreg.interception.sites.Mode`."""
        if p == 0.0:
            self.sites.append(Met(0.0, tuple(h.shape), tuple(mask_shape), self._kind or kind))
            return h
        self.sites.append(Met(p, tuple(h.shape), tuple(mask_shape), self._kind or kind, is_in_bfloat16(h)))
        position, self.next = self.next, self.next + 1
        number, self._number = self._number, self._number + 1
        dropped = self.rule(h.clone() if inplace else h, p, mask_shape, position, number)
        return h.copy_(dropped) if inplace else dropped

    def at_rest(self, p: float, kind: str) -> None:
        """See `lightning_dropreg.interception.sites.Mode`."""
        if p > 0:
            self.resting.append((p, self._kind or kind))

    @contextmanager
    def sites_of_kind(self, kind: str) -> Iterator[None]:
        """See `lightning_dropreg.interception.sites.Mode`."""
        previous, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = previous

    # what follows is asked where a piece of the part runs outside the graph, and is checkpointed there

    @property
    def position(self) -> int:
        """Number of the next site in the pass."""
        return int(self.next)

    @property
    def repeatable(self) -> bool:
        """Whether the rule can do the same thing again: it is a function of the number of the site."""
        return True

    def replaying(self, start: int) -> Traced:
        """Return what does again what this did from site number `start` on."""
        replay = Traced(self.rule, start, self.record_losses, self.ignores_attention, self.asks_callers)
        replay._number = start - self._first
        replay.checkpoints = 1
        return replay


traced_from_outside_only(Traced.__torch_function__)


def _checkpoint(mode: Traced, func: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint` in a graph: what it runs is offered to no mode but one entered there."""

    def body(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return func(body, *args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _record(mode: Traced, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Take a loss apart outside the graph: its elements must have a node of their own to be differentiated in."""
    reduced, loss = RECOGNIZED[func](*args, **kwargs) if func in RECOGNIZED else describe(func, *args, **kwargs)
    if loss.elements.requires_grad:
        mode.losses.append(loss)
    return reduced


def hand_back(traced: Traced, interception: Interception, node: Any) -> None:
    """Let an interception know what was met in a compiled part.

    Args:
        traced: What was in its place there.
        interception: The interception, with a `lightning_dropreg.interception.sites.TraceableRule`.
        node: The node of the autograd graph that stands for the sites of the part; None for a constant.
    """
    for met in traced.sites:
        if met.p == 0.0:
            interception.inactive += 1
            continue
        site = Site("", met.p, met.shape, met.mask_shape, met.kind)
        interception.rule.meet(site)  # type: ignore[attr-defined]
        interception.sites.append(site)
        interception.site_nodes.append(node)
        interception.in_bfloat16 = interception.in_bfloat16 or met.in_bfloat16
    interception.inactive += traced.inactive
    interception.losses += traced.losses
    for p, kind in traced.resting:
        interception.at_rest(p, kind)


@contextmanager
def entered(traced: Traced) -> Iterator[None]:
    """Let `traced` be the mode, and what checkpoints outside the graph belong to."""
    checkpointing.enter(traced)
    try:
        with traced:
            yield
    finally:
        checkpointing.leave()
