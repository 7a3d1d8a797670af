"""One set of passes over a batch: who runs them, what they estimate, and how that goes into the step's total."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from lightning_dropreg.estimators import ESTIMATORS, Estimate, Pairs, antithetic, antithetic_in_turn, one_pass
from lightning_dropreg.estimators.counts import Counting, Counts, Rows
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.estimators.layout import Layout, RowsNotFoundError
from lightning_dropreg.numerics.context import nothing
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Closure, Off, run_pass
from lightning_dropreg.passes.gradients import Scaler
from lightning_dropreg.passes.run import recounted
from lightning_dropreg.step.settings import Estimation

__all__ = ["BatchRunner", "PassGroup", "StepResult", "run_without_dropout"]


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
        shares_body: Whether draws that differ at the last site only may run what comes before it once.
        looked_at: Whether the step was looked at before, so that not every estimate must show what it assumes.
        scaler: Multiplies a loss by the scale of a gradient scaler; None without one.
        counts: What the elements of the losses count in the whole batch, once a pass has been made over it.
        counting: How those of some rows find it, as was found out before; None if nobody looked.
        stale: Lets go of the gradients of the step before; None if they may be wanted.
    """

    releases: bool = False
    shares_body: bool = False
    looked_at: bool = False
    scaler: Scaler | None = None
    counts: Counts
    counting: Counting | None = None
    stale: Callable[[], None] | None = None

    def whole(self) -> Tensor:
        """Run on the whole batch; the run counts for module state and logs."""

    def run_without_trace(self) -> Tensor:
        """Run on the whole batch, leaving no trace."""

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Closure, Rows]:
        """Return what runs on random rows, those of `key`, leaving no trace, and which they are."""

    def paired(self, fraction: float, dim: int, key: int, clean: bool = False) -> tuple[Closure, Layout, Pairs] | None:
        """Return what runs on the whole batch with random rows in it twice; the run counts for module state and logs.

        With `clean` they are there three times, see `lightning_dropreg.estimators.Pairs`.

        None if the rows cannot be told apart in the step. What the closure raises as `RowsNotFoundError` can be
        followed by `forget` and another way.
        """
        return None

    def counts_as(self, returned: Tensor, loss: Tensor) -> None:
        """Let `loss` be logged where the step logged the loss that it `returned`, with rows in it twice."""
        raise AssertionError("nothing was paired")

    def forget(self) -> None:
        """Let no run so far count."""

    def drop_stale_gradients(self) -> None:
        """Let go of the gradients of the step before, if they are cleared before the backward without being read."""
        if self.stale is not None:
            stale, self.stale = self.stale, None
            stale()


@dataclass(frozen=True)
class PassGroup:
    """One set of passes and the weights with which its results go into the total; 0 for what it does not bring."""

    estimation: Estimation
    curvature: str | None = None
    penalty: float = 0.0
    noise: float = 0.0
    later: float = 0.0
    has_loss: bool = False

    def run(self, runner: BatchRunner, key: int, measure_noise: bool) -> StepResult:
        """Run the passes; return this group's part of the total, and the values in it."""
        chosen = self.estimation
        if chosen.batch_fraction is None:
            closure = runner.whole if self.has_loss else runner.run_without_trace
            return self._run(runner, closure, 1.0, key, measure_noise)
        # estimates of penalty and noise alone, on some rows
        closure, rows = runner.rows(chosen.batch_fraction, chosen.batch_dim, fold_key(key, -1))
        if runner.counts.known is None:
            with recounted(runner.counts.note):
                run_pass(runner.run_without_trace, Off())
        with recounted(runner.counts.on(rows, runner.counting)):
            return self._run(runner, closure, rows.fraction, key, measure_noise)

    def _run(self, runner: BatchRunner, closure: Closure, fraction: float, key: int, measure_noise: bool) -> StepResult:
        chosen = self.estimation
        spread = self._spread(fraction)

        def weigh(estimate: Estimate) -> list[Tensor]:
            return self._weigh(estimate, fraction, measure_noise)

        if chosen.low_memory and runner.releases:
            estimate, scalars = antithetic_in_turn(
                closure,
                closure if chosen.batch_fraction is not None else runner.run_without_trace,
                weigh,
                curvature=self.curvature,
                noise=spread != 0,
                step_size=chosen.step_size,
                mask=chosen.mask,
                key=key,
                scaler=runner.scaler,
                drop_stale_gradients=runner.drop_stale_gradients,
            )
        else:
            estimator = ESTIMATORS[chosen.estimator]
            if estimator is antithetic:
                estimator = functools.partial(
                    antithetic,
                    restart=runner.forget if self.has_loss else nothing,
                    run_without_trace=self._unseen(runner, closure),
                )
            estimate = estimator(
                closure,
                curvature=self.curvature,
                noise=spread != 0,
                step_size=chosen.step_size,
                mask=chosen.mask,
                key=key,
            )
            scalars = weigh(estimate)
        return self._result(estimate, scalars, fraction)

    def _unseen(self, runner: BatchRunner, closure: Closure) -> Closure | None:
        """Runs on the rows at hand without trace, where nobody has seen yet that targets and weights stand still."""
        if self.curvature is None or runner.looked_at:
            return None
        return runner.run_without_trace if self.estimation.batch_fraction is None else closure

    def in_one_pass(self, runner: BatchRunner, key: int, measure_noise: bool) -> StepResult | None:
        """Do the same together with the loss, in one pass over the batch with some rows twice; None if that is no way.

        It takes ``1 + f`` times what the loss alone takes, if ``f`` is the fraction of the rows.

        Returns:
            The loss, this share's part of the total, and the values in it.
        """
        chosen = self.estimation
        if not chosen.may_be_one_pass or chosen.batch_fraction is None:
            return None
        clean = self.curvature == FULL
        found = runner.paired(chosen.batch_fraction, chosen.batch_dim, fold_key(key, -1), clean)
        if found is None:
            return None
        closure, layout, pairs = found
        returned: list[Tensor] = []

        def keeping() -> Tensor:
            returned.append(closure())
            return returned[0]

        try:
            with recounted(None):  # it knows by itself what rows count that are there twice
                estimate = one_pass(
                    keeping,
                    layout,
                    pairs,
                    curvature=self.curvature,
                    noise=bool(self.noise or self.later),
                    step_size=chosen.step_size,
                    mask=chosen.mask,
                    key=key,
                )
        except RowsNotFoundError:
            runner.forget()
            return None
        runner.counts_as(returned[0], estimate.loss)
        share = replace(self, has_loss=True)
        return share._result(estimate, share._weigh(estimate, pairs.fraction, measure_noise), pairs.fraction)

    def _spread(self, fraction: float) -> float:
        # see `lightning_dropreg.estimators.counts`
        return math.sqrt(fraction) * (self.noise or self.later)

    def _weigh(self, estimate: Estimate, fraction: float, measure_noise: bool) -> list[Tensor]:
        """The scalar to differentiate, and the noise alone if that is to be measured."""
        scalars = [estimate.loss] if self.has_loss else []
        if estimate.penalty is not None:
            scalars.append(estimate.penalty if self.penalty == 1 else self.penalty * estimate.penalty)
        noise = self._scaled(estimate, fraction)
        if noise is not None and self.noise:
            scalars.append(noise)
        total = sum(scalars[1:], scalars[0])
        return [total] if noise is None or not measure_noise else [total, noise]

    def _scaled(self, estimate: Estimate, fraction: float) -> Tensor | None:
        spread = self._spread(fraction)
        return estimate.noise if estimate.noise is None or spread == 1 else spread * estimate.noise

    def _result(self, estimate: Estimate, scalars: list[Tensor], fraction: float) -> StepResult:
        noise = scalars[1] if len(scalars) > 1 else self._scaled(estimate, fraction)
        return StepResult(
            scalars[0], estimate.loss, estimate.penalty, noise if self.noise else None, noise if self.later else None
        )


def run_without_dropout(runner: BatchRunner) -> StepResult:
    """Run the step once, without dropout and without estimating anything."""
    loss = run_pass(runner.whole, Off()).loss
    return StepResult(loss, loss)
