"""What few digits ask of noise."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_in_bfloat16", "noise_dtype"]


def noise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for a site's noise: at least float32, because ``1 + 0.08`` has three digits in bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_in_bfloat16(h: Tensor) -> bool:
    """Whether `h` is in bfloat16, or what is computed from it will be, by autocast.

    Args:
        h: Activations at a site.

    Returns:
        Whether that is so.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     is_in_bfloat16(torch.ones(1))
        True
    """
    if h.dtype == torch.bfloat16:
        return True
    kind = h.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
