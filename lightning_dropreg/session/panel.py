"""What a fit begins with: a few lines that say what was found in the step, what was chosen, and what it will cost."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Sequence

from lightning import Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Pass
from lightning_dropreg.session.others import callbacks_of
from lightning_dropreg.step.description import expected_cost, name_method
from lightning_dropreg.step.plan import Plan

__all__ = ["SILENT", "is_wanted", "panel", "tell"]

SILENT = "DROPREG_PANEL"
"""Set to 0 in the environment, no fit shows a panel."""
_NAMED = 3
_WIDTH = 80


def is_wanted(trainer: Trainer) -> bool:
    """Whether a fit shows its panel: where it shows a summary of the model, unless the environment says no."""
    shown = any(isinstance(callback, ModelSummary) for callback in callbacks_of(trainer))
    return shown and os.environ.get(SILENT, "1") != "0"


def panel(plan: Plan, seen: Pass, choices: Sequence[str]) -> list[tuple[str, str]]:
    """Say what a fit will do, in lines each with its heading."""
    rows = [("method", name_method(plan)), ("sites", _sites(seen.sites))]
    for what, told in (choice.split(" ", 1) for choice in choices):
        rows.append(("rows", told.replace("None:", "all:", 1)) if what == "batch_fraction" else (what, told))
    if "estimator" not in dict(rows) and plan.estimators:
        rows.append(("estimator", ", ".join(sorted(plan.estimators))))
    for dim, fraction in sorted(plan.on_rows):
        if "rows" not in dict(rows):
            rows.append(("rows", f"{fraction:g} of those along dimension {dim}"))
    if strengths := _strengths(plan):
        rows.append(("strength", strengths))
    rows.append(("cost", expected_cost(plan)))
    if seen.unknown:
        rows.append(("left alone", f"random numbers that are no known dropout: {'; '.join(seen.unknown)}"))
    if plan.attention == "ignore":
        rows.append(("left out", "dropout on attention probabilities"))
    return rows


def tell(trainer: Trainer, rows: Sequence[tuple[str, str]]) -> None:
    """Show the lines in a frame, above a progress bar that may be running; by one process."""
    if not trainer.is_global_zero:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in rows:
        table.add_row(heading, text)
    width = min(_WIDTH, shutil.get_terminal_size().columns)
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(Panel(table, title="lightning_dropreg", title_align="left"))
    text = console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", True):
        bar.print(text)
    else:
        print(text, flush=True)


def _sites(sites: Sequence[Site]) -> str:
    if not sites:
        return "none has a positive probability yet"
    told = ", ".join(f"{site.name} (p = {site.p:g})" for site in sites[:_NAMED])
    more = len(sites) - _NAMED
    return f"{len(sites)}: {told}" + (f" and {more} more" if more > 0 else "") + "; p is the paper's q"


def _strengths(plan: Plan) -> str:
    told = []
    if plan.penalty is not None:
        usual = "" if plan.penalty.strength == 1 else " (1 is the second-order value)"
        told.append(f"penalty {plan.penalty.strength:g}{usual}")
    if plan.noise is not None:
        usual = "" if plan.noise.strength == 1 else " (1 is dropout's own)"
        told.append(f"noise {plan.noise.strength:g}{usual}")
    return ", ".join(told)
