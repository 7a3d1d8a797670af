"""Makes every study of PROTOCOL.md, with its tables and figures.

python -m examples.benchmarks.run [STUDY ...] [--report]

Studies: ablations claims dose dose8 map tuned40 tuned10 tuned0 negative text labels r_drop
remedies table_1 models r_drop_text text_tuned wikitext transformer text_time step_costs. Run from the root of a
clone; all of them take about three and a half hours. Every finished run is kept as a line of runs.jsonl in the
study's folder, so a command that was stopped goes on. `--report` trains nothing and draws what is there; `--list`
says what that is, and what is made by which other command. `--again` measures what is a single file (what steps cost,
for the most part). What was measured before (bench time_to_quality paper_small) is drawn from the files kept of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from examples import claims
from examples.benchmarks import (
    again,
    equal_time,
    later_reports,
    models,
    older,
    reports,
    step_costs,
    studies,
    text,
    text_reports,
)
from examples.benchmarks.records import Records, Run
from examples.benchmarks.style import plain_label

HERE = Path(__file__).parent
TUNED = {"tuned40": 0.4, "tuned10": 0.1, "tuned0": 0.0}
LAST = ["table_1", "models", "r_drop_text", "text_tuned", "wikitext", "transformer", "text_time", "step_costs"]
STUDIES = [
    "ablations",
    "claims",
    "dose",
    "dose8",
    "map",
    *TUNED,
    "negative",
    "text",
    "labels",
    "r_drop",
    "remedies",
    *LAST,
]
PLAIN: dict[str, tuple[Callable[[], list[Run]], Callable[[Records], None]]] = {
    "ablations": (studies.tuning_of_ablations, reports.ablations),
    "claims": (studies.claims, reports.claims),
    "dose": (studies.beside_penalty, reports.dose),
    "dose8": (studies.beside_dropout, reports.dose),
    "map": (lambda: [run for pair in studies.map_of_noise() for run in pair], reports.map_of_noise),
    "labels": (studies.labels, later_reports.labels),
    "r_drop": (studies.r_drop, later_reports.r_drop),
    "r_drop_text": (studies.r_drop_text, text_reports.r_drop_text),
    "wikitext": (studies.wikitext, text_reports.wikitext),
    "text_time": (studies.text_time, equal_time.text_time),
}
"""Studies in which nothing is chosen: their runs, and what makes tables of them."""

STAGED: dict[str, list[Callable[[Records], Any]]] = {
    "remedies": [
        lambda made: studies.remedies(),
        lambda made: studies.chosen(studies.remedies(), made, studies.SEEDS["remedies"]),
        later_reports.remedies,
    ],
    "table_1": [
        lambda made: [*studies.table_1(), *studies.table_1_tuning()],
        studies.table_1_chosen,
        text_reports.table_1,
    ],
    "text_tuned": [
        lambda made: studies.text_tuned(),
        lambda made: studies.chosen(studies.text_tuned(), made, studies.SEEDS["text_tuned"]),
        text_reports.text_tuned,
    ],
}
"""Studies in which some runs depend on others: the runs of each stage, and what makes tables of them."""

BY_METHOD: dict[str, tuple[list[Run], str, Callable[[Records], None]]] = {
    "transformer": (studies.transformer(), "transformer", equal_time.transformer),
}
"""Studies in which every method is tuned and then run: the tuning runs, the fresh seeds, and what makes tables."""
for _study, _noise in TUNED.items():
    _grid = studies.tuned(_noise)
    BY_METHOD[_study] = _grid, "tuned", partial(reports.tuned, grid=_grid, label_noise=_noise, name=_study)

OWN = {"models": (models.train, models.report), "step_costs": (step_costs.measure, step_costs.report)}
"""Studies with records of their own kind: what makes them, and what makes tables of them."""


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", nargs="*", default=[*STUDIES, *older.REPORTS], metavar="STUDY", help=", ".join(STUDIES)
    )
    parser.add_argument("--report", action="store_true", help="draw what is there, train nothing")
    parser.add_argument("--root", type=Path, help="where the corpus lies: Penn Treebank (WikiText-2 for wikitext)")
    parser.add_argument("--list", action="store_true", help="say what there is, and where it was measured")
    parser.add_argument(
        "--again", nargs="*", choices=[*again.COMMANDS], metavar="FILE", help="measure single files again, or all"
    )
    options = parser.parse_args(args)
    claims.quiet()
    text.ROOT = options.root
    if options.list:
        print_list()
        return
    if options.again is not None:
        for name in options.again or again.COMMANDS:
            print(f"{name}: python {again.COMMANDS[name]}", flush=True)
            again.measure_again(name, HERE)
        older.bench(HERE)
        return
    for study in options.studies:
        run_study(study, train=not options.report)


def run_study(study: str, train: bool) -> None:
    """Make what is missing of a study, then its tables and figures."""
    made = Records(HERE / folder_of(study) / "runs.jsonl")

    def make(runs: Sequence[Run]) -> None:
        for number, run in enumerate(runs if train else []):
            started = time.perf_counter()
            known = made.find(run) is not None
            record = made.make(run)
            value = record.get("failed", f"{sum(record.get('test', [0])) / len(run.seeds):.4f}")
            label = plain_label(run.method, run.parameters, strength=True)
            spent = "kept" if known else f"{time.perf_counter() - started:.0f} s"
            print(f"{study} {run.part} {number + 1}/{len(runs)}: {label}: {value} ({spent})", flush=True)

    if study in PLAIN:
        runs, report = PLAIN[study]
        make(runs())
        report(made)
    elif study in BY_METHOD:
        grid, fresh, report = BY_METHOD[study]
        for method in dict.fromkeys(run.method for run in grid):  # what is stopped has finished methods to show
            make([run for run in grid if run.method == method])
            make(studies.chosen([run for run in grid if run.method == method], made, studies.SEEDS[fresh]))
        report(made)
    elif study == "negative":
        for problem in studies.PROBLEMS:
            grid = studies.negative(problem)
            make(grid)
            make(studies.chosen(grid, made, studies.SEEDS["negative"]))
        reports.negative(made)
    elif study == "text":
        make(studies.text("python manual" if text.ROOT is None else "ptb"))
        text_reports.text(made)
    elif study in STAGED:
        *stages, report = STAGED[study]
        for stage in stages:
            make(stage(made))
        report(made)
    elif study in OWN:
        if train:
            OWN[study][0](made)
        OWN[study][1](made)
    elif study in older.REPORTS:
        older.REPORTS[study](HERE)
    else:
        sys.exit(f"{study} is none of {', '.join([*STUDIES, *older.REPORTS])}")


def print_list() -> None:
    """Say for every study how many runs are kept and of which commits; for what was measured before, how."""
    for study in STUDIES:
        lines = Records(HERE / folder_of(study) / "runs.jsonl").lines
        commits = ", ".join(sorted({line["provenance"]["commit"] for line in lines})) or "-"
        print(f"{study:16} {folder_of(study)}/: {len(lines)} runs kept (commits {commits})")
    print("\nsingle files (--again FILE measures one anew; README.md says on which machine it was):")
    for name, command in again.COMMANDS.items():
        print(f"{name:32} python {command}")
    print("\nmade by other commands:")
    for name, command in older.OLDER.items():
        drawn = "" if name in older.REPORTS else " [not drawn anew]"
        print(f"{name:16} {command}{drawn}")


def folder_of(study: str) -> str:
    """Return the folder of a study; the ablations' strengths and the doses belong to the claims."""
    return {"ablations": "claims", "dose": "claims", "dose8": "claims", **dict.fromkeys(TUNED, "tuned")}.get(
        study, study
    )


if __name__ == "__main__":
    main()
