"""Manual optimization: a step that calls its own backward, and steps its own optimizers, once or several times.

The user's step runs once for real. When it calls ``self.manual_backward(loss)`` for the n-th time, the passes that the
plan wants of this loss are made by running the step again from its start up to that same call, as often as needed, and
what is back-propagated is the plan's total instead of the user's loss. In these replays nothing is really done: no
backward, no gradient is cleared or clipped, no scheduler advances, and an optimizer's ``step`` only puts in place the
values that the parameters had after the real one. So the second loss of a GAN is made of what the first network was
before its step and after it, just where the user's own code has it so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dropreg.errors import InconsistentPassesError, NoDropoutSiteError, UnsupportedModuleError
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.numerics.context import nothing, patched
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Drop, Off
from lightning_dropreg.passes.gradients import has_reentrant_checkpoint
from lightning_dropreg.session.past import Accesses, Habits, Past, all_optimizers, parameters_of
from lightning_dropreg.step.plan import BatchRunner, Plan, StepResult

if TYPE_CHECKING:
    from lightning_dropreg.session.batch import Batch

__all__ = ["ManualStep", "joined"]

Watch = Callable[[BatchRunner, StepResult], None]


class ManualStep:
    """One batch of a module that optimizes manually."""

    def __init__(self, batch: Batch, trainer: Trainer, habits: Habits) -> None:
        self._batch = batch
        self._module: LightningModule = batch.module
        self._optimizers = all_optimizers([*trainer.strategy._lightning_optimizers, *trainer.optimizers])
        self._habits = habits
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._past = Past(self._module, self._optimizers, habits)
        self._calls = 0
        self._rehearsed: dict[int, list[Tensor | None]] = {}

    def run(self, plan: Plan, step: int, watch: Watch, measure_noise: bool) -> Any:
        """Run the step for real, with the plan's total in the place of every loss that it back-propagates.

        Args:
            plan: What to do with every loss.
            step: Number of the step, for a penalty that does not act in all of them.
            watch: Called with what each loss became before that is back-propagated.
            measure_noise: Whether the gradient of the noise alone is wanted, too.

        Returns:
            What the user's step returned.
        """
        backward = self._module.manual_backward
        guard = _BackwardGuard(self._module)

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._calls += 1
            total = self._total(plan, step, loss, watch, measure_noise)
            with guard.lifted():
                backward(total, *args, **kwargs)
            self._past.keep_gradients()

        def once(*args: Any, **kwargs: Any) -> Any:
            rule = Off() if plan.k is None else Drop(fold_key(self._batch.key, 0))
            patches: list[tuple[Any, str, Any]] = [(self._module, "manual_backward", manual_backward)]
            patches += [(optimizer, "step", self._remembered(optimizer)) for optimizer in self._optimizers]
            with patched(*patches), attention_dropout(plan.attention), guard, Interception(rule):
                return self._batch.original(*args, **kwargs)

        return self._batch.call(once, trace=True)

    def rehearsed(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Run the step to its end with nothing really done; return the sum of the losses that it back-propagates."""
        losses: list[Tensor] = []
        accesses = Accesses(self._past.parameters)
        versions = [parameter._version for parameter in self._past.parameters]

        def reach(loss: Tensor) -> None:
            losses.append(loss)
            accesses.began = True
            with accesses.paused():
                self._back_propagate(len(losses), loss)

        with _BackwardGuard(self._module), self._past.revisited(whole=True) as advance:
            before = [parameter.data_ptr() for parameter in self._past.parameters]
            with accesses, self._replaying(reach, advance, accesses, gradients=True):
                self._batch.original(*args, **kwargs)
            changed = {
                parameter
                for parameter, version, place in zip(self._past.parameters, versions, before, strict=True)
                if parameter._version != version or parameter.data_ptr() != place
            }
        self._habits.by_hand |= changed | accesses.touched
        self._habits.reads |= accesses.reads
        self._habits.rehearsed = True
        return torch.stack([loss.reshape(()) for loss in losses]).sum() if losses else None

    def _back_propagate(self, number: int, loss: Tensor) -> None:
        """Add to ``.grad`` what a backward would, with no hook of anybody called and the graph kept to be looked at.

        A second rehearsal finds the gradients of the first, as all passes of a step find those that it really had.
        """
        if number in self._rehearsed:
            for parameter, gradient in zip(self._past.parameters, self._rehearsed[number], strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            return
        trained = [parameter for parameter in self._past.parameters if parameter.requires_grad]
        gradients: Sequence[Tensor | None] = [torch.zeros_like(parameter) for parameter in trained]
        if isinstance(loss, Tensor) and loss.grad_fn is not None and not has_reentrant_checkpoint(loss):
            gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient.detach() if parameter.grad is None else parameter.grad + gradient.detach()
        self._rehearsed[number] = [None if p.grad is None else p.grad.clone() for p in self._past.parameters]

    def _total(self, plan: Plan, step: int, loss: Tensor, watch: Watch, measure_noise: bool) -> Tensor:
        replays = self._batch.instead(functools.partial(self._replay, self._calls))
        with self._batch.isolation.without_trace():
            try:
                result = plan.run(replays, self._batch.key, step, measure_noise)
                noise = result.later
                if noise is None and plan.noise_after_backward:
                    noise = plan.extra(replays, self._batch.key)
                if noise is not None:  # it has the same gradient in the loss
                    result = replace(result, total=result.total + noise, noise=noise, later=None)
            except NoDropoutSiteError:
                return loss  # nothing is dropped on the way to this one
            watch(replays, result)
        return result.total

    def _replay(self, number: int, *args: Any, **kwargs: Any) -> Tensor:
        """Run the user's step up to its `number`-th backward; return the loss that it back-propagates there."""
        losses: list[Tensor] = []

        def reach(loss: Tensor) -> None:
            losses.append(loss)
            if len(losses) >= number:
                raise _ReachedError
            accesses.began = True
            with accesses.paused():
                self._past.put_gradients(len(losses))

        accesses = Accesses(self._past.parameters)
        with self._past.revisited() as advance, accesses, self._replaying(reach, advance, accesses, self._habits.reads):
            try:
                self._batch.original(*args, **kwargs)
            except _ReachedError:
                self._check_reads(accesses)
                return losses[number - 1]
        raise InconsistentPassesError(
            f"training_step of {type(self._module).__name__} called manual_backward {number} times, but when it was "
            f"run again with the same batch it ended after {len(losses)}. It must do the same thing every time (and "
            "let BaseException through)."
        )

    def _check_reads(self, accesses: Accesses) -> None:
        if accesses.reads and not self._habits.reads:
            raise UnsupportedModuleError(
                f"training_step of {type(self._module).__name__} reads gradients, and it did not in the first step, so "
                "they were not kept for the passes that it takes. Read them in every step, or in a hook such as "
                "on_before_optimizer_step."
            )

    @contextmanager
    def _replaying(
        self,
        reached: Callable[[Tensor], None],
        advance: Callable[[list[nn.Parameter]], None],
        accesses: Accesses,
        gradients: bool,
    ) -> Iterator[None]:
        """Let the step run without doing anything that lasts; `reached` gets what it wants to back-propagate."""

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            reached(loss)

        def unreal(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if not gradients:
                    return None
                with accesses.paused():
                    return function(*args, **kwargs)

            return wrapped

        patches: list[tuple[Any, str, Any]] = [(self._module, "manual_backward", manual_backward)]
        patches += [(self._module, "clip_gradients", unreal(self._module.clip_gradients))]
        patches += [(scheduler, "step", nothing) for scheduler in self._schedulers]
        for optimizer in self._optimizers:
            patches += [
                (optimizer, "zero_grad", unreal(optimizer.zero_grad)),
                (optimizer, "step", _unreal(optimizer, advance)),
            ]
        with patched(*patches):
            yield

    def _remembered(self, optimizer: Any) -> Callable[..., Any]:
        """Make the ``step`` of an optimizer that keeps the values its parameters had before."""
        step = optimizer.step

        @functools.wraps(step)  # torch's schedulers look at the attributes of an optimizer's step
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if not self._past.stepping:  # Lightning's optimizer calls the one that it wraps
                self._past.keep(parameters_of(optimizer))
            args, kwargs = self._called_once(optimizer, args, kwargs)
            stepping, self._past.stepping = self._past.stepping, True
            try:
                result = step(*args, **kwargs)
            finally:
                self._past.stepping = stepping
            if not stepping:
                self._past.keep_result(parameters_of(optimizer))
            return result

        return remembered

    def _called_once(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let an optimizer call its closure only once, and at the weights at which it was called."""
        closure = args[0] if args else kwargs.get("closure")
        if closure is None or self._past.stepping:
            return args, kwargs
        calls = 0
        versions = [parameter._version for parameter in parameters_of(optimizer)]

        def counted() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise UnsupportedModuleError(
                    f"{type(self._module).__name__} optimizes manually with an optimizer that calls its closure "
                    "several times in one step (LBFGS does), at weights that cannot be found again. Use another "
                    "optimizer, or the functions of lightning_dropreg.functional inside the closure."
                )
            if versions != [parameter._version for parameter in parameters_of(optimizer)]:
                raise UnsupportedModuleError(
                    f"{type(self._module).__name__} optimizes manually with an optimizer that moves the weights before "
                    "it calls its closure (sharpness-aware minimization does), so that the closure cannot be run again "
                    "where it was. Take its steps one by one in training_step (first_step, manual_backward, "
                    "second_step)."
                )
            return closure()

        return ((counted, *args[1:]), kwargs) if args else (args, {**kwargs, "closure": counted})


def joined(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Make one value to log of those of several losses: their sum, and of norms the root of the sum of squares."""
    columns: dict[str, list[Tensor]] = {}
    for one in values:
        for name, value in one.items():
            columns.setdefault(name, []).append(value)
    norms = {name for name in columns if name.endswith("_norm")}
    return {
        name: torch.linalg.vector_norm(torch.stack(column)) if name in norms else torch.stack(column).sum()
        for name, column in columns.items()
    }


class _ReachedError(BaseException):
    """A replay has come as far as it should; no ``except Exception`` of the user's is to stop it."""


class _BackwardGuard(TorchFunctionMode):
    """Refuses ``loss.backward()``, which would not be seen, or would be done again in every replay."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self._name = type(module).__name__
        self._lifted = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` if it is no backward."""
        if func is Tensor.backward and not self._lifted:
            raise UnsupportedModuleError(
                f"training_step of {self._name} calls loss.backward(), past Lightning, so this package's callbacks "
                "cannot add to the loss. Call self.manual_backward(loss)."
            )
        return func(*args, **(kwargs or {}))

    def lifted(self) -> AbstractContextManager[None]:
        """Allow it."""
        return patched((self, "_lifted", True))


def _unreal(optimizer: Any, advance: Callable[[list[nn.Parameter]], None]) -> Callable[..., Any]:
    """Make a ``step`` that does nothing but move on to the values after the real one."""

    def step(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        loss = closure() if closure is not None else None
        advance(parameters_of(optimizer))
        return loss

    return step
