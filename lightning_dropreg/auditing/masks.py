"""Masks, read from what went into a dropout and what came out of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Mask", "along", "collapse", "digest", "read_mask"]

_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_MANY = 1 << 24  # entries; of larger tensors only the beginning is looked at


@dataclass
class Mask:
    """What one call of a dropout did to each entry.

    Attributes:
        kept: Whether an entry was kept, in the shape of the tensor.
        known: Whether that can be told: where 0 went in, nothing can.
        scale: The factor of the entries that were kept; NaN if none was.
        tolerance: Relative error with which the factor is known.
    """

    kept: Tensor
    known: Tensor
    scale: float
    tolerance: float

    @property
    def dropped(self) -> int:
        """Number of entries that were dropped."""
        return int((self.known & ~self.kept).sum())

    @property
    def entries(self) -> int:
        """Number of entries of which it is known."""
        return int(self.known.sum())


def read_mask(h: Tensor, output: object) -> Mask | None:
    """Read the mask of a call.

    Returns:
        The mask; None if what came out is not what went in, times 0 or one common factor.
    """
    if not isinstance(output, Tensor) or output.shape != h.shape or not h.is_floating_point():
        return None
    h, output = h.detach(), output.detach().to(h.dtype)
    if h.numel() > _MANY and h.ndim:
        rows = max(1, _MANY // max(1, h[0].numel()))
        h, output = h[:rows], output[:rows]
    known = (h.abs() > 1e3 * torch.finfo(h.dtype).tiny) & h.isfinite()
    kept = (output != 0) & known
    factors = output[kept].double() / h[kept].double()
    if not len(factors):
        return Mask(kept, known, math.nan, 0.0) if bool(known.any()) else None
    scale, tolerance = float(factors.median()), _TOLERANCE.get(h.dtype, 1e-4)
    if not math.isfinite(scale) or float((factors - scale).abs().max()) > tolerance * abs(scale):
        return None
    return Mask(kept, known, scale, tolerance)


def collapse(mask: Mask) -> tuple[Mask, dict[int, int], float]:
    """Reduce a mask to one entry where entries along a dimension are all alike.

    Returns:
        The reduced mask; the number of entries that are alike along each dimension that was reduced; and the log of the
        chance that independent entries would be alike along the first of them, at the share of kept entries seen.
    """
    kept, known = mask.kept, mask.known
    rate = float(kept.sum()) / max(1, int(known.sum()))
    alike: dict[int, int] = {}
    chance = 0.0
    if not 0 < rate < 1:
        return mask, alike, chance
    for dim in range(kept.ndim):
        if kept.shape[dim] < 2:
            continue
        ups, downs = kept.sum(dim, keepdim=True), (known & ~kept).sum(dim, keepdim=True)
        counts = ups + downs
        if bool(((ups > 0) & (downs > 0)).any()) or not bool((counts > 1).any()):
            continue
        if not alike:
            sizes = counts[counts > 1].double()
            chance = float(torch.log(rate**sizes + (1 - rate) ** sizes).sum())
        alike[dim] = kept.shape[dim]
        kept, known = ups > 0, counts > 0
    return Mask(kept, known, mask.scale, mask.tolerance), alike, chance


def along(mask: Mask, dims: Sequence[int]) -> Mask:
    """Take one entry in place of all along some dimensions, where they are alike."""
    kept, known = mask.kept, mask.known
    for dim in dims:
        kept, known = kept.any(dim, keepdim=True), known.any(dim, keepdim=True)
    return Mask(kept, known, mask.scale, mask.tolerance)


def digest(entries: Tensor) -> str:
    """Return a hash of a boolean tensor, by which two can be compared."""
    return hashlib.sha256(entries.to("cpu", torch.uint8).contiguous().numpy().tobytes()).hexdigest()
