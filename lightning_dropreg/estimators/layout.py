"""Where the rows of a batch lie in the tensors that a model makes of it.

A batch of ``B`` rows becomes tensors of shape ``(B, T, C)``, ``(T, B, C)``, ``(B T, C)`` or ``(T B, C)``, as the
author of the model liked. Which it is, is found out by exchanging a row of the batch for another and looking at what
changes; that shows as well whether rows depend on one another (batch norm) and have no place of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dropreg.errors import DropregError
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Closure, run_pass

__all__ = ["Layout", "RowAxis", "RowsNotFoundError", "axis_of", "differs", "exchanged", "find_layout"]


class RowsNotFoundError(DropregError):
    """A pass is not what the rows would make of it. Always caught: they get a pass of their own."""


@dataclass(frozen=True)
class RowAxis:
    """The rows of a batch in one tensor.

    Attributes:
        dim: The dimension along which they lie.
        first: Whether the number of the row is the slow index of that dimension, as in ``(B T, C)``, or the fast
            one, as in ``(T B, C)``.
        size: How many entries of that dimension a row has, ``T`` there.

    Example:
        >>> RowAxis(0, first=True, size=2).split(torch.arange(6), [1, 2])
        [tensor([0, 1]), tensor([2, 3, 4, 5])]
        >>> RowAxis(0, first=False, size=2).split(torch.arange(6), [1, 2])
        [tensor([0, 3]), tensor([1, 2, 4, 5])]
    """

    dim: int
    first: bool
    size: int

    def unfold(self, shape: Sequence[int], rows: int) -> tuple[tuple[int, ...], int]:
        """Give the rows a dimension of their own.

        Args:
            shape: Shape of the tensor.
            rows: Number of rows.

        Returns:
            The shape with one dimension more, and the dimension of the rows in it.

        Raises:
            RowsNotFoundError: If the shape is not that of so many rows.
        """
        if self.dim >= len(shape) or shape[self.dim] != rows * self.size:
            raise RowsNotFoundError(
                f"{rows} rows of size {self.size} are not dimension {self.dim} of a tensor of shape {tuple(shape)}."
            )
        pair = (rows, self.size) if self.first else (self.size, rows)
        return (*shape[: self.dim], *pair, *shape[self.dim + 1 :]), self.dim + (not self.first)

    def split(self, tensor: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Split a tensor into its first ``counts[0]`` rows, the next ``counts[1]``, and so on."""
        shape, dim = self.unfold(tensor.shape, sum(counts))
        if self.size == 1:
            return list(tensor.split_with_sizes(list(counts), self.dim))
        parts = tensor.reshape(shape).split_with_sizes(list(counts), dim)
        return [part.flatten(self.dim, self.dim + 1) for part in parts]


@dataclass(frozen=True)
class Layout:
    """The rows in the tensors of one pass.

    Attributes:
        sites: At every dropout site, in order.
        losses: In the outputs ``(T, C)`` of every recognized loss, in order.
    """

    sites: tuple[RowAxis, ...]
    losses: tuple[RowAxis, ...]

    def plain(self) -> list[list[tuple[int, bool, int]]]:
        """Return it as plain numbers, for a checkpoint."""
        return [[(axis.dim, axis.first, axis.size) for axis in axes] for axes in (self.sites, self.losses)]

    @classmethod
    def of(cls, plain: Sequence[Sequence[Sequence[int]]]) -> Layout:
        """Return the layout that `plain` was made of."""
        return cls(*(tuple(RowAxis(int(dim), bool(first), int(n)) for dim, first, n in axes) for axes in plain))


def find_layout(on_rows: Callable[[Tensor], Closure], rows: int) -> Layout | None:
    """Find out where the rows are.

    Args:
        on_rows: Returns what runs forward and loss on the rows of these numbers, which may occur several times.
        rows: Number of rows in the batch.

    Returns:
        The layout; None if the rows have no place of their own everywhere: they depend on one another, share a mask, or
        a loss is not recognized as a mean.
    """
    if rows < 2:
        return None
    try:
        seen = [_Seen(on_rows(index)) for index in (torch.arange(rows), *exchanged(rows))]
    except DropregError:
        return None
    sites, tensors = seen[0].sites, [one.tensors for one in seen]
    shapes = [[t.shape for t in each] for each in tensors]
    if not sites or not all(one.means for one in seen) or shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        return None
    axes = []
    for position, (h, *others) in enumerate(zip(*tensors, strict=True)):
        shared = sites[position].mask_shape if position < len(sites) else (1,) * h.ndim
        changed = [differs(h, other) for other in others]
        dims = [d for d in range(h.ndim) if shared[d] == h.shape[d]] if position < len(sites) else [0]
        axis = axis_of(changed, rows, dims)
        if axis is None:
            return None
        axes.append(axis)
    return Layout(tuple(axes[: len(sites)]), tuple(axes[len(sites) :]))


def exchanged(rows: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of all rows, once with the last in the place of the first, once the other way round."""
    first, last = torch.arange(rows), torch.arange(rows)
    first[0], last[-1] = rows - 1, 0
    return first, last


class _Seen:
    """What a pass has at its sites and losses; a rule that changes nothing."""

    def __init__(self, closure: Closure) -> None:
        self._values: list[Tensor] = []
        done = run_pass(closure, self, record_losses=True)
        self.sites: list[Site] = done.sites
        self.means = all(loss.is_mean for loss in done.losses)
        self.tensors = [*self._values, *(loss.outputs.detach() for loss in done.losses)]

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        self._values.append(h.detach().clone())
        return h

    def again(self, index: int, h: Tensor) -> Tensor:
        return h


def differs(a: Tensor, b: Tensor) -> Tensor:
    """Where a tensor is another than it was, but for rounding."""
    # other rows beside it may change the last digits of a row
    return (a - b).abs() > 1e-4 * a.abs().amax()


def axis_of(changed: Sequence[Tensor], rows: int, dims: Sequence[int]) -> RowAxis | None:
    """Find the one axis along which only row 0 changed in the first case and only the last in the second.

    Args:
        changed: Where the tensor changed in the two cases.
        rows: Number of rows in the batch.
        dims: The dimensions that come into question.

    Returns:
        The axis; None if there is none, or more than one.
    """
    found = []
    for dim in dims:
        for first in (True, False):
            size, rest = divmod(changed[0].shape[dim], rows)
            if size == 0 or rest or (size == 1 and not first):
                continue
            axis = RowAxis(dim, first, size)
            places = [axis.unfold(c.shape, rows) for c in changed]
            moved = [
                c.reshape(shape).movedim(d, 0).flatten(1).any(1) for c, (shape, d) in zip(changed, places, strict=True)
            ]
            if all(int(m.sum()) == 1 and bool(m[row]) for m, row in zip(moved, (0, -1), strict=True)):
                found.append(axis)
    return found[0] if len(found) == 1 else None
