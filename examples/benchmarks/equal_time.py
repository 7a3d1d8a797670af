"""Tables and figures of methods that were tuned on text for equal passes, and what is left of them at equal time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.benchmarks import studies
from examples.benchmarks.figures import differences
from examples.benchmarks.later_reports import COULD_BE_SEEN, arm_of
from examples.benchmarks.paired import Difference, Mean, difference
from examples.benchmarks.records import Records
from examples.benchmarks.reports import PLUS_MINUS, head, made_of, write

__all__ = ["reached", "text_time", "transformer"]

Record = dict[str, Any]
PAIRS = [
    ("Algorithm 2", "R"),
    ("Algorithm 2", "R-Drop"),
    ("Algorithm 2", "SAM with dropout"),
    ("Algorithm 2, quarter", "Algorithm 2"),
]
"""The comparisons besides those with dropout, named before the runs."""


def transformer(made: Records) -> None:
    """Write and draw the methods on small transformers, those of which all runs are there."""
    grid = studies.transformer()
    fresh = made_of(made, studies.chosen(grid, made, studies.SEEDS["transformer"]))
    missing = [m for m in dict.fromkeys(run.method for run in grid) if m not in {record["method"] for record in fresh}]
    what = [
        "Small transformers on windows of Penn Treebank, 800 forward and backward passes for all, the best of six",
        "configurations on four tuning seeds, 8 fresh seeds.",
        *([f"Not run, for want of time: {', '.join(missing)}."] if missing else []),
    ]
    title = "Small transformers on Penn Treebank, every method tuned: test NLL"
    _report(made, fresh, made_of(made, [run for run in grid if run.method not in missing]), what, title)


def text_time(made: Records) -> None:
    """Write and draw the methods on small LSTMs."""
    what = [
        "The LSTMs of Table 1 on Penn Treebank, 1,200 forward and backward passes for all, 8 fresh seeds. Dropout,",
        "R-Drop and Algorithm 2 as chosen in text_tuned; R and the quarter with its strength, not chosen for them.",
    ]
    _report(made, made_of(made, studies.text_time()), [], what, "Small LSTMs on Penn Treebank, 1,200 passes: test NLL")


def reached(record: Record, seconds: float) -> Record:
    """Return what a run had come to after so many processor seconds: its record, ``test`` and ``best_step`` as then.

    Args:
        record: With the losses of every seed at every evaluation; its time is taken as spread evenly over its steps.
        seconds: Processor seconds; if all of the run took less, all of it counts.
    """
    inside = [at for at, step in enumerate(record["steps"]) if _seconds(record, step) <= seconds]
    best = [min(inside, key=lambda at: record["each_held_out"][at][seed]) for seed in range(len(record["seeds"]))]
    test = [record["each_test"][at][seed] for seed, at in enumerate(best)]
    return {
        **record,
        "test": test,
        "best_step": [record["steps"][at] for at in best],
        "until": record["steps"][inside[-1]],
    }


def _seconds(record: Record, step: int) -> float:
    return float(record["cpu_seconds"]) * step / float(record["steps"][-1])


def _report(made: Records, fresh: Sequence[Record], tried: Sequence[Record], what: Sequence[str], title: str) -> None:
    by = {record["method"]: record for record in fresh}
    if "dropout" not in by or len(by) < 2:
        return
    dropout, name = by["dropout"], made.path.parent.name
    lines = [*what, ""]
    lines += head(
        "method", "test NLL", "at the last step", "minus dropout", "could be seen", "best step", "of", "CPU s"
    )
    for record in by.values():
        cells = [arm_of(record), Mean.of(record["test"]).text(), Mean.of(record["last_test"]).text()]
        cells += [*_versus(record, dropout), f"{Mean.of(record['best_step']).mean:.0f}", f"{record['steps'][-1]}"]
        lines.append(f"| {' | '.join(cells)} | {record['cpu_seconds']:.0f} |")
    budget = dropout["cpu_seconds"]
    then = {method: reached(record, budget) for method, record in by.items()}
    lines += ["", *_pairs(by), ""]
    lines += [
        f"At equal time: what each had come to within the {budget:.0f} processor seconds of dropout's run (evaluations",
        "included).",
        "",
        *head("method", "steps within it", "test NLL", "minus dropout", "could be seen"),
    ]
    for record in then.values():
        cells = [arm_of(record), f"{record['until']}", Mean.of(record["test"]).text(), *_versus(record, dropout)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_pairs(then)]
    if tried:
        lines += ["", "Tuning seeds:", "", *head("method", "held-out NLL", "test NLL", "CPU s")]
        for r in tried:
            values = " | ".join(Mean.of(r[key]).text() for key in ("held_out", "test"))
            lines.append(f"| {arm_of(r)} | {values} | {r['cpu_seconds']:.0f} |")
    write(made.path.parent / f"{name}.md", [*lines, "", PLUS_MINUS, COULD_BE_SEEN], [*fresh, *tried])
    rows = [(m, r["parameters"], difference(r, dropout)) for m, r in by.items() if m != "dropout"]
    differences(rows, title, "tuned dropout", made.path.parent / name)


def _versus(record: Record, other: Record) -> list[str]:
    return [" | | ", ""] if record["method"] == other["method"] else list(_cells(difference(record, other)))


def _pairs(by: dict[str, Record]) -> list[str]:
    lines = head("comparison", "first minus second", "could be seen")
    for first, second in PAIRS:
        if first in by and second in by:
            lines.append(f"| {first} - {second} | {' | '.join(_cells(difference(by[first], by[second])))} |")
    return lines


def _cells(found: Difference) -> tuple[str, str]:
    return found.row(), f"{3 * (found.error or 0):.4f}"
