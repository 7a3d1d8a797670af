"""Drawing some of a batch's rows, whatever the batch is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["draw_rows", "select_rows"]


def draw_rows(batch: Any, fraction: float, dim: int, key: int) -> Tensor:
    """Draw ``fraction`` of the rows without replacement, at least one.

    Args:
        batch: Any nest of dicts, lists and tuples with tensors in it; the first tensor that has dimension `dim` says
            how many rows there are.
        fraction: In ``(0, 1]``.
        dim: The dimension along which the rows lie.
        key: Seed.

    Returns:
        Sorted indices of the rows, on the CPU.

    Raises:
        InvalidArgumentError: If no tensor in `batch` has dimension `dim`.

    Example:
        >>> draw_rows({"x": torch.zeros(8, 3)}, 0.25, 0, key=1).shape
        torch.Size([2])
    """
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim > dim:
            count = leaf.shape[dim]
            generator = torch.Generator().manual_seed(key)
            return torch.randperm(count, generator=generator)[: max(1, round(fraction * count))].sort().values
    raise InvalidArgumentError(
        f"batch_fraction needs a batch with rows along dimension batch_dim={dim}, but the {type(batch).__name__} "
        "holds no tensor with that dimension. Set batch_dim, or batch_fraction=None."
    )


def select_rows(batch: Any, rows: Tensor, dim: int, count: int) -> Any:
    """Take `rows` of every tensor in `batch` that has `count` of them along `dim`; leave the rest alone.

    Args:
        batch: Any nest of dicts, lists and tuples.
        rows: Indices.
        dim: The dimension along which the rows lie.
        count: Number of rows in the batch.

    Returns:
        A batch of the same structure.

    Example:
        >>> select_rows((torch.arange(4), "label"), torch.tensor([1, 3]), 0, 4)
        (tensor([1, 3]), 'label')
    """
    leaves, structure = tree_flatten(batch)
    taken = [
        leaf.index_select(dim, rows.to(leaf.device, non_blocking=True))
        if isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] == count
        else leaf
        for leaf in leaves
    ]
    return tree_unflatten(taken, structure)
