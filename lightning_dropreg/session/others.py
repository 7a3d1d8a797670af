"""What a session takes into account of the Trainer's other callbacks, each of which announces what it is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["DropsLater", "Watcher"]


@runtime_checkable
class DropsLater(Protocol):
    """A callback that may hold all drop probabilities at 0 for a while.

    Attributes:
        drops_later: True; a step that drops nothing is no mistake then.
    """

    drops_later: bool


@runtime_checkable
class Watcher(Protocol):
    """A callback that judges how large penalty and noise are."""

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` is looked at."""

    def see_penalty(self, penalty: Tensor, loss: Tensor) -> None:
        """Take note of one batch's penalty and loss."""

    def see_noise(self, noise_norm: Tensor, gradient_norm: Tensor) -> None:
        """Take note of the norms of one batch's noise and gradient."""
