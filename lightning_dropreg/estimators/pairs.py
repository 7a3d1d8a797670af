"""What happens at a dropout site where some rows of a batch are there twice: each of the two is perturbed one way."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dropreg.estimators.layout import RowAxis, RowsNotFoundError
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.noise import keyed_signs
from lightning_dropreg.numerics.torch_private import assert_on_device
from lightning_dropreg.passes import Directions

__all__ = ["Pairs", "PerturbPairs", "TracedPairs"]

_SMALL = 1 << 16
"""So many entries are multiplied with a factor each, which is fastest there; of more, only the pairs keep factors."""


@dataclass(frozen=True)
class Pairs:
    """The rows of a pass: those that stand alone, then ``count`` of one sign, then the same of the other.

    Attributes:
        single: Number of rows that stand alone.
        count: Number of pairs.
        clean: Whether the rows of the pairs stand alone as well, as the last of those: three times altogether.
    """

    single: int
    count: int
    clean: bool = False

    @property
    def rows(self) -> int:
        """Number of rows in the pass."""
        return self.single + 2 * self.count

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of the rows of each kind."""
        return self.single, self.count, self.count

    @property
    def share(self) -> float:
        """How many rows the batch has, as a fraction of those of the pass."""
        return self._batch / self.rows

    @property
    def fraction(self) -> float:
        """Fraction of the batch's rows that are in pairs."""
        return self.count / self._batch

    @property
    def _batch(self) -> int:
        return self.single if self.clean else self.single + self.count

    def of_noise(self, axis: RowAxis, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Return the shape that noise for one of every pair has at a tensor of this shape, and where its rows lie."""
        unfolded, dim = axis.unfold(shape, self.rows)
        return (*unfolded[:dim], self.count, *unfolded[dim + 1 :]), dim


class PerturbPairs:
    """``h (1 + step r)`` and ``h (1 - step r)`` for the two of every pair, ``h`` for the rows that stand alone.

    Args:
        directions: The directions ``r`` of one of every pair.
        step: The step.
        axes: Where the rows lie at every site.
        pairs: How many rows there are of which kind.
        at_start: Whether the pass begins with the first of these sites, where the two of a pair are alike yet.
    """

    def __init__(
        self, directions: Directions, step: float, axes: tuple[RowAxis, ...], pairs: Pairs, at_start: bool = True
    ) -> None:
        self.directions = directions
        self.step = step
        self.axes = axes
        self.pairs = pairs
        self.at_start = at_start
        self._met = 0
        self._alike: list[Tensor] = []  # what a graph has found of its first site

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        axis = self._axis(self._met)
        if self._met == 0 and self.at_start:
            _, plus, minus = axis.split(h.detach(), self.pairs.counts)
            if h.device.type != "cpu" or not torch.equal(plus, minus):
                _require(_are_alike(plus, minus))
        self._met += 1
        return self._perturbed(axis, h, self.directions.draw(self._of_pairs(site, axis), h))

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return self._perturbed(self._axis(index), h, self.directions.at(index))

    def traced(self, first: int, count: int) -> TracedPairs | None:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        alike = self._alike if first == 0 and self.at_start else None
        axes = self.axes[first : first + count]
        return TracedPairs(self.directions.key, self.step, self.directions.mask, axes, self.pairs, alike)

    def meet(self, site: Site) -> None:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        axis = self._axis(self._met)
        self._met += 1
        self.directions.meet(self._of_pairs(site, axis))
        while self._alike:
            _require(self._alike.pop())

    def strong(self, first: int) -> PerturbPairs:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        directions = Directions(0, self.directions.mask)
        return PerturbPairs(directions, 1.0, self.axes[first:], self.pairs, self.at_start and first == 0)

    def _of_pairs(self, site: Site, axis: RowAxis) -> Site:
        shape, mask_shape = (self.pairs.of_noise(axis, each)[0] for each in (site.shape, site.mask_shape))
        return Site(site.name, site.p, shape, mask_shape, site.kind)

    def _axis(self, position: int) -> RowAxis:
        if position >= len(self.axes):
            raise RowsNotFoundError(f"The step reaches more than the {len(self.axes)} dropout sites it had at first.")
        return self.axes[position]

    def _perturbed(self, axis: RowAxis, h: Tensor, direction: Tensor) -> Tensor:
        shape, dim = axis.unfold(h.shape, self.pairs.rows)
        if h.numel() > _SMALL:
            # 1 + step r and 1 - step r, each in one operation
            factors = [torch.rsub(direction, 1, alpha=step) for step in (-self.step, self.step)]
            return _multiplied(h, shape, dim, self.pairs.counts, factors)
        one, steps = _constants(self.step, direction.ndim - dim, direction.dtype, direction.device)
        both = (direction.unsqueeze(dim) * steps).add_(1).flatten(dim, dim + 1)
        alone = (*direction.shape[:dim], self.pairs.single, *direction.shape[dim + 1 :])
        factor = torch.cat([one.expand(alone), both], dim)
        if axis.size == 1:
            return (h * factor.flatten(axis.dim, axis.dim + 1)).to(h.dtype)
        return (h.reshape(shape) * factor).to(h.dtype).reshape(h.shape)


@functools.lru_cache(maxsize=16)  # the same in every step
def _constants(step: float, behind: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """1, and the steps of the two of a pair along a dimension with so many behind it."""
    steps = torch.tensor([step, -step], dtype=dtype, device=device).view(2, *[1] * behind)
    return torch.ones((), dtype=dtype, device=device), steps


class TracedPairs:
    """`PerturbPairs` as it stands in a graph; see `lightning_dropreg.passes.traced`.

    Args:
        key: Seed of the directions.
        step: See `PerturbPairs`.
        mask: See `lightning_dropreg.passes.Directions`.
        axes: Where the rows lie at the sites of the graph.
        pairs: See `PerturbPairs`.
        alike: Gets whether the two of every pair are alike at the first site; None where they are not yet, any more.
    """

    def __init__(
        self, key: int, step: float, mask: str, axes: tuple[RowAxis, ...], pairs: Pairs, alike: list[Tensor] | None
    ) -> None:
        self.key = torch.tensor(key)
        self.step = torch.tensor(step, dtype=torch.float64)
        self.elementwise = mask == "elementwise"
        self.axes = axes
        self.pairs = pairs
        self.alike = alike

    def __call__(self, h: Tensor, p: float, mask_shape: tuple[int, ...], position: Tensor, number: int) -> Tensor:
        """See `lightning_dropreg.interception.sites.TracedRule`."""
        if number >= len(self.axes):
            return h  # which `PerturbPairs.meet` will refuse, as the next
        axis, pairs = self.axes[number], self.pairs
        if axis.dim >= h.ndim or h.shape[axis.dim] != pairs.rows * axis.size:
            return h
        shape, dim = axis.unfold(h.shape, pairs.rows)
        if number == 0 and self.alike is not None:
            _, plus, minus = h.detach().reshape(shape).split_with_sizes(pairs.counts, dim)
            self.alike.append(_are_alike(plus, minus))
        of_noise, _ = pairs.of_noise(axis, h.shape if self.elementwise else mask_shape)
        r = keyed_signs(self.key, position, of_noise, noise_dtype(h.dtype), h.device) * math.sqrt(p / (1 - p))
        return _multiplied(h, shape, dim, pairs.counts, [1 + self.step * r, 1 - self.step * r])


def _multiplied(
    h: Tensor, shape: tuple[int, ...], dim: int, counts: tuple[int, int, int], factors: Sequence[Tensor]
) -> Tensor:
    """`h`, seen in a shape with its rows along `dim`, with a factor for either half of the pairs."""
    single, *halves = h.reshape(shape).split_with_sizes(counts, dim)
    moved = [(half * factor).to(h.dtype) for half, factor in zip(halves, factors, strict=True)]
    return torch.cat([single, *moved], dim).reshape(h.shape)


def _are_alike(plus: Tensor, minus: Tensor) -> Tensor:
    return ((plus - minus).abs() <= 1e-4 * plus.abs().amax()).all()


def _require(alike: Tensor) -> None:
    """Refuse a pass in which the two of a pair differ before anything is perturbed: rows depend on one another."""
    why = "The two of a pair differ where nothing is perturbed yet."
    if alike.device.type != "cpu":
        assert_on_device(alike, why)  # reading it would stall the device
    elif not alike:
        raise RowsNotFoundError(why)
