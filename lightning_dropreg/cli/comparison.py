"""Results of several configurations over seeds, and what they say about one another."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_dropreg.cli.spread import Spread
from lightning_dropreg.cli.summary import FitResult
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["Comparison", "Run", "Summary"]

MISSING = "–"
"""Where there is no number: one seed has no spread, the reference no difference to itself."""
_RUN = {"best": float, "best_epoch": int, "epochs": int, "seconds": float, "ms_per_step": float}


@dataclass
class Run:
    """One finished fit."""

    config: str
    seed: int
    result: FitResult


@dataclass
class Summary:
    """What a row of the table says about one configuration; a spread is None where there is no number."""

    config: str
    seeds: int
    best: Spread | None
    difference: float
    """Of the mean of `best` to the reference's, in pooled standard deviations; nan if there is only one seed."""
    best_epoch: float
    epochs: int
    test: dict[str, Spread | None]
    seconds: float
    ratio: Spread | None
    """Seconds as a ratio to the reference's."""
    time_to_reference: Spread | None
    never: int
    """Number of seeds that never reached the reference's best."""
    at_equal_time: Spread | None


class Comparison:
    """Finished runs of several configurations; the first configuration is the reference.

    Args:
        runs: The runs.
        configs: Names of the configurations in the order of the table; those without runs are left out.
    """

    def __init__(self, runs: Iterable[Run], configs: Iterable[str]) -> None:
        found = list(runs)
        self.configs = [config for config in configs if any(run.config == config for run in found)]
        self.runs = [run for run in found if run.config in self.configs]

    @classmethod
    def read(cls, folder: Path) -> "Comparison":
        """Read what `write` wrote: ``runs.csv`` and ``history.csv``.

        Args:
            folder: Where they are.

        Returns:
            The comparison.

        Raises:
            InvalidArgumentError: If they are not there, or are not of this form.
        """
        runs: dict[tuple[str, int], Run] = {}
        try:
            for row in _read_csv(folder / "runs.csv"):
                key = row.pop("configuration"), int(row.pop("seed"))
                numbers: dict[str, Any] = {name: kind(row.pop(name)) for name, kind in _RUN.items()}
                test = {name: float(value) for name, value in row.items() if value}
                runs[key] = Run(*key, FitResult(**numbers, test=test))
            for row in _read_csv(folder / "history.csv"):
                result = runs[row.pop("configuration"), int(row.pop("seed"))].result
                epoch, seconds = int(row.pop("epoch")), float(row.pop("seconds"))
                [(result.metric, value)] = row.items()
                result.history.append((epoch, float(value), seconds))
        except (OSError, KeyError, ValueError) as error:
            raise InvalidArgumentError(
                f"{folder} holds no runs.csv and history.csv of `dropreg compare`: {type(error).__name__}: {error}."
            ) from error
        return cls(runs.values(), dict.fromkeys(config for config, _ in runs))

    @property
    def metric(self) -> str:
        """Name of the validation metric."""
        return next((run.result.metric for run in self.runs if run.result.metric), "metric")

    def of(self, config: str) -> list[Run]:
        """Return the runs of one configuration."""
        return [run for run in self.runs if run.config == config]

    def best(self, config: str) -> Spread | None:
        """Return the best value of the metric of one configuration, over its seeds."""
        return Spread.of([run.result.best for run in self.of(config)])

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

    def summaries(self) -> list[Summary]:
        """Summarize each configuration."""
        return [self._summary(config) for config in self.configs]

    def _summary(self, config: str) -> Summary:
        runs = self.of(config)
        results = [run.result for run in runs]
        best, reference = self.best(config), self.best(self.configs[0])
        compared = best is not None and reference is not None and config != self.configs[0]
        ratios = [run.result.seconds / r.seconds if (r := self.reference(run.seed)) else math.nan for run in runs]
        to_best = [self.time_to_reference(run) for run in runs]
        return Summary(
            config,
            len(runs),
            best,
            best.distance_from(reference) if compared and best and reference else math.nan,
            mean(r.best_epoch for r in results),
            results[0].epochs,
            {name: Spread.of([r.test.get(name, math.nan) for r in results]) for name in self._tests()},
            mean(r.seconds for r in results),
            Spread.of(ratios),
            Spread.of(to_best),
            sum(math.isinf(ratio) for ratio in to_best),
            Spread.of([self.at_equal_time(run) for run in runs]),
        )

    def _tests(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.result.test))

    def rows(self) -> list[list[str]]:
        """Return the table to be read, its head first."""
        head = ["configuration", "seeds", f"best {self.metric}", "difference / sd", "epoch", *self._tests(), "time"]
        rows = [[*head, "ratio", "time to reference's best", "best at equal time"]]
        for s in self.summaries():
            never = [f"(never: {s.never} of {s.seeds})"] if s.never else []
            rows.append(
                [
                    s.config,
                    str(s.seeds),
                    _text(s.best),
                    MISSING if math.isnan(s.difference) else f"{s.difference:+.1f}",
                    f"{s.best_epoch:.3g} of {s.epochs}",
                    *(_text(spread) for spread in s.test.values()),
                    f"{s.seconds:.0f} s",
                    _text(s.ratio),
                    " ".join([*([_text(s.time_to_reference)] if s.time_to_reference else []), *never]) or MISSING,
                    _text(s.at_equal_time),
                ]
            )
        return rows

    def write(self, folder: Path) -> None:
        """Write the table as ``table.md``, and numbers as ``table.csv``, ``runs.csv`` and ``history.csv``.

        Args:
            folder: Where to; it exists.
        """
        rows = self.rows()
        lines = [" | ".join(row) for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        (folder / "table.md").write_text("".join(f"| {line} |\n" for line in lines), encoding="utf-8")
        _write_csv(folder / "table.csv", self._table())
        tests = self._tests()
        runs: list[list[str]] = [["configuration", "seed", *_RUN, *tests]]
        history: list[list[str]] = [["configuration", "seed", "epoch", self.metric, "seconds"]]
        for run in self.runs:
            r = run.result
            name = [run.config, str(run.seed)]
            numbers = [f"{r.best:.4f}", f"{r.best_epoch}", f"{r.epochs}", f"{r.seconds:.1f}", f"{r.ms_per_step:.2f}"]
            runs.append([*name, *numbers, *(_number(r.test.get(test)) for test in tests)])
            history += [[*name, str(epoch), f"{value:.4f}", f"{seconds:.2f}"] for epoch, value, seconds in r.history]
        _write_csv(folder / "runs.csv", runs)
        _write_csv(folder / "history.csv", history)

    def _table(self) -> list[list[str]]:
        tests = [f"{test}{part}" for test in self._tests() for part in ("", "_sd")]
        head = ["configuration", "seeds", self.metric, f"{self.metric}_sd", "difference_in_sd", "best_epoch", "epochs"]
        head += [*tests, "seconds", "ratio", "ratio_sd", "time_to_reference", "time_to_reference_sd"]
        rows = [[*head, "never_reached_reference", "best_at_equal_time", "best_at_equal_time_sd"]]
        for s in self.summaries():
            rows.append(
                [
                    *[s.config, str(s.seeds), *_numbers(s.best), _number(s.difference)],
                    *[f"{s.best_epoch:.2f}", str(s.epochs)],
                    *(number for spread in s.test.values() for number in _numbers(spread)),
                    *[f"{s.seconds:.1f}", *_numbers(s.ratio), *_numbers(s.time_to_reference), str(s.never)],
                    *_numbers(s.at_equal_time),
                ]
            )
        return rows


def _first_time(result: FitResult, target: float) -> float:
    return next((seconds for _, value, seconds in result.history if value <= target), math.inf)


def _text(spread: Spread | None) -> str:
    return MISSING if spread is None else str(spread)


def _numbers(spread: Spread | None) -> list[str]:
    return ["", ""] if spread is None else [_number(spread.mean), _number(spread.deviation)]


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
