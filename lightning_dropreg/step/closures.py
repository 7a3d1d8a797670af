"""One batch without a Trainer: runs a closure as often as asked, with the traces of one run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_dropreg.estimators import Pairs
from lightning_dropreg.estimators.layout import Layout
from lightning_dropreg.estimators.rows import draw_rows
from lightning_dropreg.passes import Closure
from lightning_dropreg.passes.gradients import Scaler
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.passes.last_site import follow

__all__ = ["ClosureRunner", "OnRows"]

OnRows = Callable[[Tensor], Tensor]
"""Runs forward and loss on the rows of the batch with these numbers, and returns the scalar loss."""


class ClosureRunner:
    """A closure that runs forward and loss of one batch (a `lightning_dropreg.step.share.BatchRunner`).

    Args:
        closure: Runs on the whole batch.
        module: The module whose state advances once; None if there is none to keep.
        rows: Runs on some of the rows; None if nothing is estimated on some.
        count: Number of rows in the batch.
        mean: Whether floating-point state becomes the mean of all runs'.
    """

    releases = False
    shares_body = True
    scaler: Scaler | None = None

    def __init__(
        self, closure: Closure, module: nn.Module | None, rows: OnRows | None = None, count: int = 0, mean: bool = True
    ) -> None:
        self.isolation = Isolation(module, mean=mean)
        self._closure = closure
        self._rows = rows
        self._count = count

    def whole(self) -> Tensor:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        return self.isolation.run(follow(self._closure))

    def aside(self) -> Tensor:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        return self.isolation.run(self._closure, trace=False)

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Closure, float]:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        on_rows = self._rows
        assert on_rows is not None
        drawn = draw_rows(torch.empty(self._count), fraction, 0, key)
        return lambda: self.isolation.run(lambda: on_rows(drawn), trace=False), len(drawn) / self._count

    def paired(self, fraction: float, dim: int, key: int, clean: bool = False) -> tuple[Closure, Layout, Pairs] | None:
        """See `lightning_dropreg.step.share.BatchRunner`; where the rows lie is not looked for in every batch anew."""
        return None

    def counts_as(self, returned: Tensor, loss: Tensor) -> None:
        """See `lightning_dropreg.step.share.BatchRunner`."""

    def forget(self) -> None:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        self.isolation.restart()

    def drop_stale_gradients(self) -> None:
        """See `lightning_dropreg.step.share.BatchRunner`."""
