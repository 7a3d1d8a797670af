"""Measurements from before the studies: their tables and figures, from the files that were kept of them."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

from lightning_dropreg.cli.comparison import Comparison, Run
from lightning_dropreg.cli.curves import draw_curves
from lightning_dropreg.cli.measure import Cost
from lightning_dropreg.cli.summary import FitResult

from .style import style_of_row

__all__ = ["OLDER", "REPORTS"]

OLDER = {
    "time_to_quality": "dropreg compare configs/time_to_quality/*.yaml --seeds 1 2 3 --figure",
    "paper_small": "python examples/reproduce_paper.py --root FOLDER; commit and machine in paper_small/machine.json",
    "quickstart": "quickstart.csv: dropreg fit --config configs/quickstart.yaml (and _dropout, _none)",
    "last_site": "bench_last_site.json: dropreg bench on the quickstart and the transformer, see README.md",
    "campaign": "campaign.json: python tests/campaign/campaign_run.py --runs 600 --seed 23 --json",
    "mutations": "docs/mutations.json: python scripts/mutations.py",
    "versions": "docs/versions.json: python scripts/versions.py",
    "tutorials": "the pictures of docs/tutorials: made anew whenever the pages are built (scripts/docs.sh)",
}
"""What is made by other commands; those in `REPORTS` are drawn anew from what was kept."""


def bench(folder: Path) -> None:
    """Write what a step costs with each method, from the output of ``dropreg bench --json``."""
    models = {}
    for name in ("lstm", "transformer", "quickstart"):
        costs = json.loads((folder / f"bench_{name}.json").read_text(encoding="utf-8"))["costs"]
        models[name] = {cost["method"]: Cost(cost["method"], cost["rounds"]) for cost in costs}
    lines = ["One optimization step as a ratio to a dropout step: median over rounds, lowest and highest round.", ""]
    lines += [f"| method | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for method in models["lstm"]:
        cells = []
        for costs in models.values():
            ratios = costs[method].ratios(costs["dropout"]) if method in costs else []
            cells.append(
                f"{costs[method].ratio(costs['dropout']):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                if ratios
                else ""
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    (folder / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def time_to_quality(folder: Path) -> None:
    """Write and draw perplexity against epochs and seconds."""
    own = folder / "time_to_quality"
    found = Comparison.read(own)
    found.write(own)
    styles = {config: style_of_row(config) for config in found.configs}
    for drawn in draw_curves(found, own, styles, "LSTM 2 x 200 on the Python reference manual"):
        if drawn.suffix == ".svg":
            drawn.unlink()


def paper_small(folder: Path) -> None:
    """Write and draw the paper's rows at small size; of their runs no times were kept."""
    own = folder / "paper_small"
    runs = {}
    for row in _rows(own / "runs.csv"):
        result = FitResult("val_ppl", float(row["best"]), int(row["best_epoch"]), int(row["epochs"]))
        runs[row["configuration"], row["seed"]] = Run(row["configuration"], int(row["seed"]), result)
    for row in _rows(own / "history.csv"):
        point = int(row["epoch"]), float(row["val_ppl"]), float("nan")
        runs[row["configuration"], row["seed"]].result.history.append(point)
    found = Comparison(runs.values(), dict.fromkeys(config for config, _ in runs))
    runpy.run_path(str(folder.parent / "reproduce_paper.py"))["report"](found, own)
    for drawn in own.glob("*.svg"):
        drawn.unlink()


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


REPORTS = {"bench": bench, "time_to_quality": time_to_quality, "paper_small": paper_small}
