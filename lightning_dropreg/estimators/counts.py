r"""What every element of a loss counts in the whole batch, for passes over some of its rows.

Let ``L = sum_t w_t l_t`` be the loss of a batch of ``n`` rows and ``S`` a random set of ``m = f n`` of them, in which
every row is with probability ``f``. A mean over the tokens of ``S`` has the weights ``w_t(S)``: it divides by the
number of tokens that *these* rows have, which is random, so that a row of one token counts as much as one of eight, and
rows without any make it ``0/0``. With the weights of the whole batch, which the pass over it knows, nothing of the kind
happens (Horvitz and Thompson, 1952):

- *Penalty.* ``(1/f) sum_{t in S} w_t Q_t`` with the quadratic forms ``Q_t`` has the mean ``sum_t w_t Q_t``.
- *Noise.* Let ``xi_b = sum_{t in b} w_t grad(J_t delta)`` be the part of row ``b`` in ``xi = sum_b xi_b``. The masks
  of rows are independent and have mean 0, so ``Cov(xi) = sum_b C_b`` with ``C_b = Cov(xi_b)``, and
  ``f^{-1/2} sum_{b in S} xi_b`` has, on average over ``S``, the covariance ``(1/f) sum_b P(b in S) C_b = sum_b C_b``:
  that of the whole batch, exactly, whatever the weights are.

So a pass over ``S`` gets ``L_S = sum_{t in S} (w_t / f) l_t`` for its loss: its penalty is the first, and ``sqrt(f)``
times its noise the second. For rows that count alike that is the mean over ``S``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError, UnsupportedRowsError
from lightning_dropreg.estimators.curvature import element_weights
from lightning_dropreg.estimators.layout import RowAxis
from lightning_dropreg.losses import Loss
from lightning_dropreg.passes.run import Pass, Recount

__all__ = [
    "FIRST",
    "LAST",
    "LEVEL",
    "MEAN",
    "Counting",
    "Counts",
    "Known",
    "Rows",
    "is_level",
    "known_weights",
    "of_rows",
    "weights_in_batch",
]

FIRST, LAST, LEVEL, MEAN = "first", "last", "level", "mean"
"""How the elements of the chosen rows find their weights, see `Counting`."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch.

    Attributes:
        numbers: Which they are, sorted.
        count: How many rows the batch has.
    """

    numbers: Tensor
    count: int

    @property
    def fraction(self) -> float:
        """Which fraction of the rows they are."""
        return len(self.numbers) / self.count


@dataclass(frozen=True)
class Counting:
    """How the elements of every loss find what they count in the whole batch.

    Attributes:
        kinds: For every loss ``"mean"`` (the loss function took the mean, so all elements count the same),
            ``"first"`` or ``"last"`` (they stand in the order of the rows, the number of the row being the slow or the
            fast index), or ``"level"`` (all that count at all count the same).
        remainder: Whether dropout acts on a part of the loss that is no recognized loss; of that the mean over rows is
            taken as it is.
    """

    kinds: tuple[str, ...] = ()
    remainder: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of one loss in the whole batch.

    Attributes:
        name: Its function.
        weights: What its elements count.
        is_mean: See `lightning_dropreg.losses.base.Loss`.
        trained: Whether the weights depend on something that is trained.
        as_sum: See `lightning_dropreg.losses.base.Loss`.
    """

    name: str
    weights: Tensor
    is_mean: bool
    trained: bool
    as_sum: Tensor | None = None


class Counts:
    """What the elements of the losses count in the whole batch; noted in the first pass over it."""

    def __init__(self) -> None:
        self.known: list[Known] | None = None

    def note(self, done: Pass) -> Tensor:
        """Note it, in the first pass; a `lightning_dropreg.passes.run.Recount` that leaves the loss as it is."""
        if self.known is None:
            self.known = known_weights(done.loss, done.losses)
        return done.loss

    def on(self, rows: Rows, counting: Counting | None) -> Recount:
        """Return what gives a pass over some rows the loss ``sum (w_t / f) l_t``.

        Args:
            rows: The rows.
            counting: How elements find their weights; None if that must be told from the losses alone.

        Returns:
            The `lightning_dropreg.passes.run.Recount`.
        """
        known = self.known or []
        open_end = counting is not None and counting.remainder

        def recount(done: Pass) -> Tensor:
            if not known:  # nothing is recognized: the mean over these rows, as was found right before training
                return done.loss
            needed = open_end or any(one.trained or not one.is_mean for one in known)
            own = element_weights(done.loss, done.losses) if needed else None
            total = done.loss.new_zeros(())
            weights = weights_in_batch(done.losses, known, rows, counting, own)
            for number, (loss, right) in enumerate(zip(done.losses, weights, strict=True)):
                values = loss.per_element(loss.elements)
                loss.as_sum = known[number].as_sum
                trained = own is not None and known[number].trained
                w = _as_trained(own[number], right) if own is not None and trained else right
                total = total + (w / rows.fraction * values).sum()
                if own is not None and open_end:
                    total = total - (own[number] * values).sum()
            return total + done.loss if open_end else total

        return recount


def known_weights(total: Tensor, losses: Sequence[Loss]) -> list[Known]:
    """Read off what the elements of the losses count; nothing where they have no fixed weights (a focal factor)."""
    try:
        weights = element_weights(total, losses) if losses else []
    except LossNotRecognizedError:
        return []
    return [
        Known(loss.name, w.detach(), loss.is_mean, w.requires_grad, loss.counts_as_sum(w.detach()))
        for loss, w in zip(losses, weights, strict=True)
    ]


def weights_in_batch(
    losses: Sequence[Loss],
    known: Sequence[Known],
    rows: Rows,
    counting: Counting | None = None,
    own: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return what the elements of a pass over some rows count in the whole batch.

    Args:
        losses: The losses of that pass.
        known: What is known of the whole batch.
        rows: The rows.
        counting: See `Counts.on`.
        own: What the elements count in that pass; needed where a loss took no mean.

    Returns:
        One tensor for every loss, in the shape of its `Loss.per_element`.

    Raises:
        UnsupportedRowsError: If the pass has other losses, or its elements are not those of the rows.
    """
    names, others = [one.name for one in known], [loss.name for loss in losses]
    if names != others:
        raise UnsupportedRowsError(
            f"The step computes the losses {', '.join(names)} on the whole batch and {', '.join(others) or 'none'} on "
            f"{len(rows.numbers)} of its {rows.count} rows, so these do not stand for all. Use batch_fraction=None."
        )
    kinds: Sequence[str | None] = counting.kinds if counting is not None else ()
    if len(kinds) != len(losses):
        kinds = [None] * len(losses)
    return [
        _weights(loss, one, rows, kind, None if own is None else own[number])
        for number, (loss, one, kind) in enumerate(zip(losses, known, kinds, strict=True))
    ]


def _weights(loss: Loss, known: Known, rows: Rows, kind: str | None, own: Tensor | None) -> Tensor:
    values = loss.per_element(loss.elements.detach())
    if not known.weights.numel():
        return torch.zeros_like(values)
    level = known.weights.flatten()[known.weights.abs().argmax()]
    if known.is_mean and loss.is_mean:  # of elements that have their own weight in them, if any
        return level * torch.ones_like(values)
    size, rest = divmod(len(known.weights), rows.count)
    if kind != LEVEL and not rest and size * len(rows.numbers) == len(values):
        return of_rows(known.weights, rows, first=kind != LAST)
    if kind != LEVEL and level.device.type == "cpu" and not is_level(known.weights):
        raise UnsupportedRowsError(
            f"The elements of {loss.name} count differently, and it cannot be told which belong to which row: there "
            f"are {len(known.weights)} of them for {rows.count} rows and {len(values)} for {len(rows.numbers)}. Let "
            "the loss function take the mean (reduction='mean'), or use batch_fraction=None."
        )
    return level * (torch.ones_like(values) if own is None else (own.isfinite() & (own != 0)).to(values.dtype))


def is_level(weights: Tensor) -> bool:
    """Whether all elements that count at all count the same; reads values."""
    counting = weights[weights != 0]
    return not counting.numel() or bool((counting - counting.flatten()[0]).abs().max() <= 1e-5 * counting.abs().max())


def of_rows(values: Tensor, rows: Rows, first: bool) -> Tensor:
    """Take the entries of some rows of what has, along its first dimension, the same number for every row."""
    axis = RowAxis(0, first, len(values) // rows.count)
    shape, dim = axis.unfold(values.shape, rows.count)
    return values.reshape(shape).index_select(dim, rows.numbers.to(values.device)).flatten(0, 1)


def _as_trained(own: Tensor, right: Tensor) -> Tensor:
    """The values of `right` with the derivative of `own` in what is trained (a learned weight of the loss)."""
    usable = own.isfinite() & (own != 0)
    one = torch.ones_like(own)
    ratio = torch.where(usable, right / torch.where(usable, own, one).detach(), torch.zeros_like(right))
    return torch.where(usable, own, one) * ratio
