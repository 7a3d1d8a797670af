"""The estimator and the rows that a fit takes where the choice was left to it, and warnings of what is not ideal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_dropreg.errors import DropregError, KinkedNetworkWarning, NoisySearchWarning, UnboundedPenaltyWarning
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.estimators.curvature import FULL, UNBOUNDED
from lightning_dropreg.inspection.choice import Choice, FractionChoice, choose_estimator, short, too_small
from lightning_dropreg.inspection.kinks import EXCESS, OF_CURVATURE, REMEDY, WIDE_STEP, told
from lightning_dropreg.passes import Closure, Pass
from lightning_dropreg.session.batch import Batch
from lightning_dropreg.session.problems import compiled_problems, is_line_search, module_problems
from lightning_dropreg.step.pass_group import StepResult
from lightning_dropreg.step.plan import Estimation, Plan
from lightning_dropreg.step.settings import AUTO_FRACTION

__all__ = ["choose", "choose_fraction", "warn_of_kinks", "warn_of_line_search", "warn_of_negative", "warn_of_no_bound"]

ROUNDING = 1e-4
"""So much of the loss may a penalty lie below zero without meaning it."""


def choose(trainer: Trainer, module: LightningModule, plan: Plan, run_without_trace: Closure, seen: Pass) -> Choice:
    """Choose the estimator of a plan that leaves it open."""
    measured = plan.choosing("antithetic").noise_of_finite_steps
    # measured on ReLU networks, a penalty of finite steps regularizes as that of forward mode does, and only with it do
    # rows share the pass of the loss
    if seen.kinks and measured is None and plan.curvature != FULL and (plan.has_open_fraction or plan.on_rows):
        return Choice("antithetic", "kinks do not disturb a penalty of finite steps, and with these rows share a pass")
    estimation = measured or Estimation(AUTO, 0.1, "as_model", None, 0)

    def refused(estimator: str) -> list[DropregError]:
        chosen = plan.choosing(estimator)
        return [*module_problems(trainer, module, chosen), *compiled_problems(module, chosen)]

    return choose_estimator(
        run_without_trace,
        seen.kinks,
        refused=refused,
        noise_of=[] if measured is None else [p for p in module.parameters() if p.requires_grad],
        step_size=estimation.step_size,
        mask=estimation.mask,
    )


def choose_fraction(
    batch: Batch,
    plan: Plan,
    seen: Pass,
    *,
    alone: bool,
    check: Callable[[Plan], Sequence[DropregError]],
    pairable: Callable[[Plan], bool],
) -> FractionChoice:
    """Choose on how many rows a plan estimates that leaves it open: a quarter in the one pass, or all.

    Fewer rows in passes of their own are no choice: a recurrent network takes as many steps in time for two rows as for
    twenty, and forward mode twice as long for every operation, however small.

    Args:
        batch: The first batch, its isolation entered.
        plan: The plan, its estimator chosen.
        seen: What was seen in that step.
        alone: Whether this process may run other passes than the others.
        check: Looks at the rows that a plan estimates on, and says what is wrong.
        pairable: Tries whether rows may be in the batch twice, as a plan has it.

    Returns:
        The fraction, and why.
    """
    tried = plan.on_fraction(AUTO_FRACTION)
    chosen = tried.in_one_pass
    if chosen is None or tried.on_rows != tried.estimated_on:
        return FractionChoice(None, f"{_not_one_pass(tried)}, and fewer rows in passes of their own save little")
    if not batch.module.automatic_optimization:
        return FractionChoice(None, "the module optimizes by hand, and its step cannot run with rows in it twice")
    if not alone:
        return FractionChoice(None, "the processes must make the same passes (SyncBatchNorm or sharded parameters)")
    examples = sum(loss.outputs.shape[0] for loss in seen.losses)
    parameters = sum(p.numel() for p in batch.module.parameters() if p.requires_grad)
    against = too_small(batch.row_count(chosen.batch_dim), examples, parameters)
    against = against or next(map(str, check(tried)), "")
    if not against and not pairable(tried):
        against = "the step leaves other traces, or draws random numbers, with some rows in it twice"
    if against:
        return FractionChoice(None, short(against))
    return FractionChoice(AUTO_FRACTION, "some rows stand for all, and take part in the one pass over the batch")


def _not_one_pass(plan: Plan) -> str:
    """Why a plan on some rows is not one pass over the batch."""
    estimators = plan.estimators - {"antithetic"}
    if plan.k is not None:
        return "dropout is drawn in passes of its own"
    if estimators:
        return f"estimator {', '.join(sorted(estimators))} makes no finite steps, as the one pass over the batch does"
    if plan.on_rows != plan.estimated_on:
        return "penalty and noise are estimated in different ways"
    return "it cannot be done in the one pass over the batch (low_memory, or noise after the backward)"


def warn_of_kinks(module: nn.Module, plan: Plan, kinks: Mapping[str, int], choice: Choice | None) -> None:
    """Warn where the noise of a finite step is larger than ``xi_approx``, unless it was measured not to be."""
    found = f"{type(module).__name__} has kinks behind its dropout: {told(kinks)}."
    if kinks and plan.curvature_of_finite_steps is not None:
        rank_zero_warn(f"{found} {OF_CURVATURE}", category=KinkedNetworkWarning)
    estimation = plan.noise_of_finite_steps
    if not kinks or estimation is None or estimation.step_size >= WIDE_STEP:
        return
    excess = None if choice is None else choice.excess
    if excess is not None and excess <= EXCESS:
        return
    size = (
        "can be larger than xi_approx, the more so the smaller step and drop probability"
        if excess is None
        else f"is {excess:.2f} times as large as xi_approx on the first batch"
    )
    remedy = REMEDY if choice is None else f"({choice}.) A larger step_size (0.5 or 1) makes it smaller."
    rank_zero_warn(
        f"{found} There the noise of "
        f"ImplicitNoise(estimator='antithetic', step_size={estimation.step_size:g}) {size}. "
        f"{remedy} `dropreg inspect` measures it on your model.",
        category=KinkedNetworkWarning,
    )


def warn_of_line_search(trainer: Trainer, plan: Plan) -> None:
    """Warn where an optimizer takes the difference of two gradients for curvature, and noise is in each."""
    names = [type(o).__name__ for o in trainer.optimizers if is_line_search(o)]
    if not names or not (plan.noise_scale or (plan.k or 1) > 1 or plan.on_rows):
        return
    what = "noise" if plan.noise_scale else "dropout masks" if plan.k is not None else "a choice of rows"
    rank_zero_warn(
        f"{names[0]} compares the gradients of successive steps, and each has {what} of its own, which it takes for "
        "curvature. (Within a step all evaluations see the same.) Use SGD, Adam or their like, or "
        "ExplicitPenalty(batch_fraction=None) alone, whose estimates vary least.",
        category=NoisySearchWarning,
    )


def warn_of_negative(plan: Plan, result: StepResult, where: str) -> bool:
    """Warn of a penalty below zero by more than rounding, as of a loss that is not convex; tell if so."""
    penalty = result.penalty
    if penalty is None or plan.curvature == FULL or not penalty.item() < -ROUNDING * abs(result.loss.item()):
        return False
    rank_zero_warn(
        f"The explicit penalty is negative at {where}: {penalty.item():.3g} (loss: {result.loss.item():.3g}). "
        "A loss is not convex in the model's outputs (a focal loss, say), and where its second derivative is negative "
        "the penalty rewards being wrong with confidence. Use cross entropy, a small strength, or ImplicitNoise() "
        "alone; keep the best checkpoint and let lightning_dropreg.DivergenceDetector watch the run.",
        category=UnboundedPenaltyWarning,
    )
    return True


def warn_of_no_bound(plan: Plan, watched: bool) -> None:
    """Warn of a penalty that has no lower bound, unless somebody watches it."""
    if plan.curvature == FULL and not watched:
        rank_zero_warn(UNBOUNDED, category=UnboundedPenaltyWarning)
