"""One training run of one module: the hooks that all the callbacks of a Trainer share.

The first of the package's callbacks in a Trainer leads; it makes the session, which wraps ``training_step``, and the
others add their settings to the session's plan.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dropreg.errors import (
    DropregError,
    NoDropoutSiteError,
    UnsupportedRowsError,
)
from lightning_dropreg.estimators.counts import Counting
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.estimators.precision import bfloat16_step_size
from lightning_dropreg.inspection.assumptions import Measured, is_due
from lightning_dropreg.inspection.at_rest import naming_what_rests
from lightning_dropreg.inspection.choice import Choice
from lightning_dropreg.inspection.derivatives import compare_derivatives, measure_targets
from lightning_dropreg.inspection.first_step import all_at_once, check_finite, check_masks_of_rows, inspect_step
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Off, Pass, dormant_sites, is_dormant, run_pass
from lightning_dropreg.passes.last_site import shares_body
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.session.batch import Batch, Pairable, SkippedError, loss_of, with_loss
from lightning_dropreg.session.choosing import choose, warn_of_kinks, warn_of_no_bound
from lightning_dropreg.session.compiled import (
    as_compiled,
    compiled_parts,
    compiled_problems,
    keeping_buffers,
    uncompiled,
)
from lightning_dropreg.session.manual import ManualStep, joined
from lightning_dropreg.session.others import DropsLater, Watcher
from lightning_dropreg.session.pairable import find_pairable, signature, still_pairable
from lightning_dropreg.session.parameters import TrainedParameters
from lightning_dropreg.session.past import Habits
from lightning_dropreg.session.position import Position
from lightning_dropreg.session.problems import (
    changed_parameters,
    fingerprints,
    loss_problems,
    module_problems,
    takes_iterator,
)
from lightning_dropreg.session.ranks import has_whole_parameters
from lightning_dropreg.session.rows import RowsLook
from lightning_dropreg.session.searches import Search
from lightning_dropreg.session.stale import StaleGradients, acts_on_gradients
from lightning_dropreg.session.values import Values, norm_of
from lightning_dropreg.session.watching import measure_repeatability, measured_of, problems_of
from lightning_dropreg.step.plan import BatchRunner, Estimation, Plan, StepResult

__all__ = ["Session", "own_step"]

_CHOSEN = "estimator"
"""Under this name stands, in what was found, the estimator that was chosen."""
_WHOLE = "whole batches"
"""Under this name stands why batch_fraction was given up."""
_KINDS = 8
"""So many shapes of a batch are looked at; in batches of all others, drawn rows get passes of their own."""
_REFUSED = " cannot be trained with this package's callbacks and"


class Session:
    """Wraps a module's ``training_step`` for the length of one ``fit``.

    Args:
        trainer: The trainer that fits.
        module: The module that is fitted.
        plan: What to do with every batch.
        seed: Seed of all noise; from ``seed_everything`` if None.
    """

    looks_again = True
    """Whether the first batch is not the last that is looked at; `dropreg bench` measures the steps between."""

    def __init__(self, trainer: Trainer, module: LightningModule, plan: Plan, seed: int | None) -> None:
        self.trainer = trainer
        self.module = module
        self.plan = plan
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        if trainer.world_size > 1:  # without seed_everything every process has a seed of its own, and one is saved
            self.seed = trainer.strategy.broadcast(self.seed)
        scheduled = any(isinstance(callback, DropsLater) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        # a schedule may hold all probabilities at 0 for a while
        self._dormant: Callable[[], AbstractContextManager[None]] = dormant_sites if scheduled else nullcontext
        self._inspected = False
        self.measured: list[Measured] = []  # of what the plan assumes, before training
        self.kinks: dict[str, int] = {}
        self._copies = self._shares_body = False
        self._counting: Counting | None = None
        self._rows_are_due = False
        self.compiled = list(compiled_parts(module).values())
        self._compiling = ExitStack()
        self._acted = False  # in the last step
        # what the first step showed and a resumed run must not find otherwise, in plain values for the checkpoint
        self.found: dict[str, Any] = {}
        self._had_own_step = False
        self._own_step: Any = None
        self._installed = False
        self._batch: Batch | None = None
        self._late: list[tuple[Tensor, Tensor]] = []
        self._reach: Reach | None = None
        self._watched = 0
        self._later: list[Tensor | None] | None = None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._detectors = [callback for callback in callbacks if isinstance(callback, Watcher)]
        self._gradient_norm: Tensor | None = None
        penalized = plan.strength_at(0) > 0
        self.values = Values(trainer, module, ["loss", "explicit_penalty"] if penalized else ["loss"])
        # what FSDP2 shards has gradients only in the one backward of the whole
        self._whole_parameters = has_whole_parameters(trainer.strategy)
        self._trained = TrainedParameters(trainer, module)
        self.stale = StaleGradients(trainer, module)
        self.position = Position(trainer)
        self.search = Search(trainer)
        self._habits = Habits()
        # a rank that ran other passes than the rest would keep them waiting
        self._in_step_with_others = any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())

    def check(self) -> None:
        """Refuse what makes it impossible to run the step; whatever else is wrong is told with the first step.

        Raises:
            error: If the module is set up in such a way.
        """
        if takes_iterator(self.module):
            error = all_at_once(
                module_problems(self.trainer, self.module, self.plan), f"{type(self.module).__name__}{_REFUSED}"
            )
            raise error

    def install(self) -> None:
        """Wrap ``training_step`` on the instance."""
        if self._installed:
            return
        self._own_step = self.module.__dict__.get("training_step")
        self._had_own_step = "training_step" in self.module.__dict__
        # a plain function bound to the module: a deepcopy of the module binds it to the copy, as weight averaging needs
        original = _function_of(self.module.training_step)
        session = self

        @functools.wraps(original)
        def training_step(self: LightningModule, *args: Any, **kwargs: Any) -> Any:
            # a copy of the module, or a validation step that calls the training step, wants the user's own
            training = session.trainer.training and torch.is_grad_enabled()
            if self is not session.module or not session._installed or not training:
                return original(self, *args, **kwargs)
            return session.training_step(partial(original, self), args, kwargs)

        training_step._dropreg_original = original  # type: ignore[attr-defined]
        self.module.__dict__["training_step"] = types.MethodType(training_step, self.module)
        self._installed = True
        if self.compiled:
            self._compiling.enter_context(keeping_buffers())

    def remove(self) -> None:
        """Put back what was there."""
        if not self._installed:
            return
        if self._had_own_step:
            self.module.__dict__["training_step"] = self._own_step
        else:
            self.module.__dict__.pop("training_step", None)
        self._installed = False
        self._compiling.close()
        self._batch = self._later = None

    def begin_batch(self) -> None:
        """Expect the first ``training_step`` of a batch."""
        self.stale.begin_batch()
        self.position.begin_batch()

    def training_step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the user's ``training_step`` as often as the plan asks and return one output.

        Args:
            original: The user's step.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            The output of its first run, with the total loss in it; None if the user's step returned None.
        """
        self.search.join()
        stale = self.stale.take()
        if not self._inspected:
            self.inspect(original, args, kwargs)
            warn_of_kinks(self.module, self.plan, self.kinks, self.choice)
            warn_of_no_bound(self.plan, watched=bool(self._detectors))
        if self.plan.untouched:
            return original(*args, **kwargs)
        if not self.module.automatic_optimization:
            return self._manual_step(original, args, kwargs)
        step = self.trainer.global_step
        if self.plan.only_drops_nothing(step):
            return self._step_without_dropout(original, args, kwargs)
        try:
            return self._step_with_passes(original, args, kwargs, stale)
        except NoDropoutSiteError:  # by chance there is nothing to regularize in this one (layer drop, another task)
            return self._step_without_dropout(original, args, kwargs)

    def _step_with_passes(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stale: Callable[[], None] | None,
    ) -> Any:
        """Run the user's step as the plan has it; raises `NoDropoutSiteError`, having left no trace, if it has none."""
        step = self.trainer.global_step
        self._watch(step, original, args, kwargs)
        if self.plan.noise_after_backward and acts_on_gradients(self.trainer, self.module):
            self.plan = self.plan.with_noise_in_loss()  # the same gradient
        kind, pairable = self._pairable(original, args, kwargs)
        batch = Batch(
            original,
            args,
            kwargs,
            self.module,
            mean=self.plan.k is None,
            key=self.position.key(self.seed),
            copies=self._copies,
            reach=self._reach,
            counting=self._counting,
            releases=self._whole_parameters,
            scaler=self._trained.scaler,
            pairable=pairable,
            stale=stale,
        )
        batch.shares_body = self._shares_body
        if self.plan.noise_after_backward:
            batch.logs.remember()
        try:
            with as_compiled(self.compiled), batch.isolation, self._dormant():
                plan = self.plan.choosing("antithetic")  # which is open yet in a batch that the user's step skips
                try:
                    result = plan.run(batch, batch.key, step, measure_noise=self._measures_noise())
                except (NoDropoutSiteError, UnsupportedRowsError):
                    batch.forget()
                    raise
                self._check_finite(batch, result)
        except SkippedError:
            batch.logs.replay()
            return None
        except UnsupportedRowsError as problem:
            if self._in_step_with_others or not self._whole_parameters:
                raise
            self._take_whole_batches(problem)
            return self._step_with_passes(original, args, kwargs, stale)
        batch.logs.replay(batch.corrected, batch.share)
        self._late = batch.late
        if pairable is not None and batch.pairable is None:
            self.found[kind] = None  # one of these batches was otherwise
            self._rows_are_due = True
        self.values.add(self._values(result), always=True)
        self._acted = True
        self._show(result)
        if result.later is not None:
            self._later = self._trained.gradients(result.later, retain_graph=True)
        elif self.plan.noise_after_backward:
            self._batch = batch  # its state before the step is what the noise's own passes start from
            batch.stale = None  # then the gradients are those of this step
        return with_loss(batch.output, result.total)

    def _step_without_dropout(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the user's step once: a single run needs neither isolation nor anything put back."""
        output = None

        def closure() -> Tensor:
            nonlocal output
            output = original(*args, **kwargs)
            return loss_of(output)

        try:
            with as_compiled(self.compiled), attention_dropout(self.plan.attention), self._dormant():
                loss = run_pass(closure, Off(), need_sites=False).loss
        except SkippedError:
            return None
        self.values.add({"loss": loss.detach()})
        self._acted = False
        return output

    def _manual_step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # optimizer steps are the user's to count here, so the penalty acts in every n-th batch
        number = self.trainer.fit_loop.total_batch_idx
        self._watch(number, original, args, kwargs)
        key = fold_key(self.seed, self.trainer.global_rank, number, 0)
        batch = Batch(
            original,
            args,
            kwargs,
            self.module,
            mean=False,
            key=key,
            copies=self._copies,
            reach=self._reach,
            counting=self._counting,
            releases=True,  # module_problems has seen to the strategy
            scaler=self._trained.scaler,
        )
        values: list[dict[str, Tensor]] = []

        def watch(runner: BatchRunner, result: StepResult) -> None:
            self._check_finite(runner, result)
            values.append(self._values(result))

        with as_compiled(self.compiled), batch.isolation:
            manual = ManualStep(batch, self.trainer, self._habits)
            output = manual.run(self.plan, number, watch, self.values.in_logging_step)
        batch.logs.replay()
        self._acted = True
        self.values.add(joined(values), always=True)  # batches and optimizer steps are counted apart here
        return output

    def after_backward(self) -> None:
        """Add the noise to the gradients, where the plan says so; each rank draws its own."""
        batch, self._batch = self._batch, None
        gradients, self._later = self._later, None
        if batch is not None:
            context = self.trainer.precision_plugin.train_step_context()
            with as_compiled(self.compiled), self._dormant(), batch.isolation.aside(), context, torch.enable_grad():
                scalar = self.plan.extra(batch, batch.key)
            gradients = self._trained.gradients(scalar)
        if gradients is None:
            return
        self._show_noise(gradients)
        self.values.log({"noise_norm": self._trained.add(gradients)}, always=True)

    def end_batch(self) -> None:
        """Write what had to wait until no graph of the batch was left."""
        for buffer, mean in self._late:
            buffer.detach().copy_(mean)
        self._late = []

    def _due(self) -> list[Watcher]:
        if self.search.joined:  # which goes to where training diverges
            return []
        return [detector for detector in self._detectors if detector.due(self.trainer.global_step)]

    def _measures_noise(self) -> bool:
        return self._whole_parameters and (self.values.in_logging_step or bool(self._due()))

    def _show(self, result: StepResult) -> None:
        """Let the detectors see penalty, loss, noise and gradient of a step that they check."""
        detectors = self._due()
        strength = self.plan.strength_at(self.trainer.global_step)
        if strength and result.penalty is not None:
            for detector in detectors:
                detector.see_penalty(strength * result.penalty, result.loss)
        if not detectors or not self.plan.noise_scale or not self._whole_parameters:
            return
        # the noise that comes after the backward will be seen there
        plain = result.total if result.noise is None else result.total - result.noise
        self._gradient_norm = norm_of(self._trained.gradients(plain, retain_graph=True))
        if result.noise is not None:
            self._show_noise(self._trained.gradients(result.noise, retain_graph=True))

    def _show_noise(self, gradients: list[Tensor | None]) -> None:
        if self._gradient_norm is not None:
            for detector in self._due():
                detector.see_noise(norm_of(gradients), self._gradient_norm)
        self._gradient_norm = None

    def log_gradient_norm(self, optimizer: Optimizer) -> None:
        """Log the norm of the gradients with which the optimizer will step (before clipping)."""
        if not (self._acted or self.values.are_read):
            return
        norm = self._trained.norm_at(optimizer, anywhere=self.values.in_logging_step)
        if norm is not None:
            self.values.log({"grad_norm": norm}, always=True)

    def inspect(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the first step before anything is trained, leaving no trace."""
        name = f"{type(self.module).__name__}{_REFUSED}"
        batch = self.to_look_at(original, args, kwargs)
        problems: list[DropregError] = list(module_problems(self.trainer, self.module, self.plan))
        before = fingerprints(self.module)
        try:
            with batch.isolation, self._dormant(), attention_dropout(self.plan.attention), uncompiled():
                generators = self._reach.generators() if self._reach is not None else []
                seen, found = inspect_step(batch.aside, self.plan.needs_losses, generators=generators)
                found = [naming_what_rests(p, self.module) if isinstance(p, NoDropoutSiteError) else p for p in found]
                problems += loss_problems(self.trainer, self.module, seen.loss)
                seen.release()
                problems += compiled_problems(self.module, seen.sites, self.plan) + found
                if not (problems or self.plan.untouched) and self._reach is not None:
                    measured = measure_repeatability(batch, self._reach)
                    self.measured += measured
                    problems += problems_of(measured)
                if not problems:
                    problems += self._check_rows(batch, seen.sites)
                if not problems:
                    self._find_shared_body(batch)
                    problems += self._derivative_problems(batch, seen.sites)
        except SkippedError:
            if problems:
                raise all_at_once(problems, name) from None
            return  # nothing to see in this batch; look at the next one
        self._inspected = True
        self.kinks = seen.kinks
        self._copies = bool(batch.modified)
        if not self.plan.untouched:
            # a manual step may change them: they are put back
            changed = changed_parameters(self.module, before) if self.module.automatic_optimization else []
            problems += changed
            self.measured += measured_of(seen, changed)
        if problems:
            raise all_at_once(problems, name)
        if self.plan.has_choice:
            self._choose(batch, seen)
        if seen.in_bfloat16:
            self.plan = self.plan.with_step_size(lambda step_size: bfloat16_step_size(step_size, seen.sites))

    def _watch(self, step: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure again, now and then, whether the step can be repeated; the others were in its first batch."""
        if not (self.looks_again and is_due(step) and step != self._watched) and not self._rows_are_due:
            return
        self._watched, self._rows_are_due = step, False
        batch = self.to_look_at(original, args, kwargs)
        around = attention_dropout(self.plan.attention)
        try:
            with as_compiled(self.compiled), batch.isolation, self._dormant(), around:
                problems = problems_of(measure_repeatability(batch, self.reach(original), self._copies))
                self._shares_body = self._shares_body and shares_body(batch.aside)
                if not problems and self.plan.on_rows:
                    self._watch_rows(batch)
                    self._watch_pairs(batch)
        except SkippedError:
            return
        if problems:
            raise all_at_once(problems, f"{type(self.module).__name__}, in step {step},")

    def _choose(self, batch: Batch, seen: Pass) -> None:
        """Take an estimator where the choice was left to the model; a resumed run takes that of its checkpoint."""
        if _CHOSEN not in self.found:
            with as_compiled(self.compiled), batch.isolation, self._dormant(), attention_dropout(self.plan.attention):
                self.found[_CHOSEN] = asdict(choose(self.trainer, self.module, self.plan, batch.aside, seen))
        self.plan = self.plan.choosing(self.found[_CHOSEN]["estimator"])
        rank_zero_info(f"lightning_dropreg: {self.choice}.")

    @property
    def choice(self) -> Choice | None:
        """The estimator that was chosen for ``estimator="auto"``, and why; None before that, and where none was."""
        return Choice(**self.found[_CHOSEN]) if _CHOSEN in self.found else None

    def _pairable(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Pairable | None]:
        """Find out, for every new shape of a batch, whether estimates on some rows can be had in the pass of the whole.

        Returns:
            What describes the batch, and what was found for such batches.
        """
        chosen = self.plan.in_one_pass
        if chosen is None or chosen.batch_fraction is None or not self._whole_parameters or self._in_step_with_others:
            return "", None
        kind = self._kind(args[0], chosen)
        if kind not in self.found and len(self.found) < _KINDS:
            batch = self.to_look_at(original, args, kwargs)
            around = attention_dropout(self.plan.attention)
            with as_compiled(self.compiled), batch.isolation, self._dormant(), around:
                found = None
                if not is_dormant():
                    clean = self.plan.curvature == FULL
                    found = find_pairable(batch, chosen.batch_fraction, chosen.batch_dim, clean)
            self.found[kind] = None if found is None else found.plain()
        plain = self.found.get(kind)
        return kind, None if plain is None else Pairable.of(plain)

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
        clean = self.plan.curvature == FULL
        if not still_pairable(batch, Pairable.of(plain), chosen.batch_fraction, chosen.batch_dim, clean):
            self.found[kind] = None

    def _find_shared_body(self, batch: Batch) -> None:
        if self.plan.sites != "last" or is_dormant():
            return
        can = self.module.automatic_optimization and self._whole_parameters and not batch.modified
        self._shares_body = can and shares_body(batch.aside)
        told = "computed once for all draws" if self._shares_body else "computed again for every draw"
        self.measured.append(Measured("shared_body", outcome="holds" if self._shares_body else "fallback", note=told))

    def reach(self, original: Callable[..., Any]) -> Reach:
        """Look for what the step can reach; what was found stays until it is looked for again."""
        roots: dict[str, Any] = {"self": self.module, "training_step": original}
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            roots["datamodule"] = datamodule
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._reach = Reach(roots | {type(callback).__name__: callback for callback in callbacks})
        return self._reach

    def to_look_at(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """Return a batch whose step has a loss, however the module optimizes, to run it aside."""
        batch = Batch(original, args, kwargs, self.module, mean=False, key=0, copies=True, reach=self.reach(original))
        batch.counting = self._counting
        if self.module.automatic_optimization:
            return batch
        return batch.instead(ManualStep(batch, self.trainer, self._habits).rehearsed)

    def _check_rows(self, batch: Batch, sites: Sequence[Site]) -> list[DropregError]:
        """Find out whether some of the rows stand for all, and refuse noise that they share."""
        if _WHOLE in self.found:
            self.plan = self.plan.on_whole_batches()
        look = RowsLook.at(batch, self.plan)
        self.measured += look.measured
        if problems_of(look.measured):
            return look.problems
        self._counting = look.counting
        chosen = self.plan.noise.estimation if self.plan.noise is not None else None
        if chosen is not None and chosen.batch_fraction is not None:
            on_rows, rows = batch.rows(chosen.batch_fraction, chosen.batch_dim, 0)
            if rows.fraction < 1:
                check_masks_of_rows(sites, on_rows, chosen.mask)
        return []

    def _watch_rows(self, batch: Batch) -> None:
        """Look at the rows again; where some of them have stopped to stand for all, all are taken from then on."""
        look = RowsLook.at(batch, self.plan)
        if not look.problems:
            self._counting = look.counting
        elif self._in_step_with_others or not self._whole_parameters:
            raise look.problems[0]
        else:
            # this process alone: the others find out by themselves, and nothing waits for them, since the noise keeps
            # its way into the gradient
            self._take_whole_batches(look.problems[0])

    def _take_whole_batches(self, why: object) -> None:
        self.plan = self.plan.on_whole_batches()
        self.found[_WHOLE] = str(why)
        warnings.warn(  # by the process that found it
            f"From step {self.trainer.global_step} on, batch_fraction is given up and the whole batch is taken. {why}",
            stacklevel=2,
        )

    def _derivative_problems(self, batch: Batch, sites: Sequence[Site]) -> list[DropregError]:
        """Find out whether targets stand still and derivatives are those of the function."""
        names = [site.name for site in sites]
        found = [measure_targets(batch.aside)] if self.plan.needs_losses else []
        for estimator, curvature, mask in sorted(self.plan.followed, key=str):
            compared = compare_derivatives(batch.aside, estimator, curvature=curvature, mask=mask, names=names)
            found.append(compared.measured)
        self.measured += found
        return [each.problem for each in found if each.problem is not None]

    def _check_finite(self, batch: BatchRunner, result: StepResult) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # an overflow in half precision is the scaler's to skip
        where = f"optimizer step {self.trainer.global_step}, epoch {self.trainer.current_epoch}"
        check_finite({"explicit penalty": result.penalty, "implicit noise": result.noise}, batch.aside, where)

    def _values(self, result: StepResult) -> dict[str, Tensor]:
        values = {"loss": result.loss.detach()}
        if result.penalty is not None:
            values["explicit_penalty"] = result.penalty.detach()
        # one more backward, so only where somebody reads it
        noise = result.noise if self._whole_parameters and self.values.in_logging_step else None
        norm = None if noise is None else self._trained.norm_from(noise)
        if norm is not None:
            values["noise_norm"] = norm
        return values


def own_step(module: LightningModule) -> Callable[..., Any]:
    """Return the module's ``training_step`` as its author wrote it, also while a session has wrapped it."""
    original = getattr(module.training_step, "_dropreg_original", None)
    return module.training_step if original is None else types.MethodType(original, module)


def _function_of(method: Any) -> Callable[..., Any]:
    """The plain function behind a bound method; what is no method is called without the module."""
    if inspect.ismethod(method):
        return method.__func__
    return functools.wraps(method)(lambda _, *args, **kwargs: method(*args, **kwargs))
