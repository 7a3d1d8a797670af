"""The gradients of a module's parameters, as Lightning makes them: accumulated, scaled, averaged over ranks."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from torch import Tensor, autograd, nn, ones_like
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.passes.gradients import Scaler, has_reentrant_checkpoint
from lightning_dropreg.passes.structure import parameters_below
from lightning_dropreg.session.ranks import mean_over_ranks
from lightning_dropreg.session.values import norm_of

__all__ = ["TrainedParameters"]


class TrainedParameters:
    """The parameters of a module in a fit."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module

    @property
    def scaler(self) -> Scaler | None:
        """Multiplies a loss by the scale of the gradient scaler; None without one."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale

    def gradients(self, scalar: Tensor, retain_graph: bool = False) -> list[Tensor | None]:
        """Differentiate, treating `scalar` exactly as Lightning treats the loss.

        Returns:
            For each parameter that needs one its gradient, or None where there is none.

        Raises:
            UnsupportedOperationError: If that would miss what is inside a reentrant checkpoint.
        """
        scalar, scaler = scalar / self._trainer.accumulate_grad_batches, self.scaler
        scaled = scalar if scaler is None else scaler(scalar)
        if has_reentrant_checkpoint(scaled):
            raise UnsupportedOperationError(
                f"{type(self._module).__name__} has a checkpoint with use_reentrant=True, and torch differentiates "
                "such a checkpoint only in the one backward of the loss. Use ImplicitNoise(injection='loss'), or "
                "torch.utils.checkpoint with use_reentrant=False."
            )
        return list(autograd.grad(scaled, self._parameters(), retain_graph=retain_graph, allow_unused=True))

    def no_gradients(self) -> list[Tensor | None]:
        """Return what `gradients` does where there is nothing to differentiate."""
        return [None] * len(self._parameters())

    def add(self, gradients: list[Tensor | None]) -> Tensor:
        """Add gradients to those that the backward left.

        Gradients of accumulating micro-batches are still this rank's own and will be averaged with the rest; after the
        last one they are already the average over ranks, and so must be what is added.

        Returns:
            The norm of what was added, without the scale of a gradient scaler.
        """
        trainer, parameters = self._trainer, self._parameters()
        if trainer.world_size > 1 and not trainer.fit_loop._should_accumulate():
            gradients = mean_over_ranks(parameters, gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        return self._unscaled(norm_of(gradients) * trainer.accumulate_grad_batches)

    def norm_from(self, scalar: Tensor) -> Tensor | None:
        """Return the norm of the gradient of a scalar, whose graph stays; None where that cannot be had alone."""
        if not scalar.requires_grad or has_reentrant_checkpoint(scalar):
            return None
        return norm_of(list(autograd.grad(scalar, self._parameters(), retain_graph=True, allow_unused=True)))

    def norm_at(self, optimizer: Optimizer, anywhere: bool) -> Tensor | None:
        """Return the norm of the gradients of a step; None where that takes a collective, unless `anywhere`."""
        gradients = [g for g in (p.grad for p in parameters_below(self._module)) if g is not None]
        if not anywhere and any(isinstance(gradient, DTensor) for gradient in gradients):
            return None
        norm = norm_of(gradients)
        # a fused optimizer unscales in its own step
        return self._unscaled(norm) if getattr(optimizer, "_step_supports_amp_scaling", False) else norm

    def _unscaled(self, norm: Tensor) -> Tensor:
        scaler = self.scaler
        return norm if scaler is None else norm / scaler(ones_like(norm))

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in parameters_below(self._module) if p.requires_grad]
