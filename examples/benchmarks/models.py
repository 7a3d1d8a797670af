"""The paper's other models at small size, each once to the end of a small budget: that they train, and to what."""

from __future__ import annotations

import math
from tempfile import TemporaryDirectory
from typing import Any

from lightning_dropreg.cli.app import DropregCLI

from .records import ROOT, Records
from .reports import write

__all__ = ["report", "train"]

MODELS = {
    "Transformer-XL": ("wt103_txl_dropout_1", ["--trainer.max_steps=300", "--trainer.val_check_interval=60"], 1.8),
    "QRNN": ("qrnn_dropout_1", ["--trainer.max_epochs=4"], 2.0),
}
"""A file of configs/small, its budget, and the strength of R in it."""
BUDGETS = {"Transformer-XL": "300 steps", "QRNN": "4 epochs"}
CALLBACK = "--trainer.callbacks+=lightning_dropreg."
MASK = "--trainer.callbacks.mask=elementwise"
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--test_after_fit=false"]
CORPUS = ["--data.corpus=python_manual", "--data.train_fraction=1"]


def train(made: Records) -> None:
    """Make the runs that have not been made: two models by three methods."""
    for model, (config, budget, strength) in MODELS.items():
        penalty = [f"{CALLBACK}ExplicitPenalty", f"--trainer.callbacks.strength={strength}", MASK]
        noise = [f"{CALLBACK}ImplicitNoise", MASK]
        for method, options in {"dropout": [], "R": penalty, "Algorithm 2": [*penalty, *noise]}.items():
            own = [*budget, *CORPUS, *options]
            key = {"part": "fresh", "method": method, "model": model, "options": own, "seeds": [1]}
            made.keep(key, lambda config=config, own=own: _fit(config, own))  # type: ignore[misc]


def _fit(config: str, options: list[str]) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        file = str(ROOT / "configs" / "small" / f"{config}.yaml")
        told = ["fit", "--config", file, "--seed_everything", "1", f"--trainer.default_root_dir={folder}"]
        result = DropregCLI([*told, *QUIET, *options]).fit_summary.result
    measured = {"best": result.best, "best_at": result.best_epoch, "steps": result.steps, "seconds": result.seconds}
    return {**measured, "curve": [value for _, value, _ in result.history]}


def report(made: Records) -> None:
    """Write what they came to."""
    if not made.lines:
        return
    lines = [
        "The paper's other models at small size (`configs/small`) on the embedded corpus, one seed, one run each to",
        "the end of a budget that was stated before. That they train is shown, nothing else: one seed has no spread.",
        "",
        "| model | budget | method | validation perplexity, first | best | last | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in made.lines:
        curve = [value for value in r["curve"] if math.isfinite(value)]
        values = " | ".join(f"{value:.1f}" for value in (curve[0], r["best"], curve[-1]))
        lines.append(f"| {r['model']} | {BUDGETS[r['model']]} | {r['method']} | {values} | {r['steps']} |")
    write(made.path.parent / "models.md", lines, made.lines)
