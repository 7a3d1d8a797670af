"""One training run of one module: the hooks that all the callbacks of a Trainer share.

The first of the package's callbacks in a Trainer leads; it makes the session, which wraps ``training_step``, and the
others add their settings to the session's plan.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_dropreg.errors import CompiledPartError, NoDropoutSiteError, UnsupportedRowsError
from lightning_dropreg.inspection.first_step import all_at_once, check_finite
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.numerics.context import patched
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.numerics.torch_private import keeping_donated_buffers
from lightning_dropreg.passes import Off, dormant_sites, run_pass
from lightning_dropreg.passes.batches import rereadable
from lightning_dropreg.passes.holders import Holders
from lightning_dropreg.session.arguments import StepCall
from lightning_dropreg.session.batch import Batch, SkippedError, loss_of, with_loss
from lightning_dropreg.session.choosing import warn_of_kinks, warn_of_line_search, warn_of_negative, warn_of_no_bound
from lightning_dropreg.session.looking import REFUSED, Looks
from lightning_dropreg.session.manual import ManualStep, joined
from lightning_dropreg.session.others import Detector, DropsLater, Search, callbacks_of
from lightning_dropreg.session.panel import is_wanted, panel, tell
from lightning_dropreg.session.parameters import TrainedParameters
from lightning_dropreg.session.position import Position
from lightning_dropreg.session.problems import module_problems, takes_iterator
from lightning_dropreg.session.stale import StaleGradients, acts_on_gradients
from lightning_dropreg.session.values import Values, norm_of
from lightning_dropreg.step.plan import BatchRunner, Plan, StepResult

__all__ = ["Session", "own_step"]


class Session:
    """Wraps a module's ``training_step`` for the length of one ``fit``.

    Args:
        trainer: The trainer that fits.
        module: The module that is fitted.
        plan: What to do with every batch.
        seed: Seed of all noise; from ``seed_everything`` if None.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, plan: Plan, seed: int | None) -> None:
        self.trainer = trainer
        self.module = module
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        if trainer.world_size > 1:  # without seed_everything every process has a seed of its own, and one is saved
            self.seed = trainer.strategy.broadcast(self.seed)
        scheduled = any(isinstance(callback, DropsLater) for callback in callbacks_of(trainer))
        # a schedule may hold all probabilities at 0 for a while
        self._dormant: Callable[[], AbstractContextManager[None]] = dormant_sites if scheduled else nullcontext
        self.looks = Looks(trainer, module, plan, self._dormant)
        self._wrapped = ExitStack()
        self._acted = False  # in the last step
        self._installed = False
        self._batch: Batch | None = None
        self._holders: Holders | None = None  # of the batch before
        self._late: list[tuple[Tensor, Tensor]] = []
        self._later: list[Tensor | None] | None = None
        self._told_negative = False
        self._detectors = [callback for callback in callbacks_of(trainer) if isinstance(callback, Detector)]
        self._gradient_norm: Tensor | None = None
        penalized = plan.strength_at(0) > 0
        self.values = Values(trainer, module, ["loss", "explicit_penalty"] if penalized else ["loss"])
        self._trained = TrainedParameters(trainer, module)
        self.stale = StaleGradients(trainer, module)
        self.position = Position(trainer)
        self.search = Search(trainer)

    @property
    def plan(self) -> Plan:
        """What is done with every batch, as far as the step allows it."""
        return self.looks.plan

    def check(self) -> None:
        """Refuse what makes it impossible to run the step; whatever else is wrong is told with the first step."""
        if takes_iterator(self.module):
            problems = module_problems(self.trainer, self.module, self.plan)
            raise all_at_once(problems, f"{type(self.module).__name__}{REFUSED}")

    def install(self) -> None:
        """Wrap ``training_step`` on the instance, until `remove`."""
        # a plain function bound to the module: a deepcopy of the module binds it to the copy, as weight averaging needs
        original = _function_of(self.module.training_step)
        session = self
        # what is compiled around the step (DDP, by a strategy) ends here
        run = torch.compiler.disable(self.training_step) if "torch._dynamo" in sys.modules else self.training_step

        @functools.wraps(original)
        def training_step(self: LightningModule, *args: Any, **kwargs: Any) -> Any:
            # a copy of the module, or a validation step that calls the training step, wants the user's own
            training = session.trainer.training and torch.is_grad_enabled()
            if self is not session.module or not session._installed or not training:
                return original(self, *args, **kwargs)
            return run(StepCall(partial(original, self), *rereadable((args, kwargs))))

        training_step._dropreg_original = original  # type: ignore[attr-defined]
        bound = types.MethodType(training_step, self.module)
        self._wrapped.enter_context(patched((self.module, "training_step", bound)))
        if self.looks.compiled.parts:  # the norm of the noise takes another backward
            self._wrapped.enter_context(keeping_donated_buffers())
        self._installed = True

    def remove(self) -> None:
        """Put back what was there."""
        self._installed = False
        self._wrapped.close()
        self._batch = self._later = None

    def begin_batch(self) -> None:
        """Expect the first ``training_step`` of a batch."""
        self.stale.begin_batch()
        self.position.begin_batch()

    def training_step(self, call: StepCall) -> Any:
        """Run the user's ``training_step`` as often as the plan asks; return its first output, with the total in it."""
        self.search.join()
        stale = self.stale.take()
        if not self.looks.inspected:
            self.looks.inspect(call)
            self._tell()
            warn_of_kinks(self.module, self.plan, self.looks.kinks, self.looks.choice)
            warn_of_line_search(self.trainer, self.plan)
            warn_of_no_bound(self.plan, watched=bool(self._detectors))
        if self.plan.untouched:
            return call.run()
        if not self.module.automatic_optimization:
            return self._manual_step(call)
        step = self.trainer.global_step
        if self.plan.only_drops_nothing(step):
            return self._step_without_dropout(call)
        try:
            while True:
                try:
                    return self._step_with_passes(call, stale)
                except CompiledPartError as problem:  # what its graph gave does not count
                    self.looks.compiled.parts[problem.part].surprised()
        except NoDropoutSiteError:  # by chance there is nothing to regularize in this one (layer drop, another task)
            return self._step_without_dropout(call)

    def _tell(self) -> None:
        """Say what was found and chosen: in a panel where a summary of the model is wanted, else in the log."""
        if self.looks.seen is None or self.plan.untouched or self.search.joined:
            return
        if is_wanted(self.trainer):
            tell(self.trainer, panel(self.plan, self.looks.seen, self.looks.choices))
            return
        for choice in self.looks.choices:
            rank_zero_info(f"lightning_dropreg: {choice}.")

    def _step_with_passes(self, call: StepCall, stale: Callable[[], None] | None) -> Any:
        """Run the user's step as the plan has it; raises `NoDropoutSiteError`, having left no trace, if it has none."""
        step = self.trainer.global_step
        self.looks.watch(step, call)
        if self.plan.noise_after_backward and acts_on_gradients(self.trainer, self.module):
            self.looks.plan = self.plan.with_noise_in_loss()  # the same gradient
        kind, pairable = self.looks.pairable(call)
        key = self.position.key(self.seed)
        batch = self._batch_of(call, self.plan.k is None, key, pairable=pairable, stale=stale)
        batch.shares_body = self.looks.shares_body
        if self.plan.noise_after_backward:
            batch.logs.remember()
        try:
            with self.looks.compiled.running(), batch.isolation, self._dormant(), self.looks.watched(batch):
                self._holders = batch.isolation.holders
                plan = self.plan.choosing("antithetic")  # which is open yet in a batch that the user's step skips
                try:
                    result = plan.run(batch, batch.key, step, measure_noise=self._measures_noise())
                except (CompiledPartError, NoDropoutSiteError, UnsupportedRowsError):
                    batch.forget()
                    raise
                self._check_finite(batch, result)
        except SkippedError:
            batch.logs.replay()
            return None
        except UnsupportedRowsError as problem:
            if not self.looks.may_go_its_own_way:
                raise
            self.looks.take_whole_batches(problem)
            return self._step_with_passes(call, stale)
        batch.logs.replay(batch.corrected, batch.share)
        self._late = batch.late
        if pairable is not None and batch.pairable is None:
            self.looks.pairs_failed(kind)
        self.values.add(self._values(result), always=True)
        self._acted = True
        self._show(result)
        if result.later is not None:
            self._later = self._trained.gradients(result.later, retain_graph=True)
        elif self.plan.noise_after_backward:
            self._batch = batch  # its state before the step is what the noise's own passes start from
            batch.stale = None  # then the gradients are those of this step
        return with_loss(batch.output, result.total)

    def _batch_of(self, call: StepCall, mean: bool, key: int, **own: Any) -> Batch:
        return Batch(
            *call,
            self.module,
            mean=mean,
            key=key,
            copies=self.looks.copies,
            reach=self.looks.found_in_reach,
            counting=self.looks.counting,
            releases=self.looks.whole_parameters,
            scaler=self._trained.scaler,
            before=self._holders,
            **own,
        )

    def _step_without_dropout(self, call: StepCall) -> Any:
        """Run the user's step once: a single run needs neither isolation nor anything put back."""
        output = None

        def closure() -> Tensor:
            nonlocal output
            output = call.run()
            return loss_of(output)

        try:
            with self.looks.compiled.running(), attention_dropout(self.plan.attention), self._dormant():
                loss = run_pass(closure, Off(), need_sites=False).loss
        except SkippedError:
            return None
        self.values.add({"loss": loss.detach()})
        self._acted = False
        if self.plan.noise_after_backward and self.trainer.world_size > 1:
            self._later = self._trained.no_gradients()  # the others may have noise, and take its mean over all
        return output

    def _manual_step(self, call: StepCall) -> Any:
        # optimizer steps are the user's to count here, so the penalty acts in every n-th batch
        number = self.trainer.fit_loop.total_batch_idx
        self.looks.watch(number, call)
        key = fold_key(self.seed, self.trainer.global_rank, number, 0)
        batch = self._batch_of(call, False, key)
        values: list[dict[str, Tensor]] = []

        def watch(runner: BatchRunner, result: StepResult) -> None:
            self._check_finite(runner, result)
            values.append(self._values(result))

        with self.looks.compiled.running(), batch.isolation:
            manual = ManualStep(batch, self.trainer, self.looks.habits)
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
            without_trace = batch.isolation.without_trace()
            with self.looks.compiled.running(), self._dormant(), without_trace, context, torch.enable_grad():
                scalar = self.plan.extra(batch, batch.key)
            gradients = self._trained.gradients(scalar)
        if gradients is None:
            return
        self._show_noise(gradients)
        self.values.log({"noise_norm": self._trained.add(gradients)}, always=True)

    def end_batch(self) -> None:
        """Write what had to wait until no graph of the batch was left."""
        for buffer, change in self._late:
            buffer.detach().add_(change)  # others may have written to it since
        self._late = []

    def _due(self) -> list[Detector]:
        if self.search.joined:  # which goes to where training diverges
            return []
        return [detector for detector in self._detectors if detector.due(self.trainer.global_step)]

    def _measures_noise(self) -> bool:
        return self.looks.whole_parameters and (self.values.in_logging_step or bool(self._due()))

    def _show(self, result: StepResult) -> None:
        """Let the detectors see penalty, loss, noise and gradient of a step that they check."""
        detectors = self._due()
        strength = self.plan.strength_at(self.trainer.global_step)
        if strength and result.penalty is not None:
            for detector in detectors:
                detector.see_penalty(strength * result.penalty, result.loss)
        if not detectors or not self.plan.noise_scale or not self.looks.whole_parameters:
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

    def _check_finite(self, batch: BatchRunner, result: StepResult) -> None:
        where = f"optimizer step {self.trainer.global_step}, epoch {self.trainer.current_epoch}"
        if not self._told_negative and (result.loss.device.type == "cpu" or self.values.in_logging_step):
            self._told_negative = warn_of_negative(self.plan, result, where)  # elsewhere reading would wait for a GPU
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # an overflow in half precision is the scaler's to skip
        values = {"explicit penalty": result.penalty, "implicit noise": result.noise}
        check_finite(values, batch.run_without_trace, where)

    def _values(self, result: StepResult) -> dict[str, Tensor]:
        values = {"loss": result.loss.detach()}
        if result.penalty is not None:
            values["explicit_penalty"] = result.penalty.detach()
        # one more backward, so only where somebody reads it
        noise = result.noise if self.looks.whole_parameters and self.values.in_logging_step else None
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
    method = getattr(method, "_torchdynamo_orig_callable", method)  # only `forward` of a compiled module stays so
    if inspect.ismethod(method):
        return method.__func__
    return functools.wraps(method)(lambda _, *args, **kwargs: method(*args, **kwargs))
