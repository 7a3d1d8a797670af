"""What a dropout site is, what a rule for it is, and what the handler of a function may ask for.

Dropout at site ``i`` computes ``h_i * (1 + eta_i)`` with ``eta = -1`` with probability ``q`` and ``q/(1-q)``
otherwise: mean 0 and variance ``c = q/(1-q)``. Everything this package does needs only noise with these two
moments, so a site is described by ``q`` and by the shape of its mask.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Mode", "RepeatableRule", "Rule", "Site", "TraceableRule", "TracedRule"]


@dataclass(frozen=True)
class Site:
    """A place where a model drops entries of a tensor.

    Attributes:
        name: Path of the module that drops, or of the module and line that call the functional dropout. Filled in
            by `lightning_dropreg.functional.find_sites`; empty while training, where nobody reads it.
        p: Drop probability ``q``, in ``(0, 1)``.
        shape: Shape of the tensor that is dropped from.
        mask_shape: Shape of the mask, broadcastable to `shape`; 1 where the mask is shared.
        kind: What drops, e.g. ``"dropout"`` or ``"dropout2d"``.
    """

    name: str
    p: float
    shape: tuple[int, ...]
    mask_shape: tuple[int, ...]
    kind: str

    @property
    def variance(self) -> float:
        """Variance ``c = q/(1-q)`` of the dropout noise (the paper prints ``q/(q-1)``, a sign slip)."""
        return self.p / (1.0 - self.p)


class Rule(Protocol):
    """What happens at a dropout site in one pass."""

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """Return what takes the place of ``dropout(h)``; `h` itself must not be modified."""


@runtime_checkable
class RepeatableRule(Rule, Protocol):
    """A rule that can do the same thing again, as checkpointed parts of a model need it in the backward."""

    def again(self, index: int, h: Tensor) -> Tensor:
        """Return for `h` what the rule returned at site number `index` of the pass."""


class TracedRule(Protocol):
    """A rule as it stands in a compiled graph: what it keeps is tensors, and it takes note of nothing."""

    def __call__(self, h: Tensor, p: float, mask_shape: tuple[int, ...], position: Tensor, number: int) -> Tensor:
        """Return what takes the place of ``dropout(h)``.

        The site is number `position` (a scalar) of the pass, and `number` of the call of the compiled part.
        """


@runtime_checkable
class TraceableRule(Rule, Protocol):
    """A rule that a compiled part of a model can follow inside its graph."""

    def traced(self, first: int, count: int) -> TracedRule | None:
        """Return what does in a graph, at `count` sites from number `first` on, what the rule does; None if nothing."""

    def meet(self, site: Site) -> None:
        """Take note of a site that a graph has reached, in order."""

    def strong(self, first: int) -> TraceableRule:
        """Return a rule of the same kind, for a pass that begins with site number `first` of this one.

        Its noise has a key of its own and is large enough to be seen in every value.
        """


class Mode(Protocol):
    """What a handler may ask of the interception that called it; entered again, it sees what the handler calls.

    Attributes:
        record_losses: Whether recognized losses are taken apart.
        written_out: Whether the pass will be differentiated twice or forward, so that fused kernels without formulas
            for that are to be avoided.
        ignores_attention: Whether dropout on attention probabilities is left out.
        inactive: How many dropouts were reached whose drop probability is 0 at the moment.
    """

    record_losses: bool
    written_out: bool
    ignores_attention: bool
    inactive: int

    def __enter__(self) -> Any:
        """Start to intercept."""

    def __exit__(self, *exception: object) -> None:
        """Stop to intercept."""

    def site(self, h: Tensor, p: float, mask_shape: tuple[int, ...], kind: str, inplace: bool) -> Tensor:
        """Apply the rule of the pass where `h` is dropped from, and return what takes the place of the result."""

    def at_rest(self, p: float, kind: str) -> None:
        """Take note of a dropout that was told not to drop: what it belongs to is in evaluation mode."""

    def sites_of_kind(self, kind: str) -> AbstractContextManager[None]:
        """Call the sites reached inside by the name of the construct that they are part of."""
