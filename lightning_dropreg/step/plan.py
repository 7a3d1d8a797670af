"""Which passes a batch needs, and how their results become one loss or one extra gradient.

| settings                        | gradient                                                               |
|---------------------------------|------------------------------------------------------------------------|
| ``k``                           | ``DROPOUT_k``, Algorithm 1                                             |
| ``k``, noise from ``"dropout"`` | section 3.1: ``+ sqrt(1/2 (1 - 1/k)) (grad l(eta_1) - grad l(eta_2))`` |
| ``k``, noise from ``"taylor"``  | Algorithm 4: ``+ sqrt(1 - 1/k) xi_approx``                             |
| noise alone                     | loss without dropout, ``+ xi_approx`` (or the true noise over sqrt 2)  |
| ``alpha``                       | R-Drop: two draws, and ``alpha`` times their symmetric divergence      |
| penalty                         | ``R_approx`` or an ablation of it, dropout off                         |
| penalty and noise               | Algorithm 2: dropout replaced altogether                               |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_dropreg.estimators import AUTO, two_draws
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Drop, draws_of_dropout, is_dormant, run_pass
from lightning_dropreg.passes.gradients import GradientSum, backpropagate, leaves_of
from lightning_dropreg.passes.last_site import draws_at_last_site
from lightning_dropreg.passes.run import recounted
from lightning_dropreg.step.pass_group import BatchRunner, PassGroup, StepResult, run_without_dropout
from lightning_dropreg.step.settings import Estimation, NoiseSettings, PenaltySettings

__all__ = ["BatchRunner", "Estimation", "NoiseSettings", "PenaltySettings", "Plan", "StepResult"]


@dataclass(frozen=True)
class Plan:
    """What to do with every batch.

    Attributes:
        k: Number of dropout draws, or None for no dropout.
        penalty: The penalty, or None.
        noise: The noise, or None.
        low_memory: Whether each of the k draws is differentiated before the next one is made.
        attention: What becomes of dropout on attention probabilities: ``"site"`` or ``"ignore"``.
        antithetic: Whether the draws come in antithetic pairs.
        sites: Where the draws differ: ``"all"`` or ``"last"``.
        alpha: Factor of the divergence between two draws (R-Drop), or None.
    """

    k: int | None = None
    penalty: PenaltySettings | None = None
    noise: NoiseSettings | None = None
    low_memory: bool = True
    attention: str = "site"
    antithetic: bool = False
    sites: str = "all"
    alpha: float | None = None

    def penalty_at(self, step: int) -> PenaltySettings | None:
        """Return the penalty if it acts in optimizer step `step`."""
        if self.penalty is None or self.penalty.strength == 0 or step % self.penalty.every_n_steps:
            return None
        return self.penalty

    @property
    def curvature(self) -> str | None:
        """Curvature of the penalty; None without one."""
        return None if self.penalty is None else self.penalty.curvature

    @property
    def needs_losses(self) -> bool:
        """Whether the losses of a step must be recognized."""
        return bool(self.alpha) or (self.penalizes and self.curvature != FULL)

    def strength_at(self, step: int) -> float:
        """Factor with which a penalty (or a divergence) enters the total of optimizer step `step`."""
        penalty = self.penalty_at(step)
        return self.alpha or 0.0 if penalty is None else penalty.strength * penalty.every_n_steps

    @cached_property
    def followed(self) -> set[tuple[str, str | None, str]]:
        """Whose derivatives are taken for those of the step: estimator, curvature (None for noise) and mask of each."""
        found: set[tuple[str, str | None, str]] = set()
        if self.penalty is not None and self.penalty.strength:
            found.add((self.penalty.estimation.estimator, self.penalty.curvature, self.penalty.estimation.mask))
        if self._estimated_noise is not None:
            found.add((self._estimated_noise.estimator, None, self._estimated_noise.mask))
        return {each for each in found if each[0] not in {"antithetic", AUTO}}

    @cached_property
    def penalizes(self) -> bool:
        """Whether the penalty acts at all; with strength 0 nothing has to be known of the loss."""
        return self.penalty is not None and self.penalty.strength > 0

    @cached_property
    def noise_scale(self) -> float:
        """Factor of the noise scalar; 0 without noise."""
        if self.noise is None:
            return 0.0
        missing = 1.0 if self.k is None else 1.0 - 1.0 / self.k  # of the covariance of DROPOUT_1
        spread = 0.5 if self.noise.source == "dropout" else 1.0  # a difference of two draws has twice the covariance
        return self.noise.strength * math.sqrt(spread * missing)

    @cached_property
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
        chosen = self.noise.estimation
        return chosen.batch_fraction is None or chosen.may_be_one_pass  # its own passes give the loss too

    @property
    def noise_of_finite_steps(self) -> Estimation | None:
        """How the noise is estimated, if that is by a finite step, which kinks of the network disturb."""
        chosen = self._estimated_noise
        return chosen if chosen is not None and chosen.estimator == "antithetic" else None

    @property
    def curvature_of_finite_steps(self) -> Estimation | None:
        """How the second derivative of the loss is estimated, if by finite steps: kinks make its gradient wild."""
        if self.penalty is None or self.curvature != FULL or self.penalty.estimation.estimator != "antithetic":
            return None
        return self.penalty.estimation

    @cached_property
    def noise_after_backward(self) -> bool:
        """Whether the noise is added to the gradients after the backward pass."""
        return self.noise_scale != 0 and not self.noise_in_loss

    def holds_pair(self, step: int) -> bool:
        """Whether the first pass of optimizer step `step` is one of an antithetic pair with losses, held together."""
        first = None if self.k is not None or self.alpha is not None else next(iter(self._groups(step)), None)
        if first is None or not first.has_loss or first.curvature in {None, FULL}:
            return False
        return first.estimation.estimator == "antithetic" and not first.estimation.low_memory

    def with_noise_in_loss(self) -> Plan:
        """Return the plan with the noise in the one backward, where whatever acts on a gradient sees it once."""
        return self if self.noise is None else replace(self, noise=replace(self.noise, injection="loss"))

    @cached_property
    def untouched(self) -> bool:
        """Whether the plan leaves every step exactly as it is."""
        if self.k == 1:
            return self.attention == "site"
        return self.k is None and self.penalty is None and self.noise is None

    def only_drops_nothing(self, step: int) -> bool:
        """Whether optimizer step `step` is one pass without dropout and nothing else."""
        return self.k is None and not self.noise_scale and self.penalty_at(step) is None

    @cached_property
    def in_one_pass(self) -> Estimation | None:
        """How everything is estimated, if that is on some rows and may be done in the pass that gives the loss."""
        groups = [] if self.k is not None else self._groups(0)
        return groups[0].estimation if len(groups) == 1 and groups[0].estimation.may_be_one_pass else None

    @cached_property
    def estimators(self) -> set[str]:
        """Names of the estimators that the plan uses."""
        return {e.estimator for e in self._estimations()}

    def with_step_size(self, change: Callable[[float], float]) -> Plan:
        """Return the plan with all step sizes changed by `change`."""
        return self._changed(lambda chosen: replace(chosen, step_size=change(chosen.step_size)))

    @cached_property
    def has_choice(self) -> bool:
        """Whether an estimator is to be chosen yet."""
        return AUTO in self.estimators

    @property
    def has_open_fraction(self) -> bool:
        """Whether a fraction of the rows is to be chosen yet."""
        return any(e.fraction_is_open for e in self._estimations())

    def on_fraction(self, fraction: float | None) -> Plan:
        """Return the plan with `fraction` wherever it was left open."""

        def close(chosen: Estimation) -> Estimation:
            decided = replace(chosen, batch_fraction=fraction, fraction_is_open=False)
            return decided if chosen.fraction_is_open else chosen

        return self._changed(close)

    def on_whole_batches(self) -> Plan:
        """Return the plan with nothing estimated on some of the rows; the noise keeps its way into the gradient."""
        injection = "loss" if self.noise_in_loss else "after_backward"
        plan = replace(self, noise=self.noise and replace(self.noise, injection=injection))
        return plan._changed(lambda chosen: replace(chosen, batch_fraction=None))

    @property
    def estimated_on(self) -> set[tuple[int, float | None]]:
        """Dimensions and fractions of the rows on which anything is estimated."""
        return {(e.batch_dim, e.batch_fraction) for e in self._estimations()}

    @cached_property
    def on_rows(self) -> set[tuple[int, float]]:
        """The same of what is estimated on some of the rows."""
        return {(dim, fraction) for dim, fraction in self.estimated_on if fraction is not None}

    def choosing(self, estimator: str) -> Plan:
        """Return the plan with `estimator` wherever the choice was left open."""
        if not self.has_choice:
            return self
        return self._changed(lambda e: replace(e, estimator=estimator) if e.estimator == AUTO else e)

    def _changed(self, change: Callable[[Estimation], Estimation]) -> Plan:
        penalty, noise = self.penalty, self.noise
        return replace(
            self,
            penalty=penalty and replace(penalty, estimation=change(penalty.estimation)),
            noise=noise and replace(noise, estimation=change(noise.estimation)),
        )

    def _estimations(self) -> list[Estimation]:
        found = [self.penalty.estimation] if self.penalty is not None and self.penalizes else []
        return found if self._estimated_noise is None else [*found, self._estimated_noise]

    @cached_property
    def _estimated_noise(self) -> Estimation | None:
        """How ``xi_approx`` is estimated; None where there is none, or noise of dropout itself."""
        taylor = self.noise is not None and self.noise_scale and self.noise.source == "taylor"
        return self.noise.estimation if self.noise is not None and taylor else None

    def run(self, runner: BatchRunner, key: int, step: int, measure_noise: bool = False) -> StepResult:
        """Run the passes of one batch up to the backward; `measure_noise`: the noise alone is wanted, too."""
        # the first pass over the whole batch shows what its elements count, for passes over some rows
        noted = recounted(runner.counts.note) if self.on_rows else nullcontext()
        with attention_dropout(self.attention), noted:
            return self._run(runner, key, step, measure_noise)

    def _run(self, runner: BatchRunner, key: int, step: int, measure_noise: bool) -> StepResult:
        if self.alpha is not None:
            return self._r_drop(runner, key, self.alpha)
        if self.k is not None and self.sites == "last":
            return self._last_site(runner, key, self.k)
        if self.k is not None:
            return self._dropout_k(runner, key, self.k, measure_noise)
        groups = self._groups(step)
        result = groups[0].in_one_pass(runner, key, measure_noise) if len(groups) == 1 else None
        for group in groups if result is None else ():
            if result is None and not group.has_loss:
                result = run_without_dropout(runner)
            part = group.run(runner, key, measure_noise)
            result = part if result is None else result.plus(part)
        result = run_without_dropout(runner) if result is None else result
        if self.noise_in_loss and self.noise is not None and self.noise.source == "dropout":
            noise = self.noise_scale * self._difference(runner, key)
            result = result.plus(StepResult(noise, result.loss, noise=noise))
        return result

    def extra(self, runner: BatchRunner, key: int) -> Tensor:
        """Run the passes of the noise that is added after the backward; return the scaled scalar with that gradient."""
        assert self.noise is not None
        with attention_dropout(self.attention):
            if self.noise.source == "dropout":
                return self.noise_scale * self._difference(runner, key)
            return PassGroup(self.noise.estimation, noise=self.noise_scale).run(runner, key, False).total

    def _groups(self, step: int) -> list[PassGroup]:
        without, with_penalty = self._both_groups
        return without if self.penalty_at(step) is None else with_penalty

    @cached_property
    def _both_groups(self) -> tuple[list[PassGroup], list[PassGroup]]:
        """The groups of steps without and with the penalty."""
        return self._grouped(None), self._grouped(self.penalty)

    def _grouped(self, penalty: PenaltySettings | None) -> list[PassGroup]:
        """Sort out which passes bring what; penalty and noise with equal settings come from the same ones."""
        groups: list[PassGroup] = []
        noise = self._estimated_noise
        if penalty is not None:
            strength = penalty.strength * penalty.every_n_steps
            group = PassGroup(penalty.estimation, penalty.curvature, penalty=strength)
            if noise == penalty.estimation:
                if self.noise_in_loss:
                    group = replace(group, noise=self.noise_scale)
                elif not noise.low_memory:
                    group = replace(group, later=self.noise_scale)
                noise = None
            groups.append(group)
        if noise is not None and self.noise_in_loss:
            groups.append(PassGroup(noise, noise=self.noise_scale))
        # the first estimate on the whole batch gives the loss as well
        groups.sort(key=lambda group: group.estimation.batch_fraction is not None)
        if groups and groups[0].estimation.batch_fraction is None:
            groups[0] = replace(groups[0], has_loss=True)
        return groups

    def _dropout_k(self, runner: BatchRunner, key: int, k: int, measure_noise: bool) -> StepResult:
        # Section 3.1 with two of the k draws instead of two more. Adding a(g1 - g2) to the mean (1/k) sum g_j changes
        # the sum of squared coefficients, 1/k, by 2 a^2 and by a cross term 2a/k - 2a/k = 0: the covariance is that of
        # two more.
        correction = self.noise if self.noise_in_loss else None
        reused = [1, -1] if correction is not None and correction.source == "dropout" else []
        total, difference = _Sum(), _Sum()
        values = []
        for j, rule in enumerate(draws_of_dropout(key, k, self.antithetic)):
            done = run_pass(runner.whole, rule)
            if self.low_memory and runner.releases and not done.reads_gradients:
                runner.drop_stale_gradients()
            draw = done.loss.reshape(())
            del done
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

    def _last_site(self, runner: BatchRunner, key: int, k: int) -> StepResult:
        draws = draws_at_last_site(
            runner.whole, key=key, k=k, antithetic=self.antithetic, share=runner.shares_body and not is_dormant()
        )
        losses = [done.loss.reshape(()) for done in draws]
        loss = torch.stack(losses).mean()
        if self.noise_in_loss:  # the two differ in what the mean over k draws has too little of
            noise = self.noise_scale * (losses[0] - losses[1])
            return StepResult(loss + noise, loss, noise=noise)
        return StepResult(loss, loss)

    def _r_drop(self, runner: BatchRunner, key: int, alpha: float) -> StepResult:
        draws = two_draws(runner.whole, key=key)
        loss = (draws.first + draws.second) / 2
        total, noise = loss + alpha * draws.divergence, None
        if self.noise_in_loss and self.noise is not None:
            own = self.noise.source == "dropout"
            noise = self.noise_scale * (draws.first - draws.second) if own else self.extra(runner, key)
            total = total + noise
        return StepResult(total, loss, penalty=draws.divergence, noise=noise)

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
        first, second = (run_pass(runner.run_without_trace, Drop(fold_key(key, j))).loss for j in range(2))
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
