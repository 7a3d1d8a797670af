"""Noise stability optimization (Zhang, Li and Ju 2023, arXiv 2306.08553): SGD with antithetic noise on the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class NoiseStability(torch.optim.SGD):
    """Takes the mean of the gradients at ``w + u`` and ``w - u`` with ``u ~ N(0, sigma^2)``, and steps from ``w``.

    Args:
        params: Parameters.
        sigma: Standard deviation of the noise on every weight.
        options: For `torch.optim.SGD`.
    """

    def __init__(self, params: Iterable[Tensor], sigma: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.sigma = sigma

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        trained = [p for group in self.param_groups for p in group["params"]]
        start = [p.detach().clone() for p in trained]
        noise = [self.sigma * torch.randn_like(p) for p in trained]
        gradients = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, old, u in zip(trained, start, noise, strict=True):
                    p.copy_(old + sign * u)
            with torch.enable_grad():
                loss = closure()
            gradients.append([p.grad.clone() for p in trained])
        with torch.no_grad():
            for p, old, plus, minus in zip(trained, start, *gradients, strict=True):
                p.copy_(old)
                p.grad = (plus + minus) / 2
        super().step()
        return loss
