"""Which passes a batch needs, and how their results become one loss or one extra gradient.

==============================================  ==================================================================
settings                                        gradient
==============================================  ==================================================================
``k``                                           ``DROPOUT_k``, Algorithm 1
``k``, noise from ``"dropout"``                 section 3.1: ``+ sqrt(1/2 (1 - 1/k)) (grad l(eta_1) - grad l(eta_2))``
``k``, noise from ``"taylor"``                  Algorithm 4: ``+ sqrt(1 - 1/k) xi_approx``
noise alone                                     loss without dropout, ``+ xi_approx`` (or the true noise over sqrt 2)
penalty                                         ``R_approx`` or an ablation of it, dropout off
penalty and noise                               Algorithm 2: dropout replaced altogether
==============================================  ==================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_dropreg.estimators import ESTIMATORS, Estimate
from lightning_dropreg.handlers.attention import attention_dropout
from lightning_dropreg.passes import Drop, Off, run_pass
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
    """

    estimator: str
    step_size: float
    mask: str
    batch_fraction: float | None
    batch_dim: int


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
        noise: The scaled noise scalar inside `total`, or None.
    """

    total: Tensor
    loss: Tensor
    penalty: Tensor | None = None
    noise: Tensor | None = None


class BatchRunner(Protocol):
    """Runs the user's step on one batch, any number of times."""

    def whole(self) -> Tensor:
        """Run on the whole batch; the run counts for module state and logs."""

    def aside(self) -> Tensor:
        """Run on the whole batch, leaving no trace."""

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Callable[[], Tensor], float]:
        """Return what runs on random rows, those of `key`, leaving no trace, and the fraction they really are."""


@dataclass(frozen=True)
class Plan:
    """What to do with every batch.

    Attributes:
        k: Number of dropout draws, or None for no dropout.
        penalty: The penalty, or None.
        noise: The noise, or None.
        attention: What becomes of dropout on attention probabilities: ``"site"`` or ``"ignore"``.
    """

    k: int | None = None
    penalty: PenaltySettings | None = None
    noise: NoiseSettings | None = None
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
    def noise_after_backward(self) -> bool:
        """Whether the noise is added to the gradients after the backward pass."""
        return self.noise_scale != 0 and not self.noise_in_loss

    @property
    def untouched(self) -> bool:
        """Whether the plan leaves every step exactly as it is."""
        if self.k == 1:
            return self.attention == "site"
        return self.k is None and self.penalty is None and self.noise is None

    def run(self, runner: BatchRunner, key: int, step: int) -> StepResult:
        """Run the passes of one batch up to the backward.

        Args:
            runner: Runs the user's step.
            key: Seed of the batch's noise.
            step: Number of the optimizer step.

        Returns:
            Total loss and its parts.
        """
        with attention_dropout(self.attention):
            return self._run(runner, key, step)

    def _run(self, runner: BatchRunner, key: int, step: int) -> StepResult:
        if self.k is not None:
            return self._dropout_k(runner, key, self.k)
        penalty = self.penalty_at(step)
        taylor_in_loss = self.noise_in_loss and self.noise is not None and self.noise.source == "taylor"
        wanted: list[Estimation] = [] if penalty is None else [penalty.estimation]
        if taylor_in_loss and self.noise is not None and self.noise.estimation not in wanted:
            wanted.append(self.noise.estimation)

        results: dict[Estimation, Estimate] = {}
        loss: Tensor | None = None
        for estimation in sorted(wanted, key=lambda e: e.batch_fraction is not None):
            curvature = penalty.curvature if penalty is not None and estimation == penalty.estimation else None
            noisy = taylor_in_loss and self.noise is not None and estimation == self.noise.estimation
            # the first estimate on the whole batch gives the loss as well
            counts = loss is None and estimation.batch_fraction is None
            results[estimation] = _estimate(runner, estimation, curvature, noisy, key, counts)
            if counts:
                loss = results[estimation].loss
        if loss is None:
            loss = run_pass(runner.whole, Off()).loss

        total, value, noise = loss, None, None
        if penalty is not None:
            value = results[penalty.estimation].penalty
            total = total + penalty.strength * penalty.every_n_steps * _known(value)
        if self.noise_in_loss:
            assert self.noise is not None
            scalar = results[self.noise.estimation].noise if taylor_in_loss else self._difference(runner, key)
            noise = self._scaled(_known(scalar))
            total = total + noise
        return StepResult(total, loss, value, noise)

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
                return self._scaled(self._difference(runner, key))
            return self._scaled(_known(_estimate(runner, self.noise.estimation, None, True, key, False).noise))

    def _scaled(self, scalar: Tensor) -> Tensor:
        return self.noise_scale * scalar

    def _dropout_k(self, runner: BatchRunner, key: int, k: int) -> StepResult:
        losses = [run_pass(runner.whole, Drop(fold_key(key, j))).loss for j in range(k)]
        loss = torch.stack([value.reshape(()) for value in losses]).mean()
        if not self.noise_in_loss or self.noise is None:
            return StepResult(loss, loss)
        if self.noise.source == "dropout":
            # Section 3.1 with two of the k draws instead of two more. Adding a(g1 - g2) to the mean (1/k) sum g_j
            # changes the sum of squared coefficients, 1/k, by 2 a^2 and by a cross term 2a/k - 2a/k = 0: the covariance
            # is that of two more.
            noise = self._scaled(losses[0] - losses[1])
        else:
            noise = self.extra(runner, key)
        return StepResult(loss + noise, loss, None, noise)

    def _difference(self, runner: BatchRunner, key: int) -> Tensor:
        """Difference of the losses of two draws of dropout, the first two of `_dropout_k`."""
        first, second = (run_pass(runner.aside, Drop(fold_key(key, j))).loss for j in range(2))
        return first - second


def _estimate(
    runner: BatchRunner, estimation: Estimation, curvature: str | None, noise: bool, key: int, counts: bool
) -> Estimate:
    closure, fraction = runner.whole if counts else runner.aside, 1.0
    if estimation.batch_fraction is not None:
        closure, fraction = runner.rows(estimation.batch_fraction, estimation.batch_dim, fold_key(key, -1))
    estimate = ESTIMATORS[estimation.estimator](
        closure, curvature=curvature, noise=noise, step_size=estimation.step_size, mask=estimation.mask, key=key
    )
    if estimate.noise is None:
        return estimate
    # the mean over a fraction f of the rows has 1/f times the covariance of the mean over all
    return replace(estimate, noise=math.sqrt(fraction) * estimate.noise)


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
