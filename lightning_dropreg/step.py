"""Which passes a batch needs, and how their results become one loss or one extra gradient.

| settings                        | gradient                                                               |
|---------------------------------|------------------------------------------------------------------------|
| ``k``                           | ``DROPOUT_k``, Algorithm 1                                             |
| ``k``, noise from ``"dropout"`` | section 3.1: ``+ sqrt(1/2 (1 - 1/k)) (grad l(eta_1) - grad l(eta_2))`` |
| ``k``, noise from ``"taylor"``  | Algorithm 4: ``+ sqrt(1 - 1/k) xi_approx``                             |
| noise alone                     | loss without dropout, ``+ xi_approx`` (or the true noise over sqrt 2)  |
| penalty                         | ``R_approx`` or an ablation of it, dropout off                         |
| penalty and noise               | Algorithm 2: dropout replaced altogether                               |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_dropreg.estimators import ESTIMATORS, Estimate, Pairs, antithetic_in_turn, one_pass
from lightning_dropreg.gradients import GradientSum, Scaler, backpropagate, leaves_of
from lightning_dropreg.handlers.attention import attention_dropout
from lightning_dropreg.layout import Layout, RowsNotFoundError
from lightning_dropreg.passes import Closure, Drop, Off, run_pass
from lightning_dropreg.sites import fold_key

__all__ = ["BatchRunner", "Estimation", "NoiseSettings", "PenaltySettings", "Plan", "StepResult"]


@dataclass(frozen=True)
class Estimation:
    """How something is estimated. Penalty and noise with equal settings come from the same passes.

    Attributes:
        estimator: Name of the estimator.
        step_size: Step of the antithetic pair.
        mask: ``"as_model"`` or ``"elementwise"``.
        batch_fraction: Fraction of the batch's rows to estimate on, or None for all.
        batch_dim: Dimension along which the rows lie.
        low_memory: Whether only one graph of the antithetic pair is alive at a time.
    """

    estimator: str
    step_size: float
    mask: str
    batch_fraction: float | None
    batch_dim: int
    low_memory: bool = False


@dataclass(frozen=True)
class PenaltySettings:
    """Explicit penalty: factor (1 is the second-order value), curvature, how often, and how it is estimated."""

    strength: float
    curvature: str
    every_n_steps: int
    estimation: Estimation


@dataclass(frozen=True)
class NoiseSettings:
    """Implicit noise: factor of its standard deviation, where it comes from and goes, and how it is estimated."""

    strength: float
    source: str
    injection: str
    estimation: Estimation


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

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Callable[[], Tensor], float]:
        """Return what runs on random rows, those of `key`, leaving no trace, and the fraction they really are."""

    def paired(self, fraction: float, dim: int, key: int) -> tuple[Closure, Layout, Pairs] | None:
        """Return what runs on the whole batch with random rows in it twice; the run counts for module state and logs.

        None if the rows cannot be told apart in the step. What the closure raises as `RowsNotFoundError` can be
        followed by `forget` and another way.
        """

    def pairs(self, fraction: float, dim: int, key: int) -> tuple[Closure, Layout, Pairs, float] | None:
        """Return what runs on random rows, those of `key`, each twice, leaving no trace, and their fraction.

        None and `RowsNotFoundError` as in `paired`.
        """

    def counts_as(self, returned: Tensor, loss: Tensor) -> None:
        """Let `loss` be logged where the step logged the loss that it `returned`."""

    def forget(self) -> None:
        """Let no run so far count."""


@dataclass(frozen=True)
class Plan:
    """What to do with every batch.

    Attributes:
        k: Number of dropout draws, or None for no dropout.
        penalty: The penalty, or None.
        noise: The noise, or None.
        low_memory: Whether each of the k draws is differentiated before the next one is made.
        attention: What becomes of dropout on attention probabilities: ``"site"`` or ``"ignore"``.
    """

    k: int | None = None
    penalty: PenaltySettings | None = None
    noise: NoiseSettings | None = None
    low_memory: bool = True
    attention: str = "site"

    def penalty_at(self, step: int) -> PenaltySettings | None:
        """Return the penalty if it acts in optimizer step `step`."""
        if self.penalty is None or self.penalty.strength == 0 or step % self.penalty.every_n_steps:
            return None
        return self.penalty

    @property
    def noise_scale(self) -> float:
        """Factor of the noise scalar; 0 without noise."""
        if self.noise is None:
            return 0.0
        missing = 1.0 if self.k is None else 1.0 - 1.0 / self.k  # of the covariance of DROPOUT_1
        spread = 0.5 if self.noise.source == "dropout" else 1.0  # a difference of two draws has twice the covariance
        return self.noise.strength * math.sqrt(spread * missing)

    @property
    def noise_in_loss(self) -> bool:
        """Whether the noise enters by the loss (``injection="auto"``: where that is the cheaper way)."""
        if self.noise is None or self.noise_scale == 0:
            return False
        if self.noise.injection != "auto":
            return self.noise.injection == "loss"
        if self.noise.source == "dropout":
            return self.k is not None  # the draws are there already
        if self.k is not None:
            return False  # passes of its own: cheaper in memory once the main graph is gone
        if self.penalty is not None:
            return self.noise.estimation == self.penalty.estimation  # the penalty's passes carry it
        return self.noise.estimation.batch_fraction is None  # its own passes give the loss too

    @property
    def noise_of_finite_steps(self) -> Estimation | None:
        """How the noise is estimated, if that is by a finite step, which kinks of the network disturb."""
        if self.noise is None or not self.noise_scale or self.noise.source != "taylor":
            return None
        return self.noise.estimation if self.noise.estimation.estimator == "antithetic" else None

    @property
    def noise_after_backward(self) -> bool:
        """Whether the noise is added to the gradients after the backward pass."""
        return self.noise_scale != 0 and not self.noise_in_loss

    @property
    def untouched(self) -> bool:
        """Whether the plan leaves every step exactly as it is."""
        if self.k == 1:
            return self.attention == "site"
        return self.k is None and self.penalty is None and self.noise is None

    def only_drops_nothing(self, step: int) -> bool:
        """Whether optimizer step `step` is one pass without dropout and nothing else."""
        return self.k is None and not self.noise_scale and self.penalty_at(step) is None

    @property
    def row_dims(self) -> set[int]:
        """Dimensions along which something is estimated on some of the batch's rows."""
        return {e.batch_dim for e in self._estimations() if e.batch_fraction is not None}

    @property
    def in_one_pass(self) -> Estimation | None:
        """How everything is estimated, if that is on some rows and may be done in the pass that gives the loss."""
        shares = [] if self.k is not None else self._shares(0)
        return shares[0].estimation if len(shares) == 1 and shares[0].may_be_one_pass else None

    @property
    def estimators(self) -> set[str]:
        """Names of the estimators that the plan uses."""
        return {e.estimator for e in self._estimations()}

    def with_step_size(self, change: Callable[[float], float]) -> Plan:
        """Return the plan with all step sizes changed by `change`."""
        penalty, noise = self.penalty, self.noise
        if penalty is not None:
            wider = replace(penalty.estimation, step_size=change(penalty.estimation.step_size))
            penalty = replace(penalty, estimation=wider)
        if noise is not None:
            wider = replace(noise.estimation, step_size=change(noise.estimation.step_size))
            noise = replace(noise, estimation=wider)
        return replace(self, penalty=penalty, noise=noise)

    def _estimations(self) -> list[Estimation]:
        found = [] if self.penalty is None else [self.penalty.estimation]
        if self.noise is not None and self.noise.source == "taylor":
            found.append(self.noise.estimation)
        return found

    def run(self, runner: BatchRunner, key: int, step: int, measure_noise: bool = False) -> StepResult:
        """Run the passes of one batch up to the backward.

        Args:
            runner: Runs the user's step.
            key: Seed of the batch's noise.
            step: Number of the optimizer step.
            measure_noise: Whether the gradient of the noise alone is wanted, too.

        Returns:
            Total loss and its parts.
        """
        with attention_dropout(self.attention):
            return self._run(runner, key, step, measure_noise)

    def _run(self, runner: BatchRunner, key: int, step: int, measure_noise: bool) -> StepResult:
        if self.k is not None:
            return self._dropout_k(runner, key, self.k, measure_noise)
        shares = self._shares(step)
        result = shares[0].in_one_pass(runner, key, measure_noise) if len(shares) == 1 else None
        for share in shares if result is None else ():
            part = share.carry_out(runner, key, measure_noise)
            if result is None and not share.has_loss:
                result = _clean(runner)
            result = part if result is None else result.plus(part)
        result = _clean(runner) if result is None else result
        if self.noise_in_loss and self.noise is not None and self.noise.source == "dropout":
            noise = self.noise_scale * self._difference(runner, key)
            result = result.plus(StepResult(noise, result.loss, noise=noise))
        return result

    def extra(self, runner: BatchRunner, key: int) -> Tensor:
        """Run the passes of the noise that is added after the backward.

        Args:
            runner: Runs the user's step.
            key: Seed of the batch's noise, the one given to `run`.

        Returns:
            The scaled scalar whose gradient is to be added.
        """
        assert self.noise is not None
        with attention_dropout(self.attention):
            if self.noise.source == "dropout":
                return self.noise_scale * self._difference(runner, key)
            return _Share(self.noise.estimation, noise=self.noise_scale).carry_out(runner, key, False).total

    def _shares(self, step: int) -> list[_Share]:
        """Sort out which passes bring what; penalty and noise with equal settings come from the same ones."""
        shares: list[_Share] = []
        penalty, noise = self.penalty_at(step), self.noise
        if noise is not None and (noise.source == "dropout" or not self.noise_scale):
            noise = None
        if penalty is not None:
            strength = penalty.strength * penalty.every_n_steps
            share = _Share(penalty.estimation, penalty.curvature, penalty=strength)
            if noise is not None and noise.estimation == penalty.estimation:
                if self.noise_in_loss:
                    share = replace(share, noise=self.noise_scale)
                elif not noise.estimation.low_memory:
                    share = replace(share, later=self.noise_scale)
                noise = None
            shares.append(share)
        if noise is not None and self.noise_in_loss:
            shares.append(_Share(noise.estimation, noise=self.noise_scale))
        # the first estimate on the whole batch gives the loss as well
        shares.sort(key=lambda share: share.estimation.batch_fraction is not None)
        if shares and shares[0].estimation.batch_fraction is None:
            shares[0] = replace(shares[0], has_loss=True)
        return shares

    def _dropout_k(self, runner: BatchRunner, key: int, k: int, measure_noise: bool) -> StepResult:
        # Section 3.1 with two of the k draws instead of two more. Adding a(g1 - g2) to the mean (1/k) sum g_j changes
        # the sum of squared coefficients, 1/k, by 2 a^2 and by a cross term 2a/k - 2a/k = 0: the covariance is that of
        # two more.
        correction = self.noise if self.noise_in_loss else None
        reused = [1, -1] if correction is not None and correction.source == "dropout" else []
        total, difference = _Sum(), _Sum()
        values = []
        for j in range(k):
            draw = run_pass(runner.whole, Drop(fold_key(key, j))).loss.reshape(())
            coefficient = self.noise_scale * reused[j] if j < len(reused) else 0.0
            parts = [(total, 1 / k + coefficient)]
            if coefficient and measure_noise:
                parts.append((difference, coefficient))
            elif coefficient:
                difference.add(draw.detach(), coefficient)  # just a number to be looked at
            self._add(runner, draw, parts)
            values.append(draw.detach())
        loss = torch.stack(values).mean()
        if correction is None or reused:
            return StepResult(total.scalar(), loss, noise=difference.scalar() if reused else None)
        noise = self.extra(runner, key)
        return StepResult(total.scalar() + noise, loss, noise=noise)

    def _add(self, runner: BatchRunner, draw: Tensor, parts: Sequence[tuple[_Sum, float]]) -> None:
        """Add one draw to sums; it is differentiated and its graph freed, if that is wanted and possible."""
        leaves = leaves_of(draw) if self.low_memory and runner.releases else None
        if leaves is not None:
            backpropagate(draw, leaves, [(part.released, weight) for part, weight in parts], runner.scaler)
            return
        for part, weight in parts:
            part.add(draw, weight)

    def _difference(self, runner: BatchRunner, key: int) -> Tensor:
        """Difference of the losses of two draws of dropout, the first two of `_dropout_k`."""
        first, second = (run_pass(runner.aside, Drop(fold_key(key, j))).loss for j in range(2))
        return first - second


class _Sum:
    """A weighted sum of scalars, of some of which (`released`) only values and gradients are left."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self.released = GradientSum()

    def add(self, value: Tensor, weight: float) -> None:
        self._alive.append(weight * value)

    def scalar(self) -> Tensor:
        parts = [*self._alive, self.released.scalar()] if self.released else self._alive
        return torch.stack(parts).sum()


@dataclass(frozen=True)
class _Share:
    """One set of passes and the weights with which its results go into the total; 0 for what it does not bring."""

    estimation: Estimation
    curvature: str | None = None
    penalty: float = 0.0
    noise: float = 0.0
    later: float = 0.0
    has_loss: bool = False

    def carry_out(self, runner: BatchRunner, key: int, measure_noise: bool) -> StepResult:
        """Run the passes.

        Args:
            runner: Runs the user's step.
            key: Seed of the batch's noise.
            measure_noise: Whether the gradient of the noise alone is wanted, too.

        Returns:
            This share's part of the total, and the values in it.
        """
        of_pairs = None if self.has_loss else self._of_pairs(runner, key)
        if of_pairs is not None:
            estimate, fraction = of_pairs
            return self._result(estimate, self._weigh(estimate, fraction, measure_noise), fraction)
        closure, fraction = runner.whole if self.has_loss else runner.aside, 1.0
        chosen = self.estimation
        if chosen.batch_fraction is not None:  # estimates of penalty and noise alone, on these rows
            closure, fraction = runner.rows(chosen.batch_fraction, chosen.batch_dim, fold_key(key, -1))
        spread = self._spread(fraction)

        def weigh(estimate: Estimate) -> list[Tensor]:
            return self._weigh(estimate, fraction, measure_noise)

        if chosen.low_memory and runner.releases:
            estimate, scalars = antithetic_in_turn(
                closure,
                closure if chosen.batch_fraction is not None else runner.aside,
                weigh,
                curvature=self.curvature,
                noise=spread != 0,
                step_size=chosen.step_size,
                mask=chosen.mask,
                key=key,
                scaler=runner.scaler,
            )
        else:
            estimate = ESTIMATORS[chosen.estimator](
                closure,
                curvature=self.curvature,
                noise=spread != 0,
                step_size=chosen.step_size,
                mask=chosen.mask,
                key=key,
            )
            scalars = weigh(estimate)
        return self._result(estimate, scalars, fraction)

    @property
    def may_be_one_pass(self) -> bool:
        """Whether `in_one_pass` may be tried."""
        chosen = self.estimation
        return chosen.batch_fraction is not None and chosen.estimator == "antithetic" and not chosen.low_memory

    def in_one_pass(self, runner: BatchRunner, key: int, measure_noise: bool) -> StepResult | None:
        """Do the same together with the loss, in one pass over the batch with some rows twice; None if that is no way.

        It takes ``1 + f`` times what the loss alone takes, if ``f`` is the fraction of the rows.

        Args:
            runner: Runs the user's step.
            key: Seed of the batch's noise.
            measure_noise: Whether the gradient of the noise alone is wanted, too.

        Returns:
            The loss, this share's part of the total, and the values in it.
        """
        chosen = self.estimation
        if not self.may_be_one_pass or chosen.batch_fraction is None:
            return None
        found = runner.paired(chosen.batch_fraction, chosen.batch_dim, fold_key(key, -1))
        if found is None:
            return None
        closure, layout, pairs = found
        returned: list[Tensor] = []

        def keeping() -> Tensor:
            returned.append(closure())
            return returned[0]

        try:
            estimate = self._one_pass(keeping, layout, pairs, key)
        except RowsNotFoundError:
            runner.forget()
            return None
        runner.counts_as(returned[0], estimate.loss)
        share = replace(self, has_loss=True)
        return share._result(estimate, share._weigh(estimate, pairs.fraction, measure_noise), pairs.fraction)

    def _of_pairs(self, runner: BatchRunner, key: int) -> tuple[Estimate, float] | None:
        """Estimate on some rows in one small pass instead of two; None if that is no way."""
        chosen = self.estimation
        if not self.may_be_one_pass or chosen.batch_fraction is None:
            return None
        found = runner.pairs(chosen.batch_fraction, chosen.batch_dim, fold_key(key, -1))
        if found is None:
            return None
        closure, layout, pairs, fraction = found
        try:
            return self._one_pass(closure, layout, pairs, key), fraction
        except RowsNotFoundError:
            return None

    def _one_pass(self, closure: Closure, layout: Layout, pairs: Pairs, key: int) -> Estimate:
        chosen = self.estimation
        return one_pass(
            closure,
            layout,
            pairs,
            curvature=self.curvature,
            noise=bool(self.noise or self.later),
            step_size=chosen.step_size,
            mask=chosen.mask,
            key=key,
        )

    def _spread(self, fraction: float) -> float:
        # the mean over a fraction f of the rows has 1/f times the covariance of the mean over all
        return math.sqrt(fraction) * (self.noise or self.later)

    def _weigh(self, estimate: Estimate, fraction: float, measure_noise: bool) -> list[Tensor]:
        """The scalar to differentiate, and the noise alone if that is to be measured."""
        scalars = [estimate.loss] if self.has_loss else []
        if estimate.penalty is not None:
            scalars.append(self.penalty * estimate.penalty)
        if estimate.noise is not None and self.noise:
            scalars.append(self._spread(fraction) * estimate.noise)
        total = sum(scalars[1:], scalars[0])
        return (
            [total] if estimate.noise is None or not measure_noise else [total, self._spread(fraction) * estimate.noise]
        )

    def _result(self, estimate: Estimate, scalars: list[Tensor], fraction: float) -> StepResult:
        noise = None if estimate.noise is None else self._spread(fraction) * estimate.noise
        if len(scalars) > 1:
            noise = scalars[1]
        return StepResult(
            scalars[0], estimate.loss, estimate.penalty, noise if self.noise else None, noise if self.later else None
        )


def _clean(runner: BatchRunner) -> StepResult:
    loss = run_pass(runner.whole, Off()).loss
    return StepResult(loss, loss)
