"""Mixup (Zhang et al. 2018): every example and its label mixed with another, in shares from ``Beta(alpha, alpha)``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mixup_loss(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Return one loss per example; one share and one order of the partners for the batch, as in the authors' code.

    Args:
        model: From inputs to logits ``(..., B, C)``.
        x: Inputs ``(..., B, D)``; leading dimensions number batches, each with a share and partners of its own.
        y: Classes ``(..., B)``.
        alpha: Parameter of the Beta distribution.
    """
    share = torch.distributions.Beta(alpha, alpha).sample(y.shape[:-1]).to(x)[..., None]
    partner = torch.rand(y.shape).argsort(-1)
    other = x.gather(-2, partner[..., None].expand_as(x))
    z = model(share[..., None] * x + (1 - share[..., None]) * other)
    losses = [
        F.cross_entropy(z.flatten(0, -2), label.flatten(), reduction="none").unflatten(0, y.shape)
        for label in (y, y.gather(-1, partner))
    ]
    return (share * losses[0] + (1 - share) * losses[1]).flatten()
