"""What is known of a user's step: found out with its first batch, before any training, and watched afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from torch import nn

from lightning_dropreg.errors import DropregError, NoDropoutSiteError
from lightning_dropreg.estimators.counts import Counting
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.inspection.assumptions import Measured, is_due
from lightning_dropreg.inspection.at_rest import naming_what_rests
from lightning_dropreg.inspection.choice import Choice, FractionChoice
from lightning_dropreg.inspection.derivatives import compare_derivatives, measure_targets
from lightning_dropreg.inspection.first_step import all_at_once, check_masks_of_rows, inspect_step
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Pass, is_dormant
from lightning_dropreg.passes.compiled import CompiledParts, uncompiled
from lightning_dropreg.passes.last_site import shares_body
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.passes.run import witnessed
from lightning_dropreg.session.arguments import StepCall
from lightning_dropreg.session.batch import Batch, Pairable, SkippedError
from lightning_dropreg.session.choosing import choose, choose_fraction
from lightning_dropreg.session.manual import ManualStep
from lightning_dropreg.session.measuring import (
    OwnRun,
    for_bfloat16,
    may_leave_traces,
    measure_drawn_rows,
    measure_repeatability,
    measure_steps,
    measured_of,
    problems_of,
)
from lightning_dropreg.session.others import callbacks_of
from lightning_dropreg.session.pairable import find_pairable, signature
from lightning_dropreg.session.past import Habits
from lightning_dropreg.session.problems import (
    changed_parameters,
    compiled_problems,
    fingerprints,
    loss_problems,
    module_problems,
)
from lightning_dropreg.session.ranks import has_whole_parameters
from lightning_dropreg.step.plan import Estimation, Plan

__all__ = ["REFUSED", "Looks"]

_CHOSEN = "estimator"
"""Under this name stands, in what was found, the estimator that was chosen."""
_FRACTION = "batch fraction"
"""Under this name stands what ``batch_fraction="auto"`` is."""
_WHOLE = "whole batches"
"""Under this name stands why batch_fraction was given up."""
_KINDS = 8
"""So many shapes of a batch are looked at; in batches of all others, drawn rows get passes of their own."""
REFUSED = " cannot be trained with this package's callbacks and"
"""What follows a module's name where something about it is refused."""


class Looks:
    """Looks at a module's step, and makes of the plan what the step allows.

    Attributes:
        plan: The plan as the step allows it.
        inspected: Whether there was a first look.
        measured: What was measured of what the plan assumes, before training.
        seen: What was seen in the first step, its graph gone; None before it.
        kinks: Operations with a kink behind a dropout site, and how often they were found.
        found: What the looks showed and a resumed run must not find otherwise, in plain values for the checkpoint.
        copies: Whether the step changes its batch, so that every pass needs a copy.
        shares_body: Whether what lies before the last site is the same for all draws.
        counting: How elements of some rows find what they count; None where no rows are drawn.
        compiled: The compiled parts of the module.
        whole_parameters: Whether parameters have gradients at any time (not with FSDP2, which shards them).
        in_step_with_others: Whether a process that ran other passes than the rest would keep them waiting.
        found_in_reach: What the step can reach; None before it was looked for.
    """

    again = True
    """Whether the first batch is not the last that is looked at; `dropreg bench` measures the steps between."""

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        plan: Plan,
        dormant: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.plan = plan
        self.inspected = False
        self.measured: list[Measured] = []
        self.kinks: dict[str, int] = {}
        self.seen: Pass | None = None
        self.found: dict[str, Any] = {}
        self.copies = self.shares_body = False
        self.counting: Counting | None = None
        self.compiled = CompiledParts(module)
        self.whole_parameters = has_whole_parameters(trainer.strategy)
        self.in_step_with_others = any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
        self.found_in_reach: Reach | None = None
        self.habits = Habits()
        self._dormant = dormant
        self._rows_are_due = False
        self._watched = 0
        self._shows = False  # whether the next step's own passes are looked at
        self._pairable: tuple[Any, Pairable | None] = None, None  # of the last batch, as found and as it is used

    @contextmanager
    def _leaving_no_trace(self, batch: Batch, around: AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Let the step of a batch be run to be looked at; compiled parts run as they do in training unless told."""
        around = self.compiled.running() if around is None else around
        with around, batch.isolation, self._dormant(), attention_dropout(self.plan.attention):
            yield

    @property
    def may_go_its_own_way(self) -> bool:
        """Whether this process may run other passes than the others."""
        return self.whole_parameters and not self.in_step_with_others

    def inspect(self, call: StepCall) -> None:
        """Look at the first step before anything is trained, leaving no trace."""
        name = f"{type(self.module).__name__}{REFUSED}"
        batch = self.to_look_at(call)
        if self.plan.untouched and may_leave_traces(self.module, self.found_in_reach):
            self.inspected = True  # the step is as it was
            return
        problems: list[DropregError] = list(module_problems(self.trainer, self.module, self.plan))
        # a manual step may change them: they are put back
        watched = self.module.automatic_optimization and not self.plan.untouched
        before = fingerprints(self.module) if watched else {}
        try:
            with self._leaving_no_trace(batch, uncompiled()):
                generators = self.found_in_reach.generators() if self.found_in_reach is not None else []
                seen, found = inspect_step(batch.run_without_trace, self.plan.needs_losses, generators=generators)
                found = [naming_what_rests(p, self.module) if isinstance(p, NoDropoutSiteError) else p for p in found]
                problems += loss_problems(self.trainer, self.module, seen.loss)
                changed = changed_parameters(self.module, before)
                told = measured_of(seen, changed, len(batch.logs.names()))
                seen.release()
                problems += [*changed, *compiled_problems(self.module, self.plan), *found]
                if not (problems or self.plan.untouched) and self.found_in_reach is not None:
                    measured = measure_repeatability(batch, self.found_in_reach)
                    self.measured += measured
                    problems += problems_of(measured)
                if not problems:
                    problems += self._check_rows(batch, seen.sites, self.plan)
                if not problems:
                    self._find_shared_body(batch)
                    problems += self._derivative_problems(batch, seen.sites)
        except SkippedError:
            if problems:
                raise all_at_once(problems, name) from None
            return  # nothing to see in this batch; look at the next one
        self.inspected, self.seen, self.kinks = True, seen, seen.kinks
        self.copies = bool(batch.modified)
        if not self.plan.untouched:
            self.measured += told
        if problems:
            raise all_at_once(problems, name)
        if self.plan.has_choice:
            self._choose(batch, seen)
        if self.plan.has_open_fraction:
            self._choose_fraction(batch, seen)
        if seen.in_bfloat16:
            self.plan = for_bfloat16(self.plan, seen.sites)
        elif self.whole_parameters:
            with self._leaving_no_trace(batch, uncompiled()):
                self.measured += measure_steps(batch, self.plan, smooth=not seen.kinks)

    def watch(self, step: int, call: StepCall) -> None:
        """Measure again, now and then, what was measured on the first batch; or leave it to the step to show it.

        All processes do the same, by the number of the step.

        Raises:
            all_at_once: If something is wrong.
        """
        if not self.again or not ((is_due(step) and step != self._watched) or self._rows_are_due):
            return
        self._watched, self._rows_are_due = step, False
        self._shows = self.plan.holds_pair(step) and self.module.automatic_optimization and self.may_go_its_own_way
        batch = self.to_look_at(call)
        if self._shows and not (self.plan.followed or self.plan.on_rows):
            return
        reach = self.found_in_reach
        assert reach is not None  # of this look
        try:
            with self._leaving_no_trace(batch):
                problems = [] if self._shows else problems_of(measure_repeatability(batch, reach, self.copies))
                problems = problems or self._derivative_problems(batch, again=True)
                self.shares_body = self.shares_body and shares_body(batch.run_without_trace)
                if not problems and self.plan.on_rows:
                    self._watch_rows(batch)
                    self._watch_pairs(batch)
        except SkippedError:
            return
        if problems:
            raise all_at_once(problems, f"{type(self.module).__name__}, in step {step},")

    @contextmanager
    def watched(self, batch: Batch) -> Iterator[None]:
        """Let a step's passes show, where that was left to them, that it can be repeated and its targets stand."""
        if not self._shows:
            yield
            return
        assert self.found_in_reach is not None
        run = OwnRun(batch, self.found_in_reach, self.copies, f"{type(self.module).__name__}, in step {self._watched},")
        batch.looked_at = False
        with witnessed(run):
            yield
        self._shows = not run.is_done  # a step without a dropout shows nothing: the next one does

    def _choose(self, batch: Batch, seen: Pass) -> None:
        """Take an estimator where the choice was left to the model; a resumed run takes that of its checkpoint."""
        if _CHOSEN not in self.found:
            with self._leaving_no_trace(batch):
                choice = choose(self.trainer, self.module, self.plan, batch.run_without_trace, seen)
            self.measured += [choice.compared] if choice.compared else []
            self.found[_CHOSEN] = asdict(replace(choice, compared=None))
        self.plan = self.plan.choosing(self.found[_CHOSEN]["estimator"])

    def _choose_fraction(self, batch: Batch, seen: Pass) -> None:
        """Take a part of the rows or all where the choice was left to the step, as `_choose` does."""
        with self._leaving_no_trace(batch):
            known = self.found.get(_FRACTION)
            self.found[_FRACTION] = known or asdict(
                choose_fraction(
                    batch,
                    self.plan,
                    seen,
                    alone=self.may_go_its_own_way,
                    check=partial(self._check_rows, batch, seen.sites),
                    pairable=partial(self._find_pairable, batch),
                )
            )
            self.plan = self.plan.on_fraction(self.found[_FRACTION]["fraction"])
            if known and self.plan.on_rows:  # a resumed run looks at its rows as one that was told the fraction does
                problems = self._check_rows(batch, seen.sites, self.plan)
                if problems:
                    raise problems[0]

    @property
    def fraction(self) -> FractionChoice | None:
        """What was chosen for ``batch_fraction="auto"``, and why; None as for `choice`."""
        return FractionChoice(**self.found[_FRACTION]) if _FRACTION in self.found else None

    @property
    def choice(self) -> Choice | None:
        """The estimator that was chosen for ``estimator="auto"``, and why; None before that, and where none was."""
        return Choice(**self.found[_CHOSEN]) if _CHOSEN in self.found else None

    @property
    def choices(self) -> list[str]:
        """What was chosen where the choice was left to the step, and why."""
        return [str(each) for each in (self.choice, self.fraction) if each is not None]

    def pairable(self, call: StepCall) -> tuple[str, Pairable | None]:
        """Say, for every shape of a batch, whether estimates on some rows can be had in the pass of the whole."""
        chosen = self.plan.in_one_pass
        if chosen is None or chosen.batch_fraction is None or not self.may_go_its_own_way:
            return "", None
        kind = self._kind(call.args[0], chosen)
        if kind not in self.found and len(self.found.keys() - {_CHOSEN, _FRACTION, _WHOLE}) < _KINDS:
            batch = self.to_look_at(call)
            with self._leaving_no_trace(batch):
                self._find_pairable(batch, self.plan)
        plain = self.found.get(kind)
        if plain is not self._pairable[0]:
            self._pairable = plain, None if plain is None else Pairable.of(plain)
        return kind, self._pairable[1]

    def _find_pairable(self, batch: Batch, plan: Plan) -> bool:
        """Try whether rows may be in the one pass over the batch twice, and note that for batches of its shape."""
        chosen, found = plan.in_one_pass, None
        assert chosen is not None
        assert chosen.batch_fraction is not None
        if not is_dormant():
            found = find_pairable(batch, chosen.batch_fraction, chosen.batch_dim, plan.curvature == FULL)
        self.found[self._kind(batch.arguments.batch, chosen)] = None if found is None else found.plain()
        return found is not None

    def _kind(self, batch: Any, chosen: Estimation) -> str:
        return signature(self.module, batch, chosen.batch_dim)

    def _watch_pairs(self, batch: Batch) -> None:
        """Try again whether rows may be in a batch twice."""
        chosen = self.plan.in_one_pass
        if chosen is None or chosen.batch_fraction is None:
            return
        kind = self._kind(batch.arguments.batch, chosen)
        plain = self.found.get(kind)
        if plain is None:
            return
        layout, clean = Pairable.of(plain).layout, self.plan.curvature == FULL
        if find_pairable(batch, chosen.batch_fraction, chosen.batch_dim, clean, layout) is None:
            self.found[kind] = None

    def _find_shared_body(self, batch: Batch) -> None:
        if self.plan.sites != "last" or is_dormant():
            return
        can = self.module.automatic_optimization and self.whole_parameters and not batch.modified
        self.shares_body = can and shares_body(batch.run_without_trace)
        told = "computed once for all draws" if self.shares_body else "computed again for every draw"
        self.measured.append(Measured("shared_body", outcome="holds" if self.shares_body else "fallback", note=told))

    def reach(self, original: Callable[..., Any]) -> Reach:
        """Look for what the step can reach; what was found stays until it is looked for again."""
        roots: dict[str, Any] = {"self": self.module, "training_step": original}
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            roots["datamodule"] = datamodule
        roots |= {type(each).__name__: each for each in callbacks_of(self.trainer)}
        self.found_in_reach = Reach(roots, self.found_in_reach)
        return self.found_in_reach

    def to_look_at(self, call: StepCall) -> Batch:
        """Return a batch whose step has a loss, however the module optimizes, to run it without trace."""
        batch = Batch(*call, self.module, mean=False, key=0, copies=True, reach=self.reach(call.step))
        batch.counting = self.counting
        if self.module.automatic_optimization:
            return batch
        return batch.instead(ManualStep(batch, self.trainer, self.habits).rehearsed)

    def _check_rows(self, batch: Batch, sites: Sequence[Site], plan: Plan) -> list[DropregError]:
        """Find out whether some of the rows stand for all, and refuse noise that they share."""
        if _WHOLE in self.found:
            plan = self.plan = self.plan.on_whole_batches()
        counting, measured = measure_drawn_rows(batch, plan)
        self.measured += measured
        if problems := problems_of(measured):
            return problems
        self.counting = counting
        chosen = plan.noise.estimation if plan.noise is not None else None
        if chosen is not None and chosen.batch_fraction is not None:
            on_rows, rows = batch.rows(chosen.batch_fraction, chosen.batch_dim, 0)
            if rows.fraction < 1:
                check_masks_of_rows(sites, on_rows, chosen.mask)
                note = "the masks of all sites are smaller on some of the rows"
                self.measured.append(Measured("own_masks", float(len(sites)), note=note))
        return []

    def _watch_rows(self, batch: Batch) -> None:
        """Look at the rows again; where some of them have stopped to stand for all, all are taken from then on."""
        counting, measured = measure_drawn_rows(batch, self.plan)
        problems = [each.problem for each in measured if each.problem is not None]
        if not problems:
            self.counting = counting
        elif not self.may_go_its_own_way:
            raise problems[0]
        else:
            # this process alone: the others find out by themselves, and nothing waits for them, since the noise keeps
            # its way into the gradient
            self.take_whole_batches(problems[0])

    def take_whole_batches(self, why: object) -> None:
        """Estimate nothing on some of the rows from now on, and say why."""
        self.plan = self.plan.on_whole_batches()
        self.found[_WHOLE] = str(why)
        warnings.warn(  # by the process that found it
            f"From step {self.trainer.global_step} on, batch_fraction is given up and the whole batch is taken. {why}",
            stacklevel=2,
        )

    def _derivative_problems(self, batch: Batch, sites: Sequence[Site] = (), again: bool = False) -> list[DropregError]:
        """Find out whether targets stand still and derivatives are those of the function; once more in little."""
        found = [measure_targets(batch.run_without_trace)] if self.plan.needs_losses and not self._shows else []
        compare = partial(compare_derivatives, batch.run_without_trace, again=again)
        for estimator, curvature, mask in sorted(self.plan.followed, key=str):
            found.append(compare(estimator, curvature=curvature, mask=mask, names=[s.name for s in sites]).measured)
        self.measured += [] if again else found
        problems = [each.problem for each in found if each.problem is not None]
        # later on a step may be without a dropout
        return [each for each in problems if not (again and isinstance(each, NoDropoutSiteError))]

    def pairs_failed(self, kind: str) -> None:
        """Note that one of the batches of a kind was otherwise; what else is known of rows is looked at again."""
        self.found[kind] = None
        self._rows_are_due = True
