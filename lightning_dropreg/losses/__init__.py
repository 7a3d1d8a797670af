"""What the package must know of a loss: its outputs, its elements, and the Hessian of one in the other.

A recognized loss is split in three: outputs ``z`` of shape ``(T, C)`` (``T`` examples or tokens with ``C`` outputs
each), elements ``l(z, y)`` before any reduction, and the reduction, which stays the user's own. The families:

* `CategoricalLoss`, `DivergenceLoss`: ``H = s (diag(p) - p p^T)``, ``p = softmax(z)``;
* `ElementwiseLoss`: one element per output, so the Hessian is diagonal;
* `HessianLoss`: any function of one example's outputs, by a Hessian-vector product; users' own come by `recognize`.

A new loss is one function that takes the arguments of the function it stands for and returns the loss as the user
asked for it, reduced in the user's way, together with its description; and its row in `RECOGNIZED`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.losses.adaptive import adaptive_softmax_loss, describe_adaptive_softmax_loss
from lightning_dropreg.losses.base import Loss
from lightning_dropreg.losses.categorical import CategoricalLoss, DivergenceLoss, cross_entropy, kl_div, nll_loss
from lightning_dropreg.losses.custom import HessianLoss, recognize
from lightning_dropreg.losses.elementwise import (
    ElementwiseLoss,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    huber_loss,
    l1_loss,
    mse_loss,
    poisson_nll_loss,
    smooth_l1_loss,
    soft_margin_loss,
)

__all__ = [
    "RECOGNIZED",
    "REFUSED",
    "CategoricalLoss",
    "DivergenceLoss",
    "ElementwiseLoss",
    "HessianLoss",
    "Loss",
    "adaptive_softmax_loss",
    "recognize",
]

RECOGNIZED: dict[Callable[..., Any], Callable[..., tuple[Tensor, Loss]]] = {
    F.binary_cross_entropy: binary_cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.cross_entropy: cross_entropy,
    F.gaussian_nll_loss: gaussian_nll_loss,
    F.huber_loss: huber_loss,
    F.kl_div: kl_div,
    F.l1_loss: l1_loss,
    F.mse_loss: mse_loss,
    F.nll_loss: nll_loss,
    F.poisson_nll_loss: poisson_nll_loss,
    F.smooth_l1_loss: smooth_l1_loss,
    F.soft_margin_loss: soft_margin_loss,
    adaptive_softmax_loss: describe_adaptive_softmax_loss,
}
"""The losses that can be taken apart, each with the function that does it."""

REFUSED: dict[Callable[..., Any], str] = {
    **dict.fromkeys(
        (F.hinge_embedding_loss, F.margin_ranking_loss, F.multi_margin_loss, F.multilabel_margin_loss),
        "it is piecewise linear, so its second derivative says nothing",
    ),
    **dict.fromkeys(
        (F.triplet_margin_loss, F.triplet_margin_with_distance_loss, F.cosine_embedding_loss),
        "it compares several outputs of the model",
    ),
    F.ctc_loss: "torch cannot differentiate it twice",
    F.multilabel_soft_margin_loss: "it is the mean of binary_cross_entropy_with_logits over the classes; use that",
}
"""Losses that cannot, and why."""
