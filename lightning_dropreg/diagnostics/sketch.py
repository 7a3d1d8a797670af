"""Short random images of long vectors that keep their inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dropreg.sites import noise_dtype, random_signs

__all__ = ["SKETCH_WIDTH", "sketch"]

SKETCH_WIDTH = 65537
"""Longer vectors are folded to this many entries. A prime: rows of a weight matrix do not fall on one another."""


def sketch(tensors: Sequence[Tensor], width: int = SKETCH_WIDTH) -> Tensor:
    """Fold the entries of `tensors` into `width` buckets with random signs, always the same ones (a count sketch).

    The inner product of two sketches has the mean of the true one and a standard deviation of about
    ``|x| |y| / sqrt(width)`` over the signs.

    Args:
        tensors: Together one long vector.
        width: Length of the sketch.

    Returns:
        Shape ``(width,)``, on the device of the first tensor; the vector itself if it is not longer than that.

    Example:
        >>> sketch([torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])])
        tensor([1., 2., 3.])
        >>> x = torch.ones(1000)
        >>> 900 < sketch([x], width=499).square().sum() < 1100
        tensor(True)
    """
    count = sum(t.numel() for t in tensors)
    if count <= width:
        return torch.cat([t.detach().reshape(-1) for t in tensors])
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(count)
    folded = torch.zeros(width, dtype=noise_dtype(tensors[0].dtype), device=device)
    offset = 0
    for tensor in tensors:
        n = tensor.numel()
        signed = tensor.detach().reshape(-1).to(folded.dtype) * random_signs((n,), folded.dtype, generator)
        folded.index_add_(0, torch.arange(offset, offset + n, device=device) % width, signed)
        offset += n
    return folded
