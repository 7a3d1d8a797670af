"""Results of several configurations over seeds, and what they say about one another."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_dropreg.cli.spread import Spread, in_digits
from lightning_dropreg.cli.summary import FitResult
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["Column", "Comparison", "Run"]

MISSING = "–"
"""Where there is no number: the reference has no difference to itself."""
_RUN = {"best": float, "best_epoch": int, "epochs": int, "seconds": float, "ms_per_step": float}


@dataclass
class Run:
    """One finished fit."""

    config: str
    seed: int
    result: FitResult


@dataclass
class Column:
    """A column of the tables, the configurations in their order.

    Attributes:
        table: Which of the tables it belongs to: 0 results, 1 differences, 2 time.
        title: What stands above it.
        cells: A number, a mean with its spread, or None where there is none.
    """

    table: int
    title: str
    cells: list[Spread | float | None]

    def texts(self) -> list[str]:
        """Return the cells as they are read; one seed has no spread."""
        return [MISSING if cell is None else self._text(cell) for cell in self.cells]

    def _text(self, cell: Spread | float) -> str:
        if not isinstance(cell, Spread):
            return f"{cell:.4g}"
        return in_digits(cell.mean, self._uncertainty(cell), "+" if self.table == 1 else "")

    def _uncertainty(self, cell: Spread) -> float | None:
        return cell.error if self.table == 1 else cell.deviation

    def numbers(self) -> list[list[str]]:
        """Return title and cells for a machine; a mean takes two columns, the second for its spread."""
        name = {"n": "pairs"}.get(self.title, self.title.replace(" ", "_").replace("'", ""))
        if not any(isinstance(cell, Spread) for cell in self.cells):
            return [[name], *([_number(cell if not isinstance(cell, Spread) else None)] for cell in self.cells)]
        rows = [[f"{name}_difference", f"{name}_difference_se"] if self.table == 1 else [name, f"{name}_sd"]]
        for cell in self.cells:
            known = isinstance(cell, Spread)
            rows.append([_number(cell.mean), _number(self._uncertainty(cell))] if known else ["", ""])  # type: ignore[union-attr,arg-type]
        return rows


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
        """Read ``runs.csv`` and ``history.csv``, as `write` wrote them."""
        runs: dict[tuple[str, int], Run] = {}
        try:
            for row in _read_csv(folder / "runs.csv"):
                key = row.pop("configuration"), int(row.pop("seed"))
                numbers: dict[str, Any] = {name: kind(row.pop(name)) for name, kind in _RUN.items()}
                numbers["mode"] = row.pop("mode", "min")
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
    def mode(self) -> str:
        """Which values of the validation metric are better, ``"min"`` or ``"max"``."""
        return next((run.result.mode for run in self.runs if run.result.metric), "min")

    @property
    def metric(self) -> str:
        """Name of the validation metric."""
        return next((run.result.metric for run in self.runs if run.result.metric), "metric")

    def of(self, config: str) -> list[Run]:
        """Return the runs of one configuration."""
        return [run for run in self.runs if run.config == config]

    def best(self, config: str) -> Spread | None:
        """Return the best value of the metric of one configuration, over its seeds."""
        return Spread.of([self.value(run.result, self.metric) for run in self.of(config)])

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
        best = max if self.mode == "max" else min
        return best((value for _, value, seconds in run.result.history if seconds <= limit), default=math.nan)

    @property
    def metrics(self) -> list[str]:
        """Names of the validation metric and of those of the test."""
        return list(dict.fromkeys([self.metric, *(name for run in self.runs for name in run.result.test)]))

    def value(self, result: FitResult, metric: str) -> float:
        """Return the best value of the validation metric, or the value of a test metric; nan if there is none."""
        return result.best if metric == result.metric else result.test.get(metric, math.nan)

    def paired(self, config: str, metric: str) -> Spread | None:
        """Return the differences to the reference over the seeds that both have: what seeds share drops out of them.

        Returns:
            Their mean and spread; None if there is no such pair, or `config` is the reference.
        """
        if config == self.configs[0]:
            return None
        pairs = [(run.result, other) for run in self.of(config) if (other := self.reference(run.seed))]
        return Spread.of([self.value(mine, metric) - self.value(other, metric) for mine, other in pairs])

    def times(self, config: str) -> Spread | None:
        """Return how many times as long as with the reference the fits of a configuration took."""
        pairs = [(run.result, other) for run in self.of(config) if (other := self.reference(run.seed))]
        return Spread.of([mine.seconds / other.seconds for mine, other in pairs if other.seconds])

    def columns(self) -> list[Column]:
        """Return what the tables hold."""
        configs, runs = self.configs, [self.of(config) for config in self.configs]
        results = [[run.result for run in each] for each in runs]
        found = [Column(0, "seeds", [len(each) for each in runs])]
        for metric in self.metrics:
            title = f"best {metric}" if metric == self.metric else metric
            found.append(Column(0, title, [Spread.of([self.value(r, metric) for r in each]) for each in results]))
        time = [
            Column(2, "epochs", [each[0].epochs for each in results]),
            Column(2, "epoch of best", [mean(r.best_epoch for r in each) for each in results]),
            Column(2, "seconds", [mean(r.seconds for r in each) for each in results]),
        ]
        if len(configs) < 2:
            return [*found, *time]
        pairs = {metric: [self.paired(config, metric) for config in configs] for metric in self.metrics}
        found.append(Column(1, "n", [pair and pair.count for pair in pairs[self.metric]]))
        found += [Column(1, metric, [*cells]) for metric, cells in pairs.items()]
        to_best = [[self.time_to_reference(run) for run in each] for each in runs]
        found += [*time, Column(2, "times the reference", [self.times(config) for config in configs])]
        found.append(Column(2, "to reference's best", [Spread.of(times) for times in to_best]))
        never: list[Spread | float | None] = [sum(map(math.isinf, times)) for times in to_best]
        if any(never):
            found.append(Column(2, "seeds never there", never))
        equal = [Spread.of([self.at_equal_time(run) for run in each]) for each in runs]
        return [*found, Column(2, "best at equal time", [*equal])]

    def tables(self) -> list[tuple[str, list[Column]]]:
        """Return the tables, each with its title."""
        several = len({run.seed for run in self.runs}) > 1
        titles = [
            "Results" + (": mean ± standard deviation over seeds" if several else ""),
            f"Minus {self.configs[0]}, seed by seed" + (": mean ± standard error over n seeds" if several else ""),
            f"Time; 'best at equal time': best {self.metric} within the time of {self.configs[0]}",
        ]
        columns = self.columns()
        found = [(title, [c for c in columns if c.table == number]) for number, title in enumerate(titles)]
        return [(title, columns) for title, columns in found if columns]

    def write(self, folder: Path) -> None:
        """Write the tables as ``table.md``, and numbers as ``table.csv``, ``runs.csv`` and ``history.csv``."""
        lines = []
        for title, columns in self.tables():
            rows = [["configuration", *(c.title for c in columns)], ["---"] * (1 + len(columns))]
            rows += [list(row) for row in zip(self.configs, *(c.texts() for c in columns), strict=True)]
            lines += [f"{title}.", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
        (folder / "table.md").write_text("\n".join(lines), encoding="utf-8")
        numbers = [[["configuration"], *([config] for config in self.configs)]]
        numbers += [column.numbers() for column in self.columns()]
        _write_csv(
            folder / "table.csv", [[cell for cells in row for cell in cells] for row in zip(*numbers, strict=True)]
        )
        tests, modes = self.metrics[1:], ["mode"] if self.mode == "max" else []
        runs: list[list[str]] = [["configuration", "seed", *modes, *_RUN, *tests]]
        history: list[list[str]] = [["configuration", "seed", "epoch", self.metric, "seconds"]]
        for run in self.runs:
            name = [run.config, str(run.seed)]
            runs.append([*name, *([run.result.mode] * len(modes))])
            runs[-1] += [_number(getattr(run.result, key)) for key in _RUN]
            runs[-1] += [_number(run.result.test.get(test)) for test in tests]
            history += [[*name, str(e), _number(value), _number(seconds)] for e, value, seconds in run.result.history]
        _write_csv(folder / "runs.csv", runs)
        _write_csv(folder / "history.csv", history)


def _first_time(result: FitResult, target: float) -> float:
    return next((seconds for _, value, seconds in result.history if result.as_good(value, target)), math.inf)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.8g}"


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
