"""What callbacks would find and do, without training: for `dropreg inspect`."""

from __future__ import annotations

import math

from lightning import LightningModule, Trainer

from lightning_dropreg.errors import DropregError, InvalidArgumentError
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.inspection.kinks import noise_excess
from lightning_dropreg.inspection.support import Support, find_support, gradient_norm
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.passes.compiled import uncompiled
from lightning_dropreg.session.arguments import StepCall
from lightning_dropreg.session.batch import SkippedError
from lightning_dropreg.session.problems import changed_parameters, fingerprints, module_problems
from lightning_dropreg.session.session import Session
from lightning_dropreg.step.plan import Plan

__all__ = ["NOISE_EXCESS", "look", "rehearse"]

NOISE_EXCESS = "noise over xi_approx"


def look(trainer: Trainer, module: LightningModule, call: StepCall) -> tuple[Support, list[DropregError]]:
    """Find what is in a step, and everything that stands in the way of any callback, without raising it."""
    batch = Session(trainer, module, Plan(), seed=0).looks.to_look_at(call)
    before = fingerprints(module)
    try:
        with batch.isolation, uncompiled():
            support = find_support(batch.run_without_trace)
    except SkippedError:
        raise InvalidArgumentError("The first training step has no loss.") from None
    problems = module_problems(trainer, module, Plan())
    return support, [*problems, *support.problems, *changed_parameters(module, before)]


def rehearse(
    trainer: Trainer, module: LightningModule, plan: Plan, call: StepCall, measured: list[Measured]
) -> tuple[dict[str, float], Plan, list[str]]:
    """Carry out a plan on a batch up to the gradient, leaving no trace.

    Args:
        trainer: The trainer, set up to fit.
        module: The module.
        plan: The plan.
        call: The module's ``training_step`` and a batch.
        measured: Filled with what was measured of the assumptions, also where the plan is refused.

    Returns:
        Loss, penalty and norm of the gradient; for noise of finite steps, how many times the norm of ``xi_approx`` it
        has, where that can be measured. The plan with what was chosen for this step, and what that is, in words.
    """
    session = Session(trainer, module, plan, seed=0)
    session.looks.measured = measured
    session.looks.inspect(call)
    if plan.untouched:
        return {}, plan, []
    if session.plan.in_one_pass is not None:
        paired = session.looks.pairable(call)[1] is not None
        told = "one pass with rows twice gives the same" if paired else "drawn rows get passes of their own"
        measured.append(Measured("pairable", outcome="holds" if paired else "fallback", note=told))
    batch = session.looks.to_look_at(call)
    batch.lasting = False
    with session.looks.compiled.running(), batch.isolation:
        result = session.plan.run(batch, 0, 0)
        total = result.total
        if result.later is not None:
            total = total + result.later
        elif plan.noise_after_backward:
            total = total + session.plan.extra(batch, 0)
        values = {"loss": result.loss.item(), "norm of the gradient": gradient_norm(total)}
        if result.penalty is not None:
            values = {"explicit penalty": result.penalty.item(), **values}
        parts = session.looks.compiled.parts.values()
        if parts:
            outcome = "holds" if all(part.runs_compiled for part in parts) else "fallback"
            measured.append(Measured("compiled", outcome=outcome, note=" ".join(part.told() for part in parts)))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        told = f"not finite: {', '.join(bad)}" if bad else f"finite: {', '.join(values)}"
        measured.append(Measured("finite", float(len(bad)), 0.0, "warning" if bad else "holds", told))
        estimation = session.plan.noise_of_finite_steps
        if estimation is not None:
            with attention_dropout(plan.attention):
                trained = [p for p in module.parameters() if p.requires_grad]
                excess = noise_excess(
                    batch.run_without_trace, trained, step_size=estimation.step_size, mask=estimation.mask
                )
            values |= {} if excess is None else {NOISE_EXCESS: excess}
    return values, session.plan, session.looks.choices
