"""What several processes need: one mean of the noise, and strategies that are known to be right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor, nn

from lightning_dropreg.estimators import AUTO
from lightning_dropreg.session.twins import is_a
from lightning_dropreg.step.plan import Plan

__all__ = ["has_whole_parameters", "mean_over_ranks", "unsupported_strategy"]


def mean_over_ranks(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Average gradients over ranks in one fused operation.

    What no rank has a gradient for stays None, so that the optimizer passes it over as it would without us. (The
    device is waited for only if there is such a parameter.)

    Returns:
        The means, dense or sparse as they came.
    """
    dtype = max((p.dtype for p in parameters), key=lambda d: torch.finfo(d).bits)
    pieces = [_dense(p, g).to(dtype).reshape(-1) for p, g in zip(parameters, gradients, strict=True)]
    used = pieces[0].new_tensor([0.0 if g is None else 1.0 for g in gradients])
    flat = torch.cat([*pieces, used])
    torch.distributed.all_reduce(flat)  # Strategy.reduce would wait at a barrier first
    flat /= torch.distributed.get_world_size()
    *means, used = flat.split([p.numel() for p in parameters] + [len(gradients)])
    unsure = any(p.grad is None and g is None for p, g in zip(parameters, gradients, strict=True))
    anywhere = used.tolist() if unsure else [1.0] * len(gradients)
    return [
        _like(mean, parameter, gradient) if share else None
        for mean, parameter, gradient, share in zip(means, parameters, gradients, anywhere, strict=True)
    ]


def _dense(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


def _like(mean: Tensor, parameter: nn.Parameter, gradient: Tensor | None) -> Tensor:
    mean = mean.view_as(parameter).to(parameter.dtype)
    model = parameter.grad if parameter.grad is not None else gradient
    return mean.to_sparse(model.sparse_dim()) if model is not None and model.is_sparse else mean


def has_whole_parameters(strategy: Strategy) -> bool:
    """Whether every process has all parameters and their gradients, as plain tensors."""
    sharded = is_a(strategy, DeepSpeedStrategy, XLAStrategy)  # which derive from DDPStrategy, too
    return is_a(strategy, SingleDeviceStrategy, DDPStrategy) and not sharded


def unsupported_strategy(strategy: Strategy, plan: Plan) -> list[str]:
    """Say what keeps a plan from working under a strategy, each with a remedy."""
    if plan.untouched or has_whole_parameters(strategy):
        return []
    name = type(strategy).__name__
    if not is_a(strategy, ModelParallelStrategy):
        return [
            f"its strategy is {name}, with which gradients of repeated passes are not known to be right. Use one "
            "device, DDPStrategy, or ModelParallelStrategy (FSDP2)."
        ]
    problems = []
    if plan.noise_after_backward:
        problems.append(
            f"its strategy is {name}, with which gradients cannot be changed after the backward pass. Use "
            "ImplicitNoise(injection='loss')."
        )
    others = plan.estimators - {"antithetic", AUTO}
    if others:
        problems.append(
            f"its strategy is {name}, whose hooks allow one backward of the whole and no estimator='{min(others)}'. "
            "Use estimator='antithetic'."
        )
    return problems
