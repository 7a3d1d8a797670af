"""R-Drop (Liang et al. 2021): two draws of dropout, and a penalty on how far apart their predictions are.

The mean of the two cross entropies plus ``alpha`` times the mean of the two divergences, as in the authors' description
of their code. (The paper's formula has the *sum* of the cross entropies: its alpha is twice this one.)
"""

import torch.nn.functional as F
from torch import Tensor


def r_drop_loss(first: Tensor, second: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Return one loss per example.

    Args:
        first: Logits of one draw, ``(T, C)``.
        second: Logits of another draw for the same examples.
        target: Classes, ``(T,)``.
        alpha: Weight of the divergence.
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    divergence = F.kl_div(p, q, reduction="none", log_target=True) + F.kl_div(q, p, reduction="none", log_target=True)
    cross_entropy = F.nll_loss(p, target, reduction="none") + F.nll_loss(q, target, reduction="none")
    return cross_entropy / 2 + alpha * divergence.sum(-1) / 2
