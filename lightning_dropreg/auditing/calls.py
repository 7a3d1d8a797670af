"""What a watch notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_dropreg.auditing.masks import Mask
from lightning_dropreg.auditing.places import Place

__all__ = ["Call", "Draw", "HandMask", "LossCall", "Recorder"]


@dataclass
class Call:
    """One call of a dropout.

    Attributes:
        place: Where.
        kind: The function or the class.
        p: The drop probability it was called with; None if it is not known.
        drops: Whether it was asked to drop anything.
        training: Whether the module that calls was in training mode.
        layer: The module that calls.
        mask: What it did, where that can be told.
        expected: The shape of the mask that it ought to draw, None for any.
        inner: Whether it is what a dropout layer is made of.
        before: Where the gradient of what went in can be asked for.
        after: Where the gradient of what came out can be asked for.
        tensors: What went in and came out, where the two gradients can be compared only as a whole (attention).
    """

    place: Place
    kind: str
    p: float | None
    drops: bool
    training: bool
    layer: nn.Module | None
    mask: Mask | None = None
    expected: tuple[int, ...] | None = None
    inner: bool = False
    before: GradientEdge | None = None
    after: GradientEdge | None = None
    tensors: tuple[Tensor, Tensor] | None = None


@dataclass
class Draw:
    """Random numbers that are no dropout this package knows: what drew them, and where."""

    what: str
    place: Place


@dataclass
class LossCall:
    """A loss: its name, the node at which what it is given was made, and the shape of that, if it is known."""

    name: str
    node: Any
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HandMask:
    """A tensor of 0 and one other value that acts on something: a mask, if it is another in every run.

    Attributes:
        place: Where it acts.
        layer: The module that runs.
        content: Which entries are 0, hashed.
        dropped: Number of entries that are 0.
        entries: Number of entries.
    """

    place: Place
    layer: nn.Module | None
    content: str
    dropped: int
    entries: int


class Recorder(Protocol):
    """What the functions that drop need of a watch: see `lightning_dropreg.auditing.watch.Watch`."""

    masks: bool
    gradients: bool
    backward: bool
    calls: list[Call]

    def record(self, kind: str, p: float | None, drops: bool, **known: Any) -> Call:
        """Note a call."""
