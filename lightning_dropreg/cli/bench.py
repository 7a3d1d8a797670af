"""``dropreg bench``: what does one optimization step cost with each method?"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_dropreg.callbacks import ExplicitPenalty, ImplicitNoise, MiniBatchDropout
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.machine import describe_machine
from lightning_dropreg.cli.step import QUIET_TRAINER, load_weights
from lightning_dropreg.errors import DropregError, InvalidArgumentError

__all__ = ["main"]

REFERENCE = "dropout"
METHODS: dict[str, Callable[[], list[Callback]]] = {
    "no dropout": list,
    REFERENCE: list,
    "Algorithm 2": lambda: [ExplicitPenalty(), ImplicitNoise()],
    "R_approx": lambda: [ExplicitPenalty()],
    "noise only": lambda: [ImplicitNoise()],
    "MiniBatchDropout(k=4)": lambda: [MiniBatchDropout(k=4)],
    "Algorithm 2, double_backward": lambda: [
        ExplicitPenalty(estimator="double_backward"),
        ImplicitNoise(estimator="double_backward"),
    ],
}


@dataclass
class Timing:
    """Milliseconds of every timed step of one method, by round."""

    method: str
    rounds: list[list[float]] = field(default_factory=list)
    problem: str = ""

    def quantiles(self) -> list[float]:
        """Return lower quartile, median and upper quartile over all steps."""
        return statistics.quantiles([ms for one in self.rounds for ms in one], n=4)

    def ratio(self, reference: "Timing") -> float:
        """Median over rounds of the ratio to the reference in the same round.

        Args:
            reference: What to compare with.

        Returns:
            The ratio.
        """
        pairs = zip(self.rounds, reference.rounds, strict=True)
        return statistics.median(statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs)


class _Stopwatch(Callback):
    def __init__(self) -> None:
        self.ms: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = self._now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ms.append(1000 * (self._now(pl_module) - self._start))

    @staticmethod
    def _now(pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.

    Raises:
        InvalidArgumentError: If there are too few steps or rounds.
    """
    cli = DropregCLI(["bench", *args], description=__doc__, add_options=_add_options)
    options = cli.config
    if options["repeats"] < 1 or options["steps"] < 2 or options["warmup"] < 0:
        raise InvalidArgumentError(
            "bench needs --repeats of at least 1, --steps of at least 2, --warmup of at least 0."
        )
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    load_weights(cli)
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")  # as meant
    machine = describe_machine(cli.model)
    timings = _measure(cli, options["repeats"], options["steps"], options["warmup"])
    if options["json"]:
        print(json.dumps({"machine": machine, "timings": [_as_dict(t, timings) for t in timings]}, indent=2))
    else:
        _print(timings, machine, options)


def _add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="Rounds; in each, every method runs once.")
    parser.add_argument("--steps", type=int, default=10, help="Timed steps of each method in a round, at least 2.")
    parser.add_argument("--warmup", type=int, default=3, help="Steps before them that are not timed.")
    parser.add_argument("--threads", type=int | None, default=None, help="Threads of torch; its own choice by default.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def _measure(cli: DropregCLI, repeats: int, steps: int, warmup: int) -> list[Timing]:
    weights = deepcopy(cli.model.state_dict())
    batches = _batches(cli, steps + warmup)
    timings = [Timing(method) for method in METHODS]
    for turn in range(repeats):
        # Interleaved, and in another order every round: a machine that gets slower slows every method alike.
        for timing in timings[turn % len(timings) :] + timings[: turn % len(timings)]:
            if timing.problem:
                continue
            cli.model.load_state_dict(weights)
            watch = _Stopwatch()
            restore = _without_dropout(cli.model) if timing.method == "no dropout" else None
            try:
                trainer = cli.instantiate_trainer(
                    callbacks=[*METHODS[timing.method](), watch],
                    **{**QUIET_TRAINER, "limit_train_batches": 1.0},
                )
                trainer.fit(cli.model, train_dataloaders=batches)
                timing.rounds.append(watch.ms[warmup:])
            except DropregError as error:
                timing.problem = str(error)
            finally:
                if restore:
                    restore()
    return timings


def _batches(cli: DropregCLI, count: int) -> DataLoader[Any]:
    """Read the batches that every method gets.

    Returns:
        A loader of the first `count` batches, as the configured loader gives them.

    Raises:
        InvalidArgumentError: If there are fewer, or several data loaders.
    """
    seen: list[Any] = []

    class Reader(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not isinstance(trainer.train_dataloader, Iterable) or isinstance(trainer.train_dataloader, dict):
                raise InvalidArgumentError("bench needs one training data loader, not a collection of them.")
            seen.extend(islice(trainer.train_dataloader, count))

    trainer = cli.instantiate_trainer(callbacks=[Reader()], **{**QUIET_TRAINER, "limit_train_batches": 1})
    trainer.fit(cli.model, datamodule=cli.datamodule)
    if len(seen) < count:
        raise InvalidArgumentError(
            f"The training data has {len(seen)} batches, bench needs {count}: lower --steps or --warmup."
        )
    return DataLoader(cast("Dataset[Any]", seen), batch_size=None, collate_fn=lambda batch: batch)


def _without_dropout(model: LightningModule) -> Callable[[], None]:
    """Set every drop probability of the model's modules to 0.

    Returns:
        What undoes it.
    """
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"
        if isinstance(getattr(module, name, None), float):
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, 0.0)

    def restore() -> None:
        for module, name, value in changed:
            setattr(module, name, value)

    return restore


def _as_dict(timing: Timing, timings: Sequence[Timing]) -> dict[str, object]:
    if timing.problem or not timing.rounds:
        return asdict(timing)
    low, median, high = timing.quantiles()
    return {
        "median_ms": median,
        "quartiles_ms": [low, high],
        "ratio": _ratio(timing, timings),
        **asdict(timing),
    }


def _ratio(timing: Timing, timings: Sequence[Timing]) -> float | None:
    reference = next(t for t in timings if t.method == REFERENCE)
    return None if reference.problem else timing.ratio(reference)


def _print(timings: Sequence[Timing], machine: dict[str, str | int], options: Any) -> None:
    table = Table(title="One optimization step", title_justify="left")
    table.add_column("method", overflow="fold")
    for heading in ("median ms", "quartiles ms", f"ratio to {REFERENCE}"):
        table.add_column(heading, justify="right")
    for timing in timings:
        if timing.problem:
            table.add_row(timing.method, "", "", escape(timing.problem))
            continue
        low, median, high = timing.quantiles()
        ratio = _ratio(timing, timings)
        table.add_row(
            timing.method, f"{median:.1f}", f"{low:.1f} - {high:.1f}", "" if ratio is None else f"{ratio:.2f}"
        )
    console = get_console()
    console.print(table)
    console.print(
        f"{options['repeats']} rounds of {options['steps']} steps after {options['warmup']} untimed ones, "
        "methods interleaved, the same weights and batches for all; ratio: median over rounds.\n"
        + "  ".join(f"{name}: {value}" for name, value in machine.items() if value),
        highlight=False,
    )
