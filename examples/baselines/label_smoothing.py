"""Label smoothing (Szegedy et al. 2016): a target of ``1 - amount`` on the label plus ``amount / C`` on every class."""

import torch.nn.functional as F
from torch import Tensor


def label_smoothing_loss(logits: Tensor, target: Tensor, amount: float) -> Tensor:
    """Return one loss per example, from logits ``(T, C)`` and classes ``(T,)``."""
    return F.cross_entropy(logits, target, label_smoothing=amount, reduction="none")
