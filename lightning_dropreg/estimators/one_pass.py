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

import torch
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.estimators.antithetic import second_difference
from lightning_dropreg.estimators.base import Estimate
from lightning_dropreg.estimators.curvature import FULL, element_weights, pair_quadratic_form
from lightning_dropreg.estimators.layout import Layout, RowAxis, RowsNotFoundError
from lightning_dropreg.estimators.pairs import Pairs, PerturbPairs
from lightning_dropreg.losses import Loss
from lightning_dropreg.passes import Closure, Directions, Pass, run_pass

__all__ = ["one_pass", "without_pairs"]


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

    The arguments are those of `lightning_dropreg.estimators.base.Estimator`, but that `closure` runs on the rows of
    `pairs` (how many there are of which kind), which lie where `layout` says.

    Returns:
        The loss of the whole batch, and penalty and noise of the mean over the chosen rows.

    Raises:
        RowsNotFoundError: If the pass is not what `layout` speaks of, or the two of a pair differ from the start.
    """
    done = run_pass(closure, PerturbPairs(Directions(key, mask), step_size, layout.sites, pairs), record_losses=True)
    loss, weights = _balanced(done, layout, pairs)
    penalties, slopes = [], []
    for recorded, w, axis in zip(done.losses, weights, layout.losses, strict=True):
        chosen = w / pairs.fraction  # in the mean over the chosen rows alone
        if curvature == FULL:
            values = chosen * recorded.per_element(recorded.elements)
            counts = (pairs.single - pairs.count, pairs.count, pairs.count, pairs.count)
            _, clean, plus, minus = axis.split(values, counts)
            penalties.append(second_difference(plus, minus, clean, step_size).sum())
        elif curvature is not None:
            penalties.append(_penalty(curvature, recorded, chosen, axis, pairs, step_size) / 2)
        if noise:
            signs = _by_kind(len(w), axis, pairs, (0.0, 0.5 / step_size, -0.5 / step_size), w.dtype, w.device)
            slopes.append(_sum(recorded, chosen * _beside(signs, w)))
    return Estimate(loss, *(sum(each[1:], each[0]) if each else None for each in (penalties, slopes)))


def without_pairs(closure: Closure, layout: Layout, pairs: Pairs) -> Tensor:
    """Return the loss that `one_pass` would find with nothing perturbed: that of the whole batch, up to rounding."""
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
        paired = 0.0 if pairs.clean else 0.5
        share = _beside(_by_kind(len(w), axis, pairs, (1.0, paired, paired), w.dtype, w.device), w)
        # a mean is over fewer rows without the second ones: what they weigh together stays
        mass = w if recorded.mass is None else w * recorded.mass
        once = (mass * share).sum()
        right = w * (mass.sum() / once.masked_fill(once == 0, 1.0))
        loss = loss + _sum(recorded, right * share - w)
        balanced.append(right)
    return loss, balanced


def _sum(loss: Loss, weights: Tensor) -> Tensor:
    return loss.per_element(loss.elements).flatten().dot(weights.flatten())


def _beside(of_examples: Tensor, weights: Tensor) -> Tensor:
    """Numbers of examples, to be multiplied with what has one for every element."""
    return of_examples if weights.ndim == 1 else of_examples.view(-1, *[1] * (weights.ndim - 1))


@functools.lru_cache(maxsize=16)  # the same in every step
def _by_kind(
    count: int, axis: RowAxis, pairs: Pairs, values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One number for each of so many examples: that of the kind that its row is of."""
    rows = torch.repeat_interleave(torch.tensor(values, dtype=dtype), torch.tensor(pairs.counts))
    shape, dim = axis.unfold((count,), pairs.rows)
    return rows.unsqueeze(1 - dim).expand(shape).reshape(count).to(device)


def _penalty(curvature: str, loss: Loss, weights: Tensor, axis: RowAxis, pairs: Pairs, step: float) -> Tensor:
    """``sum w u^T M u`` over the chosen examples."""
    if curvature != "loss_hessian":  # which asks for no weight of an example
        of_batch = axis.split(weights.detach() * pairs.fraction, pairs.counts)[:2]
        loss.as_sum = loss.counts_as_sum(torch.cat(list(of_batch)))
    parts = loss.parts(lambda values: axis.split(values, pairs.counts)[1:])
    if parts is not None:
        up, down = parts
        return pair_quadratic_form(curvature, up, down, axis.split(weights, pairs.counts)[1], step)
    # a loss that knows its examples only all together: the second of each pair in the place of the first, and no weight
    # for all others
    numbers = torch.arange(len(weights), device=weights.device)
    _, plus, minus = axis.split(numbers, pairs.counts)
    partner = numbers.index_copy(0, plus, minus)
    alone = torch.zeros_like(weights).index_copy(0, plus, weights[plus])
    return pair_quadratic_form(curvature, loss, loss.reordered(partner), alone, step)
