"""Short random images of long vectors that keep their inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.noise import fold_key, random_signs

__all__ = ["SKETCH_WIDTH", "sketch"]

SKETCH_WIDTH = 16384
"""Longer vectors are folded to this many entries."""


def sketch(tensors: Sequence[Tensor], width: int = SKETCH_WIDTH, seed: int = 0) -> Tensor:
    """Fold the entries of `tensors` into `width` random buckets with random signs, always the same (a count sketch).

    The inner product of two sketches has the mean of the true one and the variance ``|x|^2 |y|^2 / width`` over the
    choice of buckets and signs (for vectors in which no single entry stands out).

    Args:
        tensors: Together one long vector.
        width: Length of the sketch.
        seed: Seed of buckets and signs.

    Returns:
        Shape ``(width,)``, on the device of the first tensor; the vector itself if it is not longer than that.

    Example:
        >>> sketch([torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])])
        tensor([1., 2., 3.])
        >>> x = torch.ones(1000)
        >>> 800 < sketch([x], width=499).square().sum() < 1200
        tensor(True)
    """
    count = sum(t.numel() for t in tensors)
    if count <= width:
        return torch.cat([t.detach().reshape(-1) for t in tensors])
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(fold_key(seed, count))
    folded = torch.zeros(width, dtype=noise_dtype(tensors[0].dtype), device=device)
    for tensor in tensors:
        n = tensor.numel()
        signed = tensor.detach().reshape(-1).to(folded.dtype) * random_signs((n,), folded.dtype, generator)
        folded.index_add_(0, torch.randint(width, (n,), generator=generator, device=device), signed)
    return folded
