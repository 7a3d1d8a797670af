"""Who runs the user's step on a batch, and what the passes gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_dropreg.estimators import Pairs
from lightning_dropreg.estimators.layout import Layout
from lightning_dropreg.passes import Closure
from lightning_dropreg.passes.gradients import Scaler

__all__ = ["BatchRunner", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What the passes over a batch gave.

    Attributes:
        total: The scalar to differentiate.
        loss: The loss without penalty and noise.
        penalty: The penalty, without its strength, or None.
        noise: The scaled noise scalar inside `total`, or None. Where its graph is freed already it has a gradient only
            if it was to be measured.
        later: The scaled noise scalar that is not in `total` and whose gradient is to be added after the backward,
            where the passes at hand gave it for nothing; or None.
    """

    total: Tensor
    loss: Tensor
    penalty: Tensor | None = None
    noise: Tensor | None = None
    later: Tensor | None = None

    def plus(self, part: StepResult) -> StepResult:
        """Add what other passes over the same batch brought; the loss is that of the first."""
        return StepResult(
            self.total + part.total,
            self.loss,
            self.penalty if part.penalty is None else part.penalty,
            self.noise if part.noise is None else part.noise,
            self.later if part.later is None else part.later,
        )


class BatchRunner(Protocol):
    """Runs the user's step on one batch, any number of times.

    Attributes:
        releases: Whether passes may be differentiated one by one, before the one backward of the total.
        scaler: Multiplies a loss by the scale of a gradient scaler; None without one.
    """

    releases: bool
    scaler: Scaler | None

    def whole(self) -> Tensor:
        """Run on the whole batch; the run counts for module state and logs."""

    def aside(self) -> Tensor:
        """Run on the whole batch, leaving no trace."""

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Closure, float]:
        """Return what runs on random rows, those of `key`, leaving no trace, and the fraction they really are."""

    def paired(self, fraction: float, dim: int, key: int) -> tuple[Closure, Layout, Pairs] | None:
        """Return what runs on the whole batch with random rows in it twice; the run counts for module state and logs.

        None if the rows cannot be told apart in the step. What the closure raises as `RowsNotFoundError` can be
        followed by `forget` and another way.
        """

    def counts_as(self, returned: Tensor, loss: Tensor) -> None:
        """Let `loss` be logged where the step logged the loss that it `returned`."""

    def forget(self) -> None:
        """Let no run so far count."""

    def drop_stale_gradients(self) -> None:
        """Let go of the gradients of the step before, if they are cleared before the backward without being read."""
