"""Whether a step may run with some rows of the batch twice: only if it then leaves the same traces."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_dropreg.callbacks.batch import Batch, with_loss
from lightning_dropreg.estimators.one_pass import without_pairs
from lightning_dropreg.layout import Layout, RowsNotFoundError
from lightning_dropreg.passes import Off, run_pass

__all__ = ["leaves_same_traces"]

_CLOSE = 1e-3  # rounding in another order, not another value


def leaves_same_traces(batch: Batch, layout: Layout, fraction: float, dim: int) -> bool:
    """Try whether loss, state, logs and output of a step stay the same with some rows of the batch in it twice.

    A metric would count these rows twice, batch norm would mix them with the others; such a step is run on the chosen
    rows separately.

    Args:
        batch: The batch, its isolation entered.
        layout: Where the rows are.
        fraction: Fraction of the rows.
        dim: Their dimension in the batch.

    Returns:
        Whether they do.
    """
    loss = run_pass(batch.aside, Off()).loss.detach()
    usual = (loss, batch.isolation.outcome(), batch.logs.last(), batch.returned)
    run, pairs, cuts = batch.on_pairs(fraction, dim, batch.key, trace=False)
    try:
        paired = without_pairs(run, layout, pairs).detach()
    except RowsNotFoundError:
        return False
    logged = batch.logs.last({batch.loss: paired})
    found = (paired, batch.isolation.outcome(cuts), logged, with_loss(batch.returned, paired))
    return _alike(usual, found)


def _alike(a: Any, b: Any) -> bool:
    (ours, shape), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(map(_alike_leaf, ours, theirs))


def _alike_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.detach(), b.detach()
        if a.shape != b.shape or a.dtype != b.dtype or a.is_sparse or b.is_sparse:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        scale = float(a.abs().amax()) if a.numel() else 0.0
        return torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE * scale, equal_nan=True)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_CLOSE) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (bool, int, str)) and isinstance(b, (bool, int, str)):
        return a == b
    return type(a) is type(b)
