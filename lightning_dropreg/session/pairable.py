"""Whether a step may run with some rows of the batch in it twice: only if it then leaves the same traces."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_dropreg.estimators.layout import Layout, RowsNotFoundError, find_layout
from lightning_dropreg.estimators.one_pass import without_pairs
from lightning_dropreg.passes import Off, run_pass
from lightning_dropreg.passes.structure import modules_below
from lightning_dropreg.session.batch import Batch, Pairable, structure, with_loss

__all__ = ["find_pairable", "signature"]

_CLOSE = 1e-3  # rounding in another order, not another value


def signature(module: nn.Module, batch: Any, dim: int) -> str:
    """Describe what a layout depends on: the shapes of a batch but for its rows, and norms in training mode."""
    leaves, spec = tree_flatten(batch)
    shapes = [(*leaf.shape[:dim], *leaf.shape[dim + 1 :]) for leaf in leaves if isinstance(leaf, Tensor)]
    norms = [m.training for m in modules_below(module) if isinstance(m, nn.modules.batchnorm._NormBase)]
    return f"{shapes} {spec} {norms}"


def find_pairable(
    batch: Batch, fraction: float, dim: int, clean: bool = False, layout: Layout | None = None
) -> Pairable | None:
    """Find the rows in a step, and try whether loss, state, logs and output stay the same with some rows twice.

    A metric would count these rows twice, batch norm would mix them with the others, noise of the user's own would
    make the two of a pair different; such a step is run on the chosen rows separately.

    Args:
        batch: The batch, its isolation entered.
        fraction: Fraction of the rows.
        dim: Their dimension in the batch.
        clean: Whether the rows of pairs stand alone as well.
        layout: Where the rows were in another batch, to try that again: terms of the loss may have come since that do
            not bear rows twice.

    Returns:
        What was found; None if rows have no place of their own, or a trace differs.
    """
    layout = layout or find_layout(partial(batch.on_rows, dim=dim), batch.row_count(dim))
    if layout is None:
        return None
    loss = run_pass(batch.run_without_trace, Off()).loss.detach()
    if batch.isolation.drew_randomness():
        return None
    usual = (loss, batch.isolation.outcome(), batch.logs.last(), batch.returned)
    run, pairs, cuts = batch.on_pairs(fraction, dim, batch.key, trace=False, clean=clean)
    try:
        paired = without_pairs(run, layout, pairs).detach()
    except RowsNotFoundError:
        return None
    logged = batch.logs.last({batch.loss: paired}, pairs.share)
    found = (paired, batch.isolation.outcome(cuts), logged, with_loss(batch.returned, paired))
    if not _alike(usual, found):
        return None
    return Pairable(layout, tuple(batch.logs.names()), structure(batch.returned))


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
    if type(a) is not type(b):
        return False
    if type(a).__module__ == "numpy":
        return bool(numpy.array_equal(a, b))
    return isinstance(a, (bool, int, str, bytes, set, frozenset)) and a == b
