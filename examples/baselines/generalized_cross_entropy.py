"""Generalized cross entropy (Zhang and Sabuncu 2018): ``(1 - p_y^power) / power``, for labels that may be wrong."""

import torch.nn.functional as F
from torch import Tensor


def generalized_cross_entropy(logits: Tensor, target: Tensor, power: float) -> Tensor:
    """Return one loss per example: cross entropy in the limit of `power` 0, ``1 - p_y`` at 1.

    Args:
        logits: ``(T, C)``.
        target: Classes ``(T,)``.
        power: In ``(0, 1]``; the authors take 0.7.
    """
    return (1 - (-power * F.cross_entropy(logits, target, reduction="none")).exp()) / power
