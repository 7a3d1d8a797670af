"""Whether some of a batch's rows stand for all of them, in a fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from lightning_dropreg.errors import DropregError, InvalidArgumentError
from lightning_dropreg.estimators.counts import Counting, Rows
from lightning_dropreg.estimators.rows import draw_rows
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.inspection.rows import batch_norms, measure_rows
from lightning_dropreg.session.batch import Batch
from lightning_dropreg.step.plan import Plan

__all__ = ["RowsLook"]


@dataclass
class RowsLook:
    """What a look at the rows has shown.

    Attributes:
        counting: How the elements of some rows find what they count in the whole batch; None if no rows are drawn.
        measured: What was measured.
    """

    counting: Counting | None = None
    measured: list[Measured] = field(default_factory=list)

    @property
    def problems(self) -> list[DropregError]:
        """What is wrong."""
        return [each.problem for each in self.measured if each.problem is not None]

    @classmethod
    def at(cls, batch: Batch, plan: Plan) -> RowsLook:
        """Look at the rows on which a plan estimates something.

        Args:
            batch: The batch, its isolation entered.
            plan: The plan.

        Returns:
            What was found.
        """
        look = cls()
        for dim, fraction in sorted(plan.on_rows):
            try:
                drawn, _ = draw_rows(batch.row_count(dim), fraction, dim, batch.key)
            except InvalidArgumentError as problem:
                look.measured.append(Measured("rows_found", outcome="error", problem=problem))
                break
            found = measure_rows(
                batch.run_without_trace,
                partial(batch.on_rows, dim=dim),
                Rows(drawn, batch.row_count(dim)),
                noise=plan.noise is not None or not plan.needs_losses,
                norms=batch_norms(batch.module),
                draws=batch.isolation.drew_randomness,
            )
            look.measured += found.measured
            look.counting = found.counting
            if look.problems:
                break
        return look
