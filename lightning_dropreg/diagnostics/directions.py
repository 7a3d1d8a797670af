"""Dropout as the end of a path: ``h (1 + step eta)`` is the model without dropout at step 0, dropout at step 1.

The Taylor expansion along this path is the paper's: its first-order term is the implicit noise ``s`` (mean zero), its
second-order term ``1/2 u^T H u`` has the mean ``R_approx``, and what is left is the remainder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Directions

__all__ = ["DropoutDirections"]


class DropoutDirections(Directions):
    """The noise of dropout itself: ``eta = -1`` with probability ``q`` and ``q/(1-q)`` otherwise.

    Args:
        key: Seed; the same key gives the same noise.
        drop_prob: ``q`` of all sites, in ``(0, 1)``, instead of their own.
    """

    def __init__(self, key: int, drop_prob: float | None = None) -> None:
        super().__init__(key)
        self._drop_prob = drop_prob

    def _sample(self, site: Site, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        q = site.p if self._drop_prob is None else self._drop_prob
        kept = torch.rand(self.shape_of(site), generator=generator, dtype=dtype, device=generator.device) >= q
        return kept.to(dtype).div_(1 - q).sub_(1)
