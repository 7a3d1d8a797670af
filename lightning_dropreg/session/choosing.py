"""The estimator that a fit takes where the choice was left to the model, and warnings of one that is not ideal."""

from __future__ import annotations

from collections.abc import Mapping

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_dropreg.errors import DropregError, KinkedNetworkWarning, UnboundedPenaltyWarning
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.estimators.curvature import FULL, UNBOUNDED
from lightning_dropreg.inspection.choice import Choice, choose_estimator
from lightning_dropreg.inspection.kinks import EXCESS, OF_CURVATURE, REMEDY, WIDE_STEP
from lightning_dropreg.passes import Closure, Pass
from lightning_dropreg.session.compiled import compiled_problems
from lightning_dropreg.session.problems import module_problems
from lightning_dropreg.step.plan import Estimation, Plan

__all__ = ["choose", "warn_of_kinks", "warn_of_no_bound"]


def choose(trainer: Trainer, module: LightningModule, plan: Plan, aside: Closure, seen: Pass) -> Choice:
    """Choose the estimator of a plan that leaves it open.

    Args:
        trainer: The trainer that fits.
        module: The module that is fitted.
        plan: The plan.
        aside: Runs the step on the first batch, leaving no trace.
        seen: What was seen in that step.

    Returns:
        The estimator, and why.
    """
    measured = plan.choosing("antithetic").noise_of_finite_steps
    estimation = measured or Estimation(AUTO, 0.1, "as_model", None, 0)

    def refused(estimator: str) -> list[DropregError]:
        chosen = plan.choosing(estimator)
        return [*module_problems(trainer, module, chosen), *compiled_problems(module, seen.sites, chosen)]

    return choose_estimator(
        aside,
        seen.kinks,
        refused=refused,
        noise_of=[] if measured is None else [p for p in module.parameters() if p.requires_grad],
        step_size=estimation.step_size,
        mask=estimation.mask,
    )


def warn_of_kinks(module: nn.Module, plan: Plan, kinks: Mapping[str, int], choice: Choice | None) -> None:
    """Warn where the noise of a finite step is larger than ``xi_approx``, unless it was measured not to be."""
    if kinks and plan.curvature_of_finite_steps is not None:
        found = ", ".join(f"{name} ({count})" for name, count in kinks.items())
        text = f"{type(module).__name__} has kinks behind its dropout: {found}. {OF_CURVATURE}"
        rank_zero_warn(text, category=KinkedNetworkWarning)
    estimation = plan.noise_of_finite_steps
    if not kinks or estimation is None or estimation.step_size >= WIDE_STEP:
        return
    found = ", ".join(f"{name} ({count})" for name, count in kinks.items())
    excess = None if choice is None else choice.excess
    if excess is not None and excess <= EXCESS:
        return
    size = (
        "can be larger than xi_approx (1.4 to 3.7 times in ReLU networks, with step_size=0.1 and drop "
        "probabilities from 0.5 down to 0.1)"
        if excess is None
        else f"is {excess:.2f} times as large as xi_approx on the first batch"
    )
    remedy = REMEDY if choice is None else f"({choice}.) A larger step_size (0.5 or 1) makes it smaller."
    rank_zero_warn(
        f"{type(module).__name__} has kinks behind its dropout: {found}. There the noise of "
        f"ImplicitNoise(estimator='antithetic', step_size={estimation.step_size:g}) {size}. "
        f"{remedy} `dropreg inspect` measures it on your model.",
        category=KinkedNetworkWarning,
    )


def warn_of_no_bound(plan: Plan, watched: bool) -> None:
    """Warn of a penalty that has no lower bound, unless somebody watches it."""
    if plan.curvature == FULL and not watched:
        rank_zero_warn(UNBOUNDED, category=UnboundedPenaltyWarning)
