"""Several passes over one batch at once, by repeating its rows.

That is the same as one pass after another only where the rows of a batch do not know of each other and every dropout
mask has rows of its own for them. Whether this is so is found out by trying, with two copies and without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.errors import InvalidArgumentError, NoDropoutSiteError
from lightning_dropreg.estimators.rows import select_rows
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.interception.sites import Rule, Site
from lightning_dropreg.passes import Off
from lightning_dropreg.passes.batches import batch_tensors, fresh_batch

__all__ = ["Forward", "RepeatedBatch", "copy_batch", "count_rows"]

Forward = Callable[[Any], Tensor]
"""Maps a batch to the model's output, ``(N, ...)``; called with dropout in training mode."""


def copy_batch(batch: Any, copies: int = 1) -> Any:
    """Repeat the rows of every tensor of a batch, all rows of the first copy before those of the second.

    Args:
        batch: Any batch; its rows are the first dimension of its first tensor, and of all else of that length.
        copies: How often.

    Returns:
        A batch of the same structure; its tensors are new ones.

    Example:
        >>> copy_batch({"x": torch.tensor([1, 2]), "name": "a"}, 2)
        {'x': tensor([1, 2, 1, 2]), 'name': 'a'}
    """
    rows, fresh = count_rows(batch), fresh_batch(batch, tensors=True)
    return fresh if copies == 1 else select_rows(fresh, torch.arange(rows).repeat(copies), 0, rows)


def count_rows(batch: Any) -> int:
    """Return the length of the first tensor of a batch."""
    return next((len(leaf) for leaf in batch_tensors(batch) if leaf.ndim), 0)


class RepeatedBatch:
    """A batch and a model's forward, run under rules with as many copies at once as the model allows.

    Args:
        forward: Maps a batch to the output; must do the same when it is called again.
        batch: The batch.
        chunk: Largest number of copies in one pass.
        dual: Whether the rules work with dual numbers.
    """

    def __init__(self, forward: Forward, batch: Any, chunk: int, dual: bool = False) -> None:
        self._forward = forward
        self._batch = batch
        self._options: dict[str, Any] = {"written_out": dual}
        if dual:
            from lightning_dropreg.numerics.dual import REPLACEMENTS

            self._options["replacements"] = REPLACEMENTS
        self.chunk = 1
        if chunk > 1 and self._independent():
            self.chunk = chunk

    def run(self, rules: Callable[[int], Sequence[Rule]], count: int) -> Iterator[list[Tensor]]:
        """Run `count` passes under each of a few rules.

        Args:
            rules: Makes the rules for the pass, or the passes at once, that begin at a number.
            count: How many passes each of the rules gets.

        Yields:
            One output ``(copies, N, ...)`` for each rule.

        Raises:
            RuntimeError: If there is no memory for a single pass, or the model raises something else.
        """
        done = 0
        while done < count:
            copies = min(self.chunk, count - done)
            try:
                outputs = [self._pass(rule, copies)[0].unflatten(0, (copies, -1)) for rule in rules(done)]
            except RuntimeError as error:
                if copies == 1 or not _is_out_of_memory(error):
                    raise
                self.chunk = copies // 2
                continue
            done += copies
            yield outputs

    def _pass(self, rule: Rule, copies: int) -> tuple[Tensor, list[Site]]:
        with Interception(rule, **self._options) as seen:
            output = self._forward(copy_batch(self._batch, copies))
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.ndim:
            shape = f" of shape {tuple(output.shape)} and type {output.dtype}" if isinstance(output, Tensor) else ""
            raise InvalidArgumentError(
                f"The prediction must be a floating-point tensor with one row per example (logits, say); it is a "
                f"{type(output).__name__}{shape}. Predict that, or name the field that holds it (output='logits')."
            )
        if not seen.sites and not seen.inactive:
            raise NoDropoutSiteError(
                "No dropout was reached in this prediction, so there is nothing to draw. Check that the model has "
                "dropout and that the prediction runs it (with training=self.training, where it is functional)."
            )
        return output, seen.sites

    def _independent(self) -> bool:
        """Whether two copies at once give twice what one gives, outputs and masks."""
        one, sites = self._pass(Off(), 1)
        try:
            two, sites_of_two = self._pass(Off(), 2)
        except Exception:  # whatever the model has against a batch of another size (a carried state, say; memory)
            return False
        if len(two) != 2 * len(one) or len(sites) != len(sites_of_two):
            return False
        masks = ((math.prod(a.mask_shape), math.prod(b.mask_shape)) for a, b in zip(sites, sites_of_two, strict=True))
        if any(b != 2 * a for a, b in masks):  # shared by the rows of the batch
            return False
        tolerance = torch.finfo(one.dtype).eps ** 0.5
        return torch.allclose(two, torch.cat([one, one]), rtol=tolerance, atol=tolerance, equal_nan=True)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on an accelerator or (an ordinary RuntimeError) on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
