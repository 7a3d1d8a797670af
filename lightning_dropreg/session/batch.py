"""One batch of a fit: runs the user's step on it, as often as asked and with the traces of one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_dropreg.errors import (
    DropregError,
    InvalidArgumentError,
    UnsupportedRowsError,
)
from lightning_dropreg.estimators import Pairs
from lightning_dropreg.estimators.counts import Counting, Counts, Rows
from lightning_dropreg.estimators.layout import Layout, RowsNotFoundError
from lightning_dropreg.estimators.rows import draw_rows, select_rows
from lightning_dropreg.passes import Closure
from lightning_dropreg.passes.gradients import Scaler
from lightning_dropreg.passes.holders import Holders
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.passes.last_site import follow
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.session.arguments import Arguments
from lightning_dropreg.session.logs import LogCollector
from lightning_dropreg.step.pass_group import BatchRunner

__all__ = ["Batch", "Pairable", "SkippedError", "loss_of", "structure", "with_loss"]


class SkippedError(Exception):
    """The user's step returned None: Lightning skips such a batch, and so do we."""


@dataclass(frozen=True)
class Pairable:
    """A step that may run with rows twice, and what it must be like to stay so.

    Attributes:
        layout: Where the rows are.
        logged: The names that it logs.
        returned: The structure of what it returns.
    """

    layout: Layout
    logged: tuple[str, ...]
    returned: str

    def plain(self) -> dict[str, Any]:
        """Return it as plain values, for a checkpoint."""
        return {**asdict(self), "layout": self.layout.plain(), "logged": list(self.logged)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Pairable:
        """Return what `plain` was made of."""
        return cls(Layout.of(plain["layout"]), tuple(plain["logged"]), plain["returned"])


class Batch(BatchRunner):
    """One batch: runs the user's step on it."""

    looked_at = True  # by the session, before the first; where its own passes are to show something, not

    def __init__(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        module: LightningModule,
        mean: bool,
        key: int,
        copies: bool = False,
        releases: bool = False,
        scaler: Scaler | None = None,
        pairable: Pairable | None = None,
        stale: Callable[[], None] | None = None,
        reach: Reach | None = None,
        counting: Counting | None = None,
        before: Holders | None = None,
    ) -> None:
        self.counts, self.counting = Counts(), counting
        self.original = original
        self.arguments = Arguments(args, kwargs, copies, f"training_step of {type(module).__name__}")
        self.module = module
        self.key = key
        self.releases = releases
        self.scaler = scaler
        self.pairable = pairable
        self.stale = stale
        self.modified: list[str] = []
        self.lasting = True
        self.late: list[tuple[Tensor, Tensor]] = []
        self.isolation = Isolation(module, mean=mean, late=self.late, reach=reach, before=before)
        self.logs = LogCollector(module)
        self.output: Any = None
        self.returned: Any = None
        self.corrected: dict[Tensor, Tensor] = {}
        self.share = 1.0

    def whole(self) -> Tensor:
        """See `BatchRunner`."""
        return self._run(self.original, trace=self.lasting)

    def run_without_trace(self) -> Tensor:
        """See `BatchRunner`."""
        return self._run(self.original, trace=False)

    def beside(self) -> Tensor:
        """Do as `run_without_trace`, on copies of the batch's tensors."""
        with self.arguments.copying():
            return self.run_without_trace()

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Closure, Rows]:
        """See `BatchRunner`."""
        count = self.row_count(dim)
        rows, _ = draw_rows(count, fraction, dim, key)
        return self._on_rows(rows, dim, count), Rows(rows, count)

    def paired(self, fraction: float, dim: int, key: int, clean: bool = False) -> tuple[Closure, Layout, Pairs] | None:
        """See `BatchRunner`."""
        found = self.pairable
        if found is None:
            return None
        run, pairs, _ = self.on_pairs(fraction, dim, key, trace=self.lasting, clean=clean)
        self.share = pairs.share

        def checked() -> Tensor:
            loss = run()
            traces = tuple(self.logs.names()), structure(self.returned)
            if traces != (found.logged, found.returned) or self.isolation.drew_randomness():
                raise RowsNotFoundError("The step logs or returns something else than at first, or draws at random.")
            return loss

        return checked, found.layout, pairs

    def on_pairs(
        self, fraction: float, dim: int, key: int, trace: bool, clean: bool = False
    ) -> tuple[Closure, Pairs, list[Callable[[], None]]]:
        """Return what runs on all rows, some of them twice and last.

        Args:
            fraction: Fraction of the rows that are there twice.
            dim: Dimension of the rows.
            key: Seed of their choice.
            trace: Whether the run counts as that of the batch.
            clean: Whether those rows are there a third time, undisturbed.

        Returns:
            The closure, how many rows there are of which kind, and what makes of the state after the run those of the
            runs that it stands for.
        """
        count = self.row_count(dim)
        rows, alone = draw_rows(count, fraction, dim, key)
        single = torch.cat([alone, rows]) if clean else alone
        pairs = Pairs(len(single), len(rows), clean)
        hook = self._hook
        cuts: list[Callable[[], None]] = []
        if hook is not None:
            first = torch.empty(count, dtype=torch.long)
            first[single] = torch.arange(pairs.single)
            places = [first]
            if not clean:  # the state of the batch is the mean of those that the two of a pair leave
                places.append(first.clone())
                for number, place in enumerate(places):
                    place[rows] = pairs.single + number * pairs.count + torch.arange(pairs.count)
            cuts = [partial(hook, place, dim) for place in places]
        return self._on_rows(torch.cat([single, rows, rows]), dim, count, trace, cuts), pairs, cuts

    def counts_as(self, returned: Tensor, loss: Tensor) -> None:
        """See `BatchRunner`."""
        self.corrected[returned] = loss

    def forget(self) -> None:
        """See `BatchRunner`."""
        self.isolation.restart()
        self.logs.forget()
        self.output = self.pairable = None
        self.counts.known = None

    @property
    def _hook(self) -> Callable[[Tensor, int], None] | None:
        """What cuts the module's state down to some rows, if it has that."""
        return getattr(self.module, "select_rows", None)

    def on_rows(self, rows: Tensor, dim: int) -> Closure:
        """Return what runs on the rows of these numbers, leaving no trace."""
        return self._on_rows(rows, dim, self.row_count(dim))

    def row_count(self, dim: int) -> int:
        """Return how many rows the batch has along `dim`; 0 if nothing in it has that dimension."""
        return next((leaf.shape[dim] for leaf in self.arguments.tensors if leaf.ndim > dim), 0)

    def _on_rows(
        self, rows: Tensor, dim: int, count: int, trace: bool = False, cuts: Sequence[Callable[[], None]] = ()
    ) -> Closure:
        batch, hook = select_rows(self.arguments.batch, rows, dim, count), self._hook

        def on_rows(*args: Any, **kwargs: Any) -> Any:
            if hook is not None:
                hook(rows, dim)
            try:
                return self.original(*args, **kwargs)
            except (RuntimeError, IndexError, ValueError) as error:
                told = isinstance(error, DropregError) or "out of memory" in str(error)
                if told or hook is not None or len(rows) == count:
                    raise
                raise UnsupportedRowsError(
                    f"training_step of {type(self.module).__name__} failed on {len(rows)} of {count} rows "
                    f"(so many has the first tensor of the batch along batch_dim={dim}) "
                    f"({str(error).splitlines()[0]}). If the module carries a state with a row for every row of the "
                    "batch (a hidden state, a memory), let it define select_rows(self, rows, dim), which cuts that "
                    "state down to the given rows; it is put back afterwards. Otherwise set batch_dim, or "
                    "batch_fraction=None."
                ) from error

        return lambda: self._run(on_rows, trace, cuts, batch)

    def instead(self, step: Callable[..., Any]) -> Batch:
        """Return the same batch for another step; no run of it leaves a trace."""
        other = copy.copy(self)
        other.original, other.lasting, other.shares_body = step, False, False
        other.counts = Counts()
        return other

    def _run(
        self, step: Callable[..., Any], trace: bool, cuts: Sequence[Callable[[], None]] = (), batch: Any = None
    ) -> Tensor:
        output = self.call(step, trace, cuts, batch)
        loss = loss_of(output)
        self.loss = loss.detach()
        # as Lightning would after the backward; a graph in it would live as long as the batch
        detached = self.loss if output is loss else apply_to_collection(output, Tensor, Tensor.detach)
        self.returned = with_loss(detached, self.loss)
        if trace and self.output is None:
            self.output = detached
        return loss

    def call(
        self, step: Callable[..., Any], trace: bool, cuts: Sequence[Callable[[], None]] = (), batch: Any = None
    ) -> Any:
        """Run `step` in the place of the user's and return its whole output."""

        def collecting() -> Any:
            # inside the isolation, which would otherwise keep the collector as the module's attribute
            with self.logs.run(keep=trace):
                return self.arguments.call(follow(step), original=trace and batch is None, batch=batch)

        # what counts of another batch is the one pass over its rows and some of them again
        output, changed = self.isolation.run(collecting, trace, cuts, alone=batch is not None)
        self.modified += [place for place in changed if place not in self.modified]
        return output


def structure(returned: Any) -> str:
    """Describe the structure of what a step returned."""
    return str(tree_flatten(returned)[1])


def loss_of(output: Any) -> Tensor:
    """Return the loss in what a step returned; `SkippedError` where that is None."""
    if output is None:
        raise SkippedError
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss: Tensor = output["loss"]
        return loss
    raise InvalidArgumentError(
        f"training_step returned {type(output).__name__} without a loss in it; return the loss tensor, or a dict whose "
        "'loss' is one."
    )


def with_loss(output: Any, total: Tensor) -> Any:
    """Put `total` in the place of the loss in what a step returned."""
    return total if isinstance(output, Tensor) else {**output, "loss": total}
