"""What was found, as tables for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lightning_dropreg.diagnostics.diagnosis import Diagnosis, trusted
from lightning_dropreg.diagnostics.effect import EffectReport
from lightning_dropreg.diagnostics.noise import NoiseReport
from lightning_dropreg.diagnostics.numbers import common_exponent, with_margin
from lightning_dropreg.diagnostics.statistics import Interval

__all__ = ["show", "tables"]

Row = tuple["str | Interval", ...]
NEGLIGIBLE = 1e-6
"""Beside the largest number of a table, less than this is shown as ~0."""
LAYERS_SHOWN = 12
COLORS = {"yes": "green", "no": "red", "unclear": "yellow"}


def tables(diagnosis: Diagnosis) -> list[Table]:
    """Make the tables of a diagnosis: the effect, its ablations, the sweep over drop probabilities, the noise."""
    effect = diagnosis.effect
    made = [_effect(effect, diagnosis.tolerance)]
    if not effect.problem:
        made.append(_approximations(effect))
    if diagnosis.sweep:
        made.append(_sweep(diagnosis))
    if diagnosis.noise is not None:
        made.append(_noise(diagnosis.noise))
    return made


def show(console: Console, diagnosis: Diagnosis, lines: Sequence[str]) -> None:
    """Print the tables and, below them, what they say in words (`lightning_dropreg.diagnostics.read`)."""
    for table in tables(diagnosis):
        console.print()
        console.print(table)
    console.print("\nReading", style="bold")
    for line in lines:
        console.print(Padding(line.replace(" %", "\u00a0%"), (0, 0, 0, 2)), highlight=False, markup=False)


def _table(title: str, caption: str, headings: Sequence[str], rows: Sequence[Row]) -> Table:
    """Make a table whose numbers share one unit; the first row is about everything and set apart."""
    intervals = [cell for row in rows for cell in row if isinstance(cell, Interval)]
    exponent = common_exponent(intervals)
    negligible = NEGLIGIBLE * max((abs(cell.value) for cell in intervals if not math.isnan(cell.value)), default=0.0)

    def written(cell: str | Interval) -> str:
        if isinstance(cell, str):
            return cell
        return "~0" if abs(cell.value) + cell.margin < negligible else with_margin(cell, exponent)

    unit = f", in units of 1e{exponent}" if exponent else ""
    table = Table(title=title + unit, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for i, heading in enumerate(headings):
        table.add_column(
            heading, justify="right" if i else "left", overflow="fold", no_wrap=bool(i), min_width=0 if i else 12
        )
    for row in rows:
        table.add_row(*map(written, row))
    return table


def _names(effect: EffectReport) -> list[tuple[str, str, int | None]]:
    """Name, drop probability and number of every row."""
    sites = [
        (escape(name), f"{site.p:g}", i) for i, (name, site) in enumerate(zip(effect.names, effect.sites, strict=True))
    ]
    return [("all together", "", None), *sites]


def _effect(effect: EffectReport, tolerance: float) -> Table:
    rows: list[Row] = [
        (
            *(name, q, effect.truth(i), effect.approximation(site=i), effect.remainder(i)),
            _colored(trusted(effect, tolerance, i)),
        )
        for name, q, i in _names(effect)
    ]
    told = ""
    if len(effect.sites) > 1:
        rows.append(("interaction", "", effect.interaction()))
        told = " interaction: all together minus the sum of the sites alone."
    return _table(
        f"Explicit effect of dropout (loss without it: {effect.loss:.4g})",
        f"±: {100 * effect.confidence:g} % confidence, {effect.draws} draws. R_drop: what dropout adds to the "
        "loss on average; R_approx: the same by formula, to second order; remainder: their difference. "
        f"trust: R_approx is within {100 * tolerance:g} % of R_drop.{told}",
        ("site", "q", "R_drop", "R_approx", "remainder", "trust"),
        rows,
    )


def _approximations(effect: EffectReport) -> Table:
    return _table(
        "Ablations of R_approx, and what it misses",
        "left out: second-order term with the curvature of the model; higher: third and higher orders.",
        ("site", "identity", "loss_jacobian", "left out", "higher"),
        [
            (
                *(name, effect.approximation("identity", i), effect.approximation("loss_jacobian", i)),
                *(effect.left_out(i), effect.higher_orders(i)),
            )
            for name, _, i in _names(effect)
        ],
    )


def _sweep(diagnosis: Diagnosis) -> Table:
    return _table(
        "All sites at one drop probability",
        f"{diagnosis.sweep[0][1].draws} draws each.",
        ("q", "R_drop", "R_approx", "remainder", "trust"),
        [
            (
                *(f"{q:g}", report.truth(), report.approximation(), report.remainder()),
                _colored(trusted(report, diagnosis.tolerance)),
            )
            for q, report in diagnosis.sweep
        ],
    )


def _noise(noise: NoiseReport) -> Table:
    order = sorted(range(len(noise.layers)), key=lambda i: -noise.trace_drop(i).value)
    hidden = len(order) - LAYERS_SHOWN
    told = f" {hidden} quieter layers are not shown." if hidden > 0 else ""
    shown = [("all parameters", None), *((escape(noise.layers[i]), i) for i in order[:LAYERS_SHOWN])]
    return _table(
        "Gradient noise of dropout: traces of covariances",
        f"{noise.draws} draws. xi_drop: the noise of dropout; xi_approx: the same by formula; "
        "cosine: of the covariances of xi_drop and xi_approx"
        f"{', by random projections' if noise.sketched else ''}; 1: the same shape, 0: no direction shared.{told}",
        ("layer", "xi_drop", "xi_approx", "signal/noise", "cosine"),
        [
            (
                *(name, noise.trace_drop(i), noise.trace_approx(i)),
                *(with_margin(noise.signal_to_noise(i)), with_margin(noise.alignment(i))),
            )
            for name, i in shown
        ],
    )


def _colored(verdict: str) -> str:
    return f"[{COLORS[verdict]}]{verdict}[/]"
