"""The antithetic pair of some rows, in the one pass over the batch that gives the loss.

Estimating on a fraction ``f`` of the rows costs a pass over the batch and two over the chosen rows, and small passes
are dear: a recurrent network takes as many steps for two rows as for twenty. Here the chosen rows stand in the batch
twice, once with the site factors ``1 + eps r`` and once with ``1 - eps r``; the others stand there once, undisturbed.
One pass over ``(1 + f) B`` rows gives everything. A mean counts the chosen rows twice, so the loss is put right by the
weights that its elements have in it; that of the chosen rows is the mean of their pairs, right up to ``O(eps^2)``. For
``curvature="full"``, which compares the pairs with the loss without noise, they stand among the others as well.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.estimators.antithetic import second_difference
from lightning_dropreg.estimators.base import Estimate
from lightning_dropreg.estimators.curvature import FULL, element_weights, pair_quadratic_form
from lightning_dropreg.estimators.layout import Layout, RowAxis, RowsNotFoundError
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.losses import Loss
from lightning_dropreg.numerics.torch_private import assert_on_device
from lightning_dropreg.passes import Closure, Directions, Pass, run_pass

__all__ = ["Pairs", "one_pass", "without_pairs"]


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


class PerturbPairs:
    """``h (1 + step r)`` and ``h (1 - step r)`` for the two of every pair, ``h`` for the rows that stand alone."""

    def __init__(self, directions: Directions, step: float, axes: tuple[RowAxis, ...], pairs: Pairs) -> None:
        self.directions = directions
        self.step = step
        self.axes = axes
        self.pairs = pairs
        self._met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        position, self._met = self._met, self._met + 1
        axis = self._axis(position)
        if position == 0:
            self._check_pairs(axis, h)
        shapes = []
        for shape in (site.shape, site.mask_shape):
            unfolded, dim = axis.unfold(shape, self.pairs.rows)
            shapes.append((*unfolded[:dim], self.pairs.count, *unfolded[dim + 1 :]))
        of_pairs = replace(site, shape=shapes[0], mask_shape=shapes[1])
        return self._perturbed(axis, h, self.directions.draw(of_pairs, h))

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return self._perturbed(self._axis(index), h, self.directions.at(index))

    def _check_pairs(self, axis: RowAxis, h: Tensor) -> None:
        """Refuse a pass in which the two of a pair differ before anything is perturbed: rows depend on one another."""
        _, plus, minus = axis.split(h.detach(), self.pairs.counts)
        if h.device.type == "cpu" and torch.equal(plus, minus):
            return
        alike = ((plus - minus).abs() <= 1e-4 * plus.abs().amax()).all()
        why = "The two of a pair differ where nothing is perturbed yet."
        if h.device.type != "cpu":
            assert_on_device(alike, why)  # reading it would stall the device
        elif not alike:
            raise RowsNotFoundError(why)

    def _axis(self, position: int) -> RowAxis:
        if position >= len(self.axes):
            raise RowsNotFoundError(f"The step reaches more than the {len(self.axes)} dropout sites it had at first.")
        return self.axes[position]

    def _perturbed(self, axis: RowAxis, h: Tensor, direction: Tensor) -> Tensor:
        pairs = self.pairs
        shape, dim = axis.unfold(h.shape, pairs.rows)
        if axis.size == 1:
            shape, dim, direction = tuple(h.shape), axis.dim, direction.flatten(axis.dim, axis.dim + 1)
        single, plus, minus = h.reshape(shape).split_with_sizes(pairs.counts, dim)
        plus, minus = (  # 1 + step r and 1 - step r, each in one operation
            (half * torch.rsub(direction, 1, alpha=step)).to(h.dtype)
            for half, step in ((plus, -self.step), (minus, self.step))
        )
        return torch.cat([single, plus, minus], dim).reshape(h.shape)


def one_pass(
    closure: Closure,
    layout: Layout,
    pairs: Pairs,
    *,
    curvature: str | None,
    noise: bool,
    step_size: float,
    mask: str,
    key: int,
) -> Estimate:
    """Estimate the loss on all rows, penalty and noise on the pairs.

    Args:
        closure: Runs forward and loss on the rows of `pairs` and returns the scalar loss.
        layout: Where the rows are.
        pairs: How many of them there are of which kind.
        curvature: See `lightning_dropreg.estimators.base.Estimator`.
        noise: See `lightning_dropreg.estimators.base.Estimator`.
        step_size: Step of the pairs.
        mask: See `lightning_dropreg.estimators.base.Estimator`.
        key: See `lightning_dropreg.estimators.base.Estimator`.

    Returns:
        The loss of the whole batch, and penalty and noise of the mean over the chosen rows.

    Raises:
        RowsNotFoundError: If the pass is not what `layout` speaks of, or the two of a pair differ from the start.
    """
    done = run_pass(closure, PerturbPairs(Directions(key, mask), step_size, layout.sites, pairs), record_losses=True)
    loss, weights = _balanced(done, layout, pairs)
    penalty = None if curvature is None else loss.new_zeros(())
    slope = loss.new_zeros(()) if noise else None
    for recorded, w, axis in zip(done.losses, weights, layout.losses, strict=True):
        chosen = w / pairs.fraction  # in the mean over the chosen rows alone
        values = chosen * recorded.per_element(recorded.elements)
        if penalty is not None and curvature == FULL:
            counts = (pairs.single - pairs.count, pairs.count, pairs.count, pairs.count)
            _, clean, plus, minus = axis.split(values, counts)
            penalty = penalty + second_difference(plus, minus, clean, step_size).sum()
        elif penalty is not None and curvature is not None:
            penalty = penalty + _penalty(curvature, recorded, chosen, axis, pairs, step_size) / 2
        if slope is not None:
            _, plus, minus = axis.split(values, pairs.counts)
            slope = slope + (plus.sum() - minus.sum()) / (2 * step_size)
    return Estimate(loss, penalty, slope)


def without_pairs(closure: Closure, layout: Layout, pairs: Pairs) -> Tensor:
    """Return the loss that `one_pass` would find with nothing perturbed: that of the whole batch, up to rounding.

    Args:
        closure: See `one_pass`.
        layout: See `one_pass`.
        pairs: See `one_pass`.

    Returns:
        The loss.

    Raises:
        RowsNotFoundError: See `one_pass`.
    """
    done = run_pass(closure, PerturbPairs(Directions(0), 0.0, layout.sites, pairs), record_losses=True)
    return _balanced(done, layout, pairs)[0]


def _balanced(done: Pass, layout: Layout, pairs: Pairs) -> tuple[Tensor, list[Tensor]]:
    """The loss with every row counted once, and the weights that its elements would have in the batch itself."""
    if len(done.sites) != len(layout.sites) or len(done.losses) != len(layout.losses):
        raise RowsNotFoundError("The step reaches other dropout sites or losses than at first.")
    loss, balanced = done.loss, []
    try:
        weights = element_weights(done.loss, done.losses)
    except LossNotRecognizedError as error:  # where only noise is wanted that is none
        raise RowsNotFoundError(str(error)) from error
    for recorded, w, axis in zip(done.losses, weights, layout.losses, strict=True):
        if not recorded.is_mean:
            raise RowsNotFoundError(f"What the elements of {recorded.name} count is known for these rows only.")
        share = _share(recorded.outputs.shape[0], axis, pairs, w.dtype, w.device).view(-1, *[1] * (w.ndim - 1))
        # a mean is over fewer rows without the second ones: what they weigh together stays
        mass = w if recorded.mass is None else w * recorded.mass
        once = (mass * share).sum()
        right = w * (mass.sum() / once.masked_fill(once == 0, 1.0))
        loss = loss + ((right * share - w) * recorded.per_element(recorded.elements)).sum()
        balanced.append(right)
    return loss, balanced


@functools.lru_cache(maxsize=8)  # the same in every step
def _share(count: int, axis: RowAxis, pairs: Pairs, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How much each of so many examples is of one of the batch."""
    share = torch.ones(count, dtype=dtype, device=device)
    shape, dim = axis.unfold(share.shape, pairs.rows)
    share.view(shape).narrow(dim, pairs.single, 2 * pairs.count).fill_(0.0 if pairs.clean else 0.5)
    return share


def _penalty(curvature: str, loss: Loss, weights: Tensor, axis: RowAxis, pairs: Pairs, step: float) -> Tensor:
    """``sum w u^T M u`` over the chosen examples."""
    if curvature != "loss_hessian":  # which asks for no weight of an example
        of_batch = axis.split(weights.detach() * pairs.fraction, pairs.counts)[:2]
        loss.as_sum = loss.counts_as_sum(torch.cat(list(of_batch)))
    parts = loss.parts(lambda values: axis.split(values, pairs.counts))
    if parts is not None:
        return pair_quadratic_form(curvature, parts[1], parts[2], axis.split(weights, pairs.counts)[1], step)
    # a loss that knows its examples only all together: the second of each pair in the place of the first, and no weight
    # for all others
    numbers = torch.arange(len(weights), device=weights.device)
    _, plus, minus = axis.split(numbers, pairs.counts)
    partner = numbers.index_copy(0, plus, minus)
    alone = torch.zeros_like(weights).index_copy(0, plus, weights[plus])
    return pair_quadratic_form(curvature, loss, loss.reordered(partner), alone, step)
