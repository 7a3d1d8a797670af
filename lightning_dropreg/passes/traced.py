"""The rules as they stand in the graph of a compiled part: the same arithmetic, the same random numbers.

Step and key are tensors, which a graph takes as inputs: another value needs no other graph. The numbers are drawn by
one operation that is a function of key and position, so that a backward may draw them again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.noise import keyed_signs, keyed_uniforms

__all__ = ["TracedDrop", "TracedOff", "TracedPerturb"]


class TracedOff:
    """No dropout; see `lightning_dropreg.passes.rules.Off`."""

    def __call__(self, h: Tensor, p: float, mask_shape: tuple[int, ...], position: Tensor, number: int) -> Tensor:
        """See `lightning_dropreg.interception.sites.TracedRule`."""
        return h


class TracedPerturb:
    """``h (1 + step r)``; see `lightning_dropreg.passes.rules.Perturb`."""

    def __init__(self, key: int, step: float, mask: str) -> None:
        self.key = torch.tensor(key)
        self.step = torch.tensor(step, dtype=torch.float64)
        self.elementwise = mask == "elementwise"

    def __call__(self, h: Tensor, p: float, mask_shape: tuple[int, ...], position: Tensor, number: int) -> Tensor:
        """See `lightning_dropreg.interception.sites.TracedRule`."""
        shape = tuple(h.shape) if self.elementwise else mask_shape
        r: Tensor = keyed_signs(self.key, position, shape, noise_dtype(h.dtype), h.device) * math.sqrt(p / (1 - p))
        return (h * (1 + self.step * r)).to(h.dtype)


class TracedDrop:
    """Dropout itself; see `lightning_dropreg.passes.rules.Drop`."""

    def __init__(self, key: int, mirrored: bool) -> None:
        self.key = torch.tensor(key)
        self.mirrored = mirrored

    def __call__(self, h: Tensor, p: float, mask_shape: tuple[int, ...], position: Tensor, number: int) -> Tensor:
        """See `lightning_dropreg.interception.sites.TracedRule`."""
        uniform: Tensor = keyed_uniforms(self.key, position, mask_shape, torch.float32, h.device)
        kept = uniform < 1 - p if self.mirrored else uniform >= p
        return h * (kept.to(h.dtype) / (1 - p))
