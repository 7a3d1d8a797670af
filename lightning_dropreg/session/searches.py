"""Searches that Lightning makes by training a little within a fit: for a learning rate, for a batch size.

While one runs, the Trainer has other callbacks and none of the user's, so that the search would train with plain
dropout: another loss, another memory. Our callbacks start before it and join it, and begin anew when it is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_dropreg.session.twins import is_a

__all__ = ["Search", "goes_before_finders", "is_resuming"]

_OWN_FILES = (".lr_find_", ".scale_batch_size_")


def is_resuming(trainer: Trainer) -> bool:
    """Tell whether a fit goes on from a checkpoint that somebody gave; finders write and load one of their own.

    Args:
        trainer: A trainer that fits; in ``setup`` it may still hold the path of the fit before.

    Returns:
        Whether it goes on.
    """
    path = trainer.ckpt_path
    return bool(path) and not Path(str(path)).name.startswith(_OWN_FILES)


def goes_before_finders(trainer: Trainer) -> None:
    """Let the callbacks of this package come before all finders, which Lightning puts first.

    Args:
        trainer: The trainer, in ``setup``: nothing has started yet.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    finders = [callback for callback in callbacks if is_a(callback, LearningRateFinder, BatchSizeFinder)]
    if not finders:
        return
    first = next(index for index, callback in enumerate(callbacks) if callback is finders[0])
    ours = [callback for callback in callbacks[first:] if _is_ours(callback)]
    others = [callback for callback in callbacks[first:] if not any(callback is each for each in ours)]
    trainer.callbacks = [*callbacks[:first], *ours, *others]  # type: ignore[attr-defined]


def _is_ours(callback: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "lightning_dropreg" for kind in type(callback).__mro__)


class Search:
    """Notices that a search is under way, joins it, and notices when it is over.

    Args:
        trainer: The trainer, whose callbacks are the user's at this time.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._joining = [each for each in self._callbacks() if getattr(each, "acts_on_training", None) is True]
        self._joined: Sequence[Any] | None = None

    @property
    def joined(self) -> bool:
        """Whether a search was joined; what was seen since is not of the training."""
        return self._joined is not None

    @property
    def is_over(self) -> bool:
        """Whether a search was joined that is over now: the Trainer has other callbacks again."""
        return self._joined is not None and self._callbacks() is not self._joined

    def join(self) -> None:
        """Add to the callbacks those that a search has left out, if there is one."""
        there = self._callbacks()
        missing = [each for each in self._joining if not _holds(there, each)]
        if missing:  # behind: finders look for their own in the first place
            self._trainer.callbacks = self._joined = [*there, *missing]  # type: ignore[attr-defined]

    def _callbacks(self) -> list[Callback]:
        return self._trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _holds(callbacks: Iterable[object], one: object) -> bool:
    return any(each is one for each in callbacks)
