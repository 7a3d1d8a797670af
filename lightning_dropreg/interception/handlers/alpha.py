r"""Alpha dropout: dropout of ``h - alpha'``, followed by an affine map.

Alpha dropout puts ``alpha'``, the value at which a SELU saturates, in the place of what it drops, and corrects mean and
variance: ``a (h m + alpha' (1 - m)) + b`` with ``m`` Bernoulli(``1 - p``), ``a = ((1-p)(1 + p alpha'^2))^(-1/2)`` and
``b = -a alpha' p``. With ``m = (1 - p)(1 + eta)`` that is, term by term,

.. math::
    a (1 - p) \, [\, (h - \alpha')(1 + \eta) + \alpha' \,]

so ``h - alpha'`` is a dropout site like any other and the rest is part of the model. Its mean, which is what remains
without noise, is ``a (1 - p) h``: the scale is what alpha dropout does to the model in training, not noise, and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.checks import check_drop_prob
from lightning_dropreg.interception.handlers.dropout import channel_mask, torch_namespace
from lightning_dropreg.interception.sites import Mode

__all__ = ["HANDLERS"]

ALPHA = -1.7580993408473766  # -scale * alpha of SELU, with the digits that torch has


def alpha_dropout(kind: str, shared: bool) -> Callable[..., Tensor]:
    """Make the handler of `F.alpha_dropout`, or of `F.feature_alpha_dropout` if the mask is `shared` in a channel."""

    def handle(
        mode: Mode, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = False,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        check_drop_prob(p, kind)
        if not training or p == 0:
            mode.inactive += training
            if not training:
                mode.at_rest(p, kind)
            return input
        mask_shape = channel_mask(input, None) if shared else tuple(input.shape)
        mean_scale = ((1 - p) / (1 + p * ALPHA**2)) ** 0.5
        result = (mode.site(input - ALPHA, p, mask_shape, kind, inplace=False) + ALPHA) * mean_scale
        return input.copy_(result) if inplace else result

    return handle


_ALPHA = alpha_dropout("alpha_dropout", shared=False)
_FEATURE = alpha_dropout("feature_alpha_dropout", shared=True)

HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.alpha_dropout: _ALPHA,
    F.feature_alpha_dropout: _FEATURE,
    torch.alpha_dropout: torch_namespace(_ALPHA, inplace=False),
    torch.alpha_dropout_: torch_namespace(_ALPHA, inplace=True),
    torch.feature_alpha_dropout: torch_namespace(_FEATURE, inplace=False),
    torch.feature_alpha_dropout_: torch_namespace(_FEATURE, inplace=True),
}
