"""Weight decay: the loss plus ``strength / 2`` times the sum of the squares of all parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor


def l2(parameters: Iterable[Tensor], strength: float) -> Tensor:
    """Return the penalty. With plain SGD, ``torch.optim.SGD(..., weight_decay=strength)`` is the same step."""
    return strength / 2 * torch.stack([p.square().sum() for p in parameters]).sum()
