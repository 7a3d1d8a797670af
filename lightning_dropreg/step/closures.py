"""One batch without a Trainer: runs a closure as often as asked, with the traces of one run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_instance
from lightning_dropreg.estimators.counts import Counts, Rows
from lightning_dropreg.estimators.rows import draw_rows
from lightning_dropreg.inspection.choice import chosen_estimator
from lightning_dropreg.interception.mode import constants_marked
from lightning_dropreg.numerics.noise import draw_key, of_this_rank
from lightning_dropreg.passes import Closure
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.passes.last_site import follow
from lightning_dropreg.step.first_time import check_first_time
from lightning_dropreg.step.pass_group import BatchRunner, StepResult
from lightning_dropreg.step.plan import Plan

__all__ = ["ClosureRunner", "OnRows", "run_plan"]

OnRows = Callable[[Tensor], Tensor]
"""Runs forward and loss on the rows of the batch with these numbers, and returns the scalar loss."""


class ClosureRunner(BatchRunner):
    """A closure that runs forward and loss of one batch.

    Args:
        closure: Runs on the whole batch.
        module: The module whose state advances once; None if there is none to keep.
        rows: Runs on some of the rows; None if nothing is estimated on some.
        count: Number of rows in the batch.
        mean: Whether floating-point state becomes the mean of all runs'.
    """

    shares_body = True

    def __init__(
        self, closure: Closure, module: nn.Module | None, rows: OnRows | None = None, count: int = 0, mean: bool = True
    ) -> None:
        self.isolation = Isolation(module, mean=mean)
        self._closure = closure
        self._rows = rows
        self._count = count
        self.counts = Counts()

    def whole(self) -> Tensor:
        """See `BatchRunner`."""
        return self.isolation.run(follow(self._closure))

    def run_without_trace(self) -> Tensor:
        """See `BatchRunner`."""
        return self.isolation.run(self._closure, trace=False)

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Closure, Rows]:
        """See `BatchRunner`."""
        drawn, _ = draw_rows(self._count, fraction, 0, key)
        return self.on(drawn), Rows(drawn, self._count)

    def on(self, numbers: Tensor) -> Closure:
        """Return what runs on the rows of these numbers, leaving no trace."""
        on_rows = self._rows
        assert on_rows is not None
        return lambda: self.isolation.run(lambda: on_rows(numbers), trace=False)

    def forget(self) -> None:
        """See `BatchRunner`."""
        self.isolation.restart()


def run_plan(
    plan: Plan,
    closure: Closure,
    generator: torch.Generator | None,
    module: nn.Module | None,
    rows: OnRows | None = None,
    batch_size: int | None = None,
    mean: bool = True,
) -> StepResult:
    """Make the passes of a plan over one batch.

    Args:
        plan: What to do.
        closure: Runs on the whole batch.
        generator: Source of the seed of the noise; the global one if None.
        module: The module whose state advances once; None if there is none to keep.
        rows: Runs on some of the rows; None if nothing is estimated on some.
        batch_size: Number of rows in the batch; needed with `rows`.
        mean: Whether the state of the module becomes the mean over the passes; see `ClosureRunner`.

    Returns:
        Total loss and its parts.
    """
    check_instance("module", module, (nn.Module, type(None)), "an nn.Module or None")
    if plan.has_choice:
        plan = plan.choosing(chosen_estimator(closure, module, plan.curvature))
    # drawn before the random state is remembered, or the first pass would start from another one
    key = of_this_rank(draw_key(generator))
    runner = ClosureRunner(closure, module, rows, batch_size or 0, mean)
    # a callback looks for unrecognized parts of the loss once, before the first step; here every call does
    with runner.isolation, constants_marked() if plan.needs_losses else nullcontext():
        runner.counting = check_first_time(plan, closure, module, runner.isolation, runner.on, batch_size or 0)
        return plan.run(runner, key, 0)
