"""The gradients of the step before, which Lightning keeps until a step has made its loss.

Lightning calls ``training_step`` before ``zero_grad``. What is left in ``.grad`` takes as much memory as the parameters
while the passes of a batch are made, and where nobody reads it on the way it may go earlier.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

__all__ = ["stale_gradients"]


def stale_gradients(trainer: Trainer, module: LightningModule) -> Callable[[], None] | None:
    """Return what lets go of the gradients of the step before, which does nothing in the midst of an accumulation.

    Args:
        trainer: The trainer.
        module: The module that it fits.

    Returns:
        A function without arguments; None if somebody may look at the gradients before they are cleared (a hook
        ``on_before_zero_grad``, an ``optimizer_zero_grad`` or ``Optimizer.zero_grad`` of the user's own), or if they
        are not Lightning's to clear.
    """
    optimizers: list[Optimizer] = trainer.optimizers
    if not module.automatic_optimization or len(optimizers) != 1:
        return None
    own_hooks = any(is_overridden(name, module) for name in ("on_before_zero_grad", "optimizer_zero_grad"))
    watched = any(is_overridden("on_before_zero_grad", callback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    own_zero_grad = type(optimizers[0]).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizers[0])
    if own_hooks or watched or own_zero_grad:
        return None

    def drop() -> None:
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches:
            return
        for group in optimizers[0].param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    return drop
