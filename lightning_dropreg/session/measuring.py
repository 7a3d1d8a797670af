"""What is measured of a step before training, and again while it goes on: at steps 1, 2, 4, 8, …."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_dropreg.errors import DropregError, InvalidArgumentError, NotRepeatableError, WideStepWarning
from lightning_dropreg.estimators.counts import Counting, Rows
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.estimators.precision import bfloat16_step_size
from lightning_dropreg.estimators.rows import draw_rows
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.inspection.first_step import all_at_once
from lightning_dropreg.inspection.kinks import told
from lightning_dropreg.inspection.repeatable import Trace, compare_runs
from lightning_dropreg.inspection.rows import batch_norms, measure_rows
from lightning_dropreg.inspection.step_width import measure_step
from lightning_dropreg.interception.sites import Rule, Site
from lightning_dropreg.passes import Closure, Pass, Perturb, run_pass
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.passes.run import recounted
from lightning_dropreg.session.batch import Batch
from lightning_dropreg.step.plan import Plan
from lightning_dropreg.step.settings import Estimation

__all__ = [
    "Moving",
    "OwnRun",
    "for_bfloat16",
    "may_leave_traces",
    "measure_drawn_rows",
    "measure_repeatability",
    "measure_steps",
    "measured_of",
    "problems_of",
]


class OwnRun:
    """Sees the first pass that training makes over a batch, and makes it once more to see whether it is the same.

    That is half of what two runs beside training cost, and holds no more graphs than the pair that follows.

    Args:
        batch: The batch, its isolation entered.
        reach: What its step can reach.
        copied: Whether runs get copies of the batch's tensors in training.
        where: What to say of where problems were found.

    Attributes:
        is_done: Whether there was such a pass.
    """

    def __init__(self, batch: Batch, reach: Reach, copied: bool, where: str) -> None:
        self.is_done = False
        self._batch, self._reach, self._copied, self._where = batch, reach, copied, where

    def __call__(self, closure: Closure, rule: Rule, done: Pass) -> None:
        """See `lightning_dropreg.passes.run.Witness`.

        Raises:
            all_at_once: If the two are not the same.
        """
        batch = self._batch
        if self.is_done or closure != batch.whole or not isinstance(rule, Perturb):
            return
        self.is_done = True  # what follows are passes, too
        first = Trace.of(done, batch.isolation.outcome())
        again = rule.anew()

        def second() -> Trace:
            with recounted(None):
                return Trace.of(run_pass(batch.beside, again, record_losses=True), batch.isolation.outcome())

        found = measure_repeatability(batch, self._reach, self._copied, (lambda: first, second))
        problems = problems_of(found)
        if problems:  # now, before anything is made of passes that have nothing to do with one another
            raise all_at_once(problems, self._where)


def may_leave_traces(module: nn.Module, reach: Reach | None) -> bool:
    """Whether a run aside may move on what cannot be put back; a lazy module draws its weights in its first forward."""
    return bool(reach and reach.moving) or any(isinstance(part, LazyModuleMixin) for part in module.modules())


class Moving:
    """What a step can reach, cannot be put back, and may move on; where it was when this was made.

    Args:
        module: The module.
        step: Its step.
        reach: What that can reach, if it is known.
    """

    def __init__(self, module: nn.Module, step: Callable[..., Any] | None = None, reach: Reach | None = None) -> None:
        self._name = f"training_step of {type(module).__name__}"
        self._reach = Reach({"self": module, "training_step": step}) if reach is None else reach
        self._before = self._reach.positions()

    def problems(self) -> list[DropregError]:
        """Return the error that names what has moved on since, if anything has."""
        after = self._reach.positions()
        moved = [place for place, position in self._before.items() if after.get(place) != position]
        if not moved:
            return []
        text = (
            f"{self._name} moves on what cannot be put back: {', '.join(moved[:8])}. It runs several times for a "
            "batch, and would go through that so many times as fast. Fetch what is new in on_train_batch_start, or in "
            "the data loader, and let the step use it."
        )
        return [NotRepeatableError(text)]


def measure_repeatability(
    batch: Batch,
    reach: Reach,
    copied: bool | None = None,
    runs: Sequence[Callable[[], Trace]] = (),
) -> list[Measured]:
    """Find out whether the step of a batch can be repeated, and whether its batch is whole again.

    Args:
        batch: The batch, its isolation entered, with copies of its tensors for every run.
        reach: What its step can reach.
        copied: Whether runs get copies of the batch's tensors in training; None if that is found out here.
        runs: Make two runs; see `lightning_dropreg.inspection.repeatable.compare_runs`.

    Returns:
        What was found.
    """
    name = f"training_step of {type(batch.module).__name__}"
    drawn, moving = batch.isolation.drawn_generators(), Moving(batch.module, reach=reach)
    before = reach.insides()
    found = compare_runs(batch.run_without_trace, batch.isolation.outcome, name, reach.moving, drawn, runs)
    if found[0].problem is None:
        found[:1] = [Measured("repeatable", outcome="error", problem=p) for p in moving.problems()] or found[:1]
    inside = [place for place, content in reach.insides().items() if content != before[place]]
    if inside:
        told = (
            f"{name} changes what is inside the entries of {', '.join(inside)}. Containers of more than 256 entries "
            "are taken for data: only what is added to them or taken out is put back, and a step that runs several "
            "times for a batch changes their entries as often. Keep such numbers in a tensor, or change them in "
            "on_train_batch_end."
        )
        found.append(Measured("state_put_back", outcome="warning", note=told))
    written = [] if found[0].problem is not None else batch.isolation.note_what_is_still()
    if written:
        problem = NotRepeatableError(
            f"{name} writes to {', '.join(written)} past autograd (through .data, or a view in numpy), and when it was "
            "looked at before it did not, so that passes over a batch have shared it since. Write with torch's "
            "operations under torch.no_grad (tensor.copy_(...), tensor[i] = ...), which are seen at once."
        )
        found[0] = Measured("repeatable", outcome="error", problem=problem)
    if not batch.modified:
        found.append(Measured("whole_batch", note="unchanged by a run"))
    elif copied is False:
        problem = NotRepeatableError(
            f"{name} has changed {', '.join(batch.modified)} in place, past autograd, and in the first batch it did "
            "not, or every run would have got a copy. Change a copy of it."
        )
        found.append(Measured("whole_batch", outcome="error", problem=problem))
    else:
        note = f"changed in place, so every pass gets a copy: {', '.join(batch.modified)}"
        found.append(Measured("whole_batch", outcome="right value", note=note))
    return found


def measure_drawn_rows(batch: Batch, plan: Plan) -> tuple[Counting | None, list[Measured]]:
    """Find out whether the rows on which a plan estimates something stand for all.

    Returns:
        How the elements of some rows find what they count in the whole batch, None if no rows are drawn; and what was
        measured, up to the first problem.
    """
    counting: Counting | None = None
    measured: list[Measured] = []
    for dim, fraction in sorted(plan.on_rows):
        try:
            drawn, _ = draw_rows(batch.row_count(dim), fraction, dim, batch.key)
        except InvalidArgumentError as problem:
            return counting, [*measured, Measured("rows_found", outcome="error", problem=problem)]
        found = measure_rows(
            batch.run_without_trace,
            partial(batch.on_rows, dim=dim),
            Rows(drawn, batch.row_count(dim)),
            noise=plan.noise is not None or not plan.needs_losses,
            norms=batch_norms(batch.module),
            draws=batch.isolation.drew_randomness,
        )
        counting = found.counting
        measured += found.measured
        if found.problem is not None:
            break
    return counting, measured


def for_bfloat16(plan: Plan, sites: Sequence[Site]) -> Plan:
    """Return a plan with the steps that bfloat16 can see at some sites."""
    second = plan.curvature == FULL
    return plan.with_step_size(lambda step_size: bfloat16_step_size(step_size, sites, second))


def measure_steps(batch: Batch, plan: Plan, smooth: bool) -> list[Measured]:
    """Find out whether finite steps are small enough, and warn where they are not.

    Args:
        batch: The batch, its isolation entered.
        plan: What antithetic pairs estimate; those that hold one graph at a time are not looked at.
        smooth: Whether the network has no kinks.

    Returns:
        What was measured.
    """
    pairs: list[tuple[str | None, Estimation]] = []
    if plan.penalty is not None and plan.penalizes:
        pairs.append((plan.curvature, plan.penalty.estimation))
    noise = plan.noise_of_finite_steps
    if noise is not None and (not pairs or noise != pairs[0][1]):
        pairs.append((None, noise))
    measured = [
        measure_step(
            batch.run_without_trace,
            curvature=curvature,
            noise=chosen == noise,
            step_size=chosen.step_size,
            mask=chosen.mask,
            smooth=smooth,
        )
        for curvature, chosen in pairs
        if chosen.estimator == "antithetic" and not chosen.low_memory
    ]
    for each in measured:
        if each.outcome == "warning":
            rank_zero_warn(f"{type(batch.module).__name__}: {each.note}", category=WideStepWarning)
    return measured


def problems_of(found: Sequence[Measured]) -> list[DropregError]:
    """Say what is worth a warning, and return what must be raised."""
    for each in found:
        if each.outcome == "warning":
            rank_zero_warn(f"lightning_dropreg: {each.note}")
    return [each.problem for each in found if each.problem is not None]


def measured_of(seen: Pass, changed: Sequence[DropregError], logged: int) -> list[Measured]:
    """Say what the look at the first step has shown by the way."""
    kinks = told(seen.kinks)
    draws = "; ".join(seen.unknown)
    losses = ", ".join(loss.name for loss in seen.losses)
    found = [Measured("recognized_loss", float(len(seen.losses)), note=f"losses: {losses}")] if losses else []
    return [
        *found,
        Measured("known_dropout", float(len(seen.unknown)), 0.0, "warning", draws)
        if draws
        else Measured("known_dropout", 0.0, 0.0, note="no random numbers are drawn but by dropout"),
        Measured("logged_once", float(logged), note="values are logged in a run; held back, and logged once a batch"),
        Measured("reached_site", float(len(seen.sites)), note="dropout sites"),
        Measured("smooth", float(sum(seen.kinks.values())), 0.0, "warning" if kinks else "holds", kinks or "no kinks"),
        Measured("fixed_parameters", outcome="error", problem=changed[0])
        if changed
        else Measured("fixed_parameters", note="no parameter changed"),
    ]
