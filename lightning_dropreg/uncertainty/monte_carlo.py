"""Predictions with dropout on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_choice, check_count
from lightning_dropreg.interception.sites import Rule
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Drop
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.uncertainty.fixed_masks import FixedMasks, row_axes
from lightning_dropreg.uncertainty.mode import dropout_mode
from lightning_dropreg.uncertainty.repetition import Forward, RepeatedBatch

__all__ = ["MASKS", "draw_predictions"]

MASKS = ("per_batch", "fixed")


@torch.no_grad()
def draw_predictions(
    forward: Forward,
    batch: Any,
    *,
    module: nn.Module,
    passes: int = 32,
    key: int = 0,
    chunk: int = 8,
    training: str | Sequence[str] = "all",
    masks: str = "per_batch",
) -> Tensor:
    """Predict several times, each time with new dropout masks and everything else the same.

    Mode, state and random state are left as they were.

    Args:
        forward: Maps a batch to the output, ``(N, ...)``; usually `module` itself.
        batch: The batch, anything that `forward` takes.
        module: The model, whose dropout is turned on (`lightning_dropreg.uncertainty.mode.dropout_mode`).
        passes: Number of draws ``T``, at least 1.
        key: Seed of the masks; with another `chunk` the draws are other ones.
        chunk: Up to how many draws are made in one pass, by repeating the rows of the batch; at least 1. Less where
            memory runs out; one at a time where a mask is shared by the rows of a batch (DropConnect), or the rows do
            not stand for themselves.
        training: Which modules are in training mode, see `lightning_dropreg.uncertainty.mode.dropout_mode`.
        masks: ``"per_batch"``: every row has masks of its own, and another batch others if `key` is another.
            ``"fixed"``: a draw has one mask for all rows, whatever the batch, so that the same `key` makes every draw
            one sampled network for all examples (with any `chunk`).

    Returns:
        The draws, ``(T, N, ...)``.

    Raises:
        InvalidArgumentError: If an argument is out of range, or the output is no floating-point tensor.
        NoDropoutSiteError: If there is no dropout.
        UnsupportedModuleError: If a pattern of `training` matches nothing.
        UnsupportedSiteError: If the masks are to be fixed and where the rows lie at a site cannot be told.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 2)).eval()
        >>> draw_predictions(net, torch.randn(4, 3), module=net, passes=20).shape
        torch.Size([20, 4, 2])
    """
    check_count("passes", passes)
    check_count("chunk", chunk)
    check_choice("masks", masks, MASKS)
    with Isolation(module) as isolation, dropout_mode(module, training):

        def run(b: Any) -> Tensor:
            return isolation.run(lambda: forward(b), trace=False)

        def rules(first: int) -> list[Rule]:
            return [Drop(fold_key(key, first)) if fixed is None else FixedMasks(key, first, *fixed)]

        repeated = RepeatedBatch(run, batch, chunk)
        fixed = row_axes(run, batch) if masks == "fixed" else None
        return torch.cat([draws for (draws,) in repeated.run(rules, passes)])
