"""Results of several configurations over seeds, and what they say about one another."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from lightning_dropreg.cli.summary import FitResult

__all__ = ["Comparison", "Run", "Spread"]


@dataclass
class Run:
    """One finished fit."""

    config: str
    seed: int
    result: FitResult


@dataclass
class Spread:
    """Mean and standard deviation over seeds; the latter is None for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Summarize `values`, those that are no number left out.

        Args:
            values: One for every seed.

        Returns:
            The spread; None if there is no number.
        """
        numbers = [v for v in values if math.isfinite(v)]
        if not numbers:
            return None
        return cls(mean(numbers), stdev(numbers) if len(numbers) > 1 else None)

    def __str__(self) -> str:
        """``mean ± deviation``."""
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


class Comparison:
    """Finished runs of several configurations; the first configuration is the reference.

    Args:
        runs: The runs.
        configs: Names of the configurations in the order of the table.
    """

    def __init__(self, runs: Sequence[Run], configs: Sequence[str]) -> None:
        self.runs = list(runs)
        self.configs = [config for config in configs if any(run.config == config for run in runs)]

    @property
    def metric(self) -> str:
        """Name of the validation metric."""
        return next((run.result.metric for run in self.runs if run.result.metric), "metric")

    def of(self, config: str) -> list[Run]:
        """Return the runs of one configuration."""
        return [run for run in self.runs if run.config == config]

    def reference(self, seed: int) -> FitResult | None:
        """Return the reference's result for `seed`."""
        found = [run.result for run in self.of(self.configs[0]) if run.seed == seed]
        return found[0] if found else None

    def time_to_reference(self, run: Run) -> float:
        """Return the time to the reference's best value, as a ratio to the time the reference took; inf if never."""
        reference = self.reference(run.seed)
        if reference is None or not reference.history:
            return math.nan
        return _first_time(run.result, reference.best) / _first_time(reference, reference.best)

    def at_equal_time(self, run: Run) -> float:
        """Return the best value within the time of the reference's whole run; nan if there is none."""
        reference = self.reference(run.seed)
        limit = math.nan if reference is None else reference.seconds
        return min((value for _, value, seconds in run.result.history if seconds <= limit), default=math.nan)

    def rows(self) -> list[list[str]]:
        """Return the table, its head first."""
        tests = list(dict.fromkeys(name for run in self.runs for name in run.result.test))
        head = [
            "configuration",
            "seeds",
            f"best {self.metric}",
            "epoch",
            *tests,
            "time",
            "ratio",
            "time to reference's best",
            "best at equal time",
        ]
        rows = [head]
        for config in self.configs:
            runs = self.of(config)
            results = [run.result for run in runs]
            seconds = [
                run.result.seconds / reference.seconds if (reference := self.reference(run.seed)) else math.nan
                for run in runs
            ]
            to_best = [self.time_to_reference(run) for run in runs]
            reached = Spread.of(to_best)
            never = sum(math.isinf(ratio) for ratio in to_best)
            rows.append(
                [
                    config,
                    str(len(runs)),
                    _text(Spread.of([r.best for r in results])),
                    f"{mean(r.best_epoch for r in results):.3g} of {results[0].epochs}",
                    *(_text(Spread.of([r.test.get(name, math.nan) for r in results])) for name in tests),
                    f"{mean(r.seconds for r in results):.0f} s",
                    _text(Spread.of(seconds)),
                    " ".join([_text(reached), *([f"(never: {never} of {len(runs)})"] if never else [])]).strip(),
                    _text(Spread.of([self.at_equal_time(run) for run in runs])),
                ]
            )
        return rows

    def write(self, folder: Path) -> None:
        """Write ``table.csv``, ``table.md``, ``runs.csv`` and ``history.csv``.

        Args:
            folder: Where to; it exists.
        """
        rows = self.rows()
        _write_csv(folder / "table.csv", rows)
        lines = [" | ".join(row) for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        (folder / "table.md").write_text("".join(f"| {line} |\n" for line in lines), encoding="utf-8")
        runs: list[list[str]] = [["configuration", "seed", "best", "best_epoch", "epochs", "seconds", "ms_per_step"]]
        history: list[list[str]] = [["configuration", "seed", "epoch", self.metric, "seconds"]]
        for run in self.runs:
            r = run.result
            name = [run.config, str(run.seed)]
            runs.append(
                [*name, f"{r.best:.4f}", f"{r.best_epoch}", f"{r.epochs}", f"{r.seconds:.1f}", f"{r.ms_per_step:.2f}"]
            )
            history += [[*name, str(epoch), f"{value:.4f}", f"{seconds:.2f}"] for epoch, value, seconds in r.history]
        _write_csv(folder / "runs.csv", runs)
        _write_csv(folder / "history.csv", history)


def _first_time(result: FitResult, target: float) -> float:
    return next((seconds for _, value, seconds in result.history if value <= target), math.inf)


def _text(spread: Spread | None) -> str:
    return "" if spread is None else str(spread)


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
