"""Dropout whose masks are the same for every example: each draw is one sampled network for all of them.

By default every row of a batch gets masks of its own, so every example is judged by other networks. For what compares
examples (BatchBALD, a curve over a grid) one wants the same networks for all: the same masks in every batch, and in
every row of it. Where the rows lie at a site is found by running two copies of the batch at once, and, where a row has
several entries there, by exchanging rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dropreg.errors import UnsupportedSiteError
from lightning_dropreg.estimators.layout import RowAxis, axis_of, differs, exchanged
from lightning_dropreg.estimators.rows import select_rows
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.numerics.noise import KeyedGenerators, fold_key
from lightning_dropreg.uncertainty.repetition import Forward, copy_batch, count_rows

__all__ = ["FixedMasks", "row_axes"]


class FixedMasks:
    """A rule: dropout with one mask for all rows, drawn for each copy of the batch from a key of its own.

    Args:
        key: Seed of the masks.
        first: Number of the first copy's draw.
        axes: Where the rows are at each site, None where the mask has none.
        rows: Number of rows in the batch.
    """

    def __init__(self, key: int, first: int, axes: list[RowAxis | None], rows: int) -> None:
        self._key = key
        self._first = first
        self._axes = axes
        self._rows = rows
        self._met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        index, self._met = self._met, self._met + 1
        axis = self._axes[index]
        if axis is None:
            return h * self._mask(site, site.mask_shape, h, index, 0)
        total = h.shape[axis.dim] // axis.size
        shape, dim = axis.unfold(site.mask_shape, total)
        of_one = (*shape[:dim], 1, *shape[dim + 1 :])
        masks = [self._mask(site, of_one, h, index, copy) for copy in range(total // self._rows)]
        return h * torch.cat(masks, dim).repeat_interleave(self._rows, dim).reshape(site.mask_shape)

    def _mask(self, site: Site, shape: tuple[int, ...], h: Tensor, index: int, copy: int) -> Tensor:
        generator = KeyedGenerators(fold_key(self._key, self._first + copy, index)).on(h.device)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float32, device=h.device)
        return (uniform >= site.p).to(h.dtype).div_(1 - site.p)


def row_axes(forward: Forward, batch: object) -> tuple[list[RowAxis | None], int]:
    """Find out where the rows of a batch lie at the dropout sites of a prediction.

    Args:
        forward: Maps a batch to the output; must do the same when it is called again.
        batch: The batch.

    Returns:
        One axis for each site, None where the mask has no rows (DropConnect); and the number of rows.

    Raises:
        UnsupportedSiteError: If that cannot be told.
    """
    rows = count_rows(batch)
    one = _seen(forward, copy_batch(batch))
    try:
        two = _seen(forward, copy_batch(batch, 2))
    except (RuntimeError, IndexError) as error:
        raise UnsupportedSiteError(
            f"The prediction fails on another number of rows ({str(error).splitlines()[0]}), and masks='fixed' needs "
            "to know where the rows are. Use masks='per_batch'."
        ) from error
    if len(one) != len(two):
        raise UnsupportedSiteError(
            "With another number of rows the prediction reaches other dropout sites, so that masks='fixed' is unknown. "
            "Use masks='per_batch'."
        )
    others = None
    axes: list[RowAxis | None] = []
    for number, ((site, h), (site_of_two, _)) in enumerate(zip(one, two, strict=True)):
        dims = [d for d, (a, b) in enumerate(zip(site.mask_shape, site_of_two.mask_shape, strict=True)) if b == 2 * a]
        if site.mask_shape == site_of_two.mask_shape:
            axes.append(None)
            continue
        axis = None
        if len(dims) == 1:
            size, rest = divmod(site.mask_shape[dims[0]], rows)
            if not rest and (size == 1 or rows == 1):
                axis = RowAxis(dims[0], True, size)
            elif not rest:
                if others is None:
                    others = [_seen(forward, select_rows(batch, index, 0, rows)) for index in exchanged(rows)]
                axis = axis_of([differs(h, other[number][1]) for other in others], rows, dims)
        if axis is None:
            raise UnsupportedSiteError(
                f"Where the rows of the batch lie at dropout site number {number} ({site.kind}, shape {site.shape}) "
                "cannot be told, so that masks='fixed' is unknown there. Use masks='per_batch'."
            )
        axes.append(axis)
    return axes, rows


def _seen(forward: Forward, batch: object) -> list[tuple[Site, Tensor]]:
    """The sites of a pass without dropout, and the activations there."""
    values: list[Tensor] = []

    def look(site: Site, h: Tensor) -> Tensor:
        values.append(h.detach().clone())
        return h

    with Interception(look) as seen:
        forward(batch)
    return list(zip(seen.sites, values, strict=True))
