"""Where in a run a batch stands, by numbers that an interrupted run and an uninterrupted one count alike."""

from __future__ import annotations

from lightning import Trainer

from lightning_dropreg.numerics.noise import fold_key

__all__ = ["Position"]


class Position:
    """Counts the batches of an optimizer step.

    Noise is keyed by the optimizer step and the number of the batch within it. (The number of the batch in the epoch
    will not do: a run that stopped at the last batch of an epoch and goes on counts past that epoch's end.)
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._step = -1
        self._batches = 0

    def begin_batch(self) -> None:
        """Count a batch; what evaluates it several times, as LBFGS does, gets the same noise every time."""
        step = self._trainer.global_step
        self._batches = self._batches + 1 if step == self._step else 0
        self._step = step

    def key(self, seed: int) -> int:
        """Return the key of this batch's noise, which no other batch of the run has, on no other rank."""
        step = self._trainer.global_step
        return fold_key(seed, self._trainer.global_rank, step, self._batches if step == self._step else 0)
