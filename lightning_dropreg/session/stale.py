"""The gradients of the step before, which Lightning keeps until a step has made its loss.

Lightning calls ``training_step`` before ``zero_grad``. What is left in ``.grad`` takes as much memory as the parameters
while the passes of a batch are made, and where nobody reads it on the way it may go earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_dropreg.numerics.torch_private import has_gradient_hooks, has_hooks_after_accumulation
from lightning_dropreg.passes.structure import parameters_below
from lightning_dropreg.session.others import callbacks_of
from lightning_dropreg.session.twins import twins

__all__ = ["StaleGradients", "acts_on_gradients", "is_changed"]


class StaleGradients:
    """Tells whether the gradients in ``.grad`` are of no use any more.

    They are between the start of a batch and its first ``training_step``, if Lightning clears them in this batch (it
    does not in the midst of an accumulation) and nobody may look at them before: no hook ``on_before_zero_grad``, no
    ``optimizer_zero_grad`` or ``Optimizer.zero_grad`` of the user's own. A ``training_step`` that somebody calls at
    any other time finds gradients that count.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._fresh_batch = False

    def begin_batch(self) -> None:
        """Expect the first ``training_step`` of a batch."""
        self._fresh_batch = True

    def end_batch(self) -> None:
        """Expect none."""
        self._fresh_batch = False

    def take(self) -> Callable[[], None] | None:
        """Return what lets go of them where they are not wanted any more; None until the next batch."""
        if not self._fresh_batch:
            return None
        self._fresh_batch = False
        return self._drop

    def _drop(self) -> None:
        optimizers: list[Optimizer] = self._trainer.optimizers
        if not self._are_cleared() or len(optimizers) != 1 or self._are_watched(optimizers[0]):
            return
        for group in optimizers[0].param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _are_cleared(self) -> bool:
        """What Lightning has asked itself just now, when it made the closure of the step."""
        loop, trainer = self._trainer.fit_loop.epoch_loop, self._trainer
        skipped = loop.automatic_optimization._skip_backward
        first = loop.batch_idx % trainer.accumulate_grad_batches == 0
        return self._module.automatic_optimization and first and not skipped

    def _are_watched(self, optimizer: Optimizer) -> bool:
        hooks = [(self._module, LightningModule, name) for name in ("on_before_zero_grad", "optimizer_zero_grad")]
        return (
            any(is_changed(*hook) for hook in hooks)
            or any(is_changed(callback, Callback, "on_before_zero_grad") for callback in callbacks_of(self._trainer))
            or is_changed(optimizer, Optimizer, "zero_grad")
        )


def acts_on_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Tell whether something of the user's acts on gradients before noise could be added to them after the backward.

    A clamp would act on the gradient and the noise each on its own, an optimizer step within the backward would miss
    the noise.

    Returns:
        Whether there are hooks on parameters, or in callbacks that come before those of this package.
    """
    trained = (p for p in parameters_below(module) if p.requires_grad)
    if any(has_gradient_hooks(p) or has_hooks_after_accumulation(p) for p in trained):
        return True
    before = takewhile(lambda each: getattr(each, "acts_on_training", None) is not True, callbacks_of(trainer))
    return any(is_changed(callback, Callback, "on_after_backward") for callback in before)


def is_changed(instance: object, base: type, name: str) -> bool:
    """Whether a method is not that of the base; one that wraps it (``functools.wraps``) is another."""
    # a type without such a method answers in ways of its own (a mock, `__getattr__`), and may do anything
    own = getattr(type(instance), name, None)
    return name in getattr(instance, "__dict__", ()) or all(own is not getattr(twin, name) for twin in twins(base))
