"""Sharpness-aware minimization (Foret et al. 2021): steps with the gradient at the worst point nearby."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AtWorstPoint(torch.optim.Optimizer):
    """Takes the gradient at ``w + rho g / |g|``, with ``g`` the gradient at ``w``, and steps from ``w``.

    Stands before an optimizer among the base classes, which is whose step is taken.

    Args:
        params: Parameters.
        rho: Length of the way to the worst point.
        networks: Whether the first dimension of every parameter numbers separate networks: each has its own ``|g|``.
        options: For the optimizer.
    """

    def __init__(self, params: Iterable[Tensor], rho: float, networks: bool = False, **options: Any) -> None:
        super().__init__(params, **options)
        self.rho, self.networks = rho, networks

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        start = [p.detach().clone() for p in trained]
        kept = int(self.networks)
        norm = torch.stack([p.grad.flatten(kept).square().sum(-1) for p in trained]).sum(0).sqrt()
        with torch.no_grad():
            for p in trained:
                p.add_(p.grad * (self.rho / (norm + 1e-12)).reshape(-1, *[1] * (p.ndim - 1)))
        with torch.enable_grad():
            closure()  # the gradient there, in the place of the first
        with torch.no_grad():
            for p, old in zip(trained, start, strict=True):
                p.copy_(old)
        super().step(None)
        return loss


class SAM(AtWorstPoint, torch.optim.SGD):
    """With SGD, as its authors have it."""


class AdamSAM(AtWorstPoint, torch.optim.Adam):
    """With Adam, for what SGD trains badly."""
