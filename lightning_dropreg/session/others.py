"""The Trainer's other callbacks: what a session takes into account of them, and those that search.

A search (for a learning rate, for a batch size) trains a little within a fit. While one runs, the Trainer has other
callbacks and none of the user's, so that it would train with plain dropout: another loss, another memory. Our callbacks
start before it and join it, and begin anew when it is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor

from lightning_dropreg.session.twins import is_a

__all__ = ["Detector", "DropsLater", "Search", "UndoneAtEnd", "callbacks_of", "goes_before_finders", "is_resuming"]

_OWN_FILES = (".lr_find_", ".scale_batch_size_")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a trainer, which Lightning does not declare."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


@runtime_checkable
class DropsLater(Protocol):
    """A callback that may hold all drop probabilities at 0 for a while.

    Attributes:
        drops_later: True; a step that drops nothing is no mistake then.
    """

    drops_later: bool


@runtime_checkable
class Detector(Protocol):
    """A callback that judges how large penalty and noise are."""

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` is looked at."""

    def see_penalty(self, penalty: Tensor, loss: Tensor) -> None:
        """Take note of one batch's penalty and loss."""

    def see_noise(self, noise_norm: Tensor, gradient_norm: Tensor) -> None:
        """Take note of the norms of one batch's noise and gradient."""


def is_resuming(trainer: Trainer) -> bool:
    """Whether a fit goes on from a checkpoint that somebody gave; finders write and load one of their own."""
    path = trainer.ckpt_path  # in `setup` that may still be of the fit before
    return bool(path) and not Path(str(path)).name.startswith(_OWN_FILES)


def goes_before_finders(trainer: Trainer) -> None:
    """In ``setup``, let the callbacks of this package come before all finders, which Lightning puts first."""
    callbacks = callbacks_of(trainer)
    finders = [callback for callback in callbacks if is_a(callback, LearningRateFinder, BatchSizeFinder)]
    if not finders:
        return
    first = next(index for index, callback in enumerate(callbacks) if callback is finders[0])
    ours = [callback for callback in callbacks[first:] if _is_ours(callback)]
    others = [callback for callback in callbacks[first:] if not any(callback is each for each in ours)]
    trainer.callbacks = [*callbacks[:first], *ours, *others]  # type: ignore[attr-defined]


def _is_ours(callback: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "lightning_dropreg" for kind in type(callback).__mro__)


class UndoneAtEnd(Callback):
    """A callback that changes something for the length of a fit, and undoes it however that ends."""

    def undo(self) -> None:
        """Put back what was there; nothing, if that was done."""
        raise NotImplementedError

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo it."""
        self.undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo it."""
        self.undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo it."""
        self.undo()


class Search:
    """Notices that a search is under way, joins it, and notices when it is over."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._joining = [each for each in callbacks_of(trainer) if getattr(each, "acts_on_training", None) is True]
        self._joined: Sequence[Any] | None = None

    @property
    def joined(self) -> bool:
        """Whether a search was joined; what was seen since is not of the training."""
        return self._joined is not None

    @property
    def is_over(self) -> bool:
        """Whether a search was joined that is over now: the Trainer has other callbacks again."""
        return self._joined is not None and callbacks_of(self._trainer) is not self._joined

    def join(self) -> None:
        """Add to the callbacks those that a search has left out, if there is one."""
        there = callbacks_of(self._trainer)
        missing = [each for each in self._joining if not any(each is other for other in there)]
        if missing:  # behind: finders look for their own in the first place
            self._trainer.callbacks = self._joined = [*there, *missing]  # type: ignore[attr-defined]
