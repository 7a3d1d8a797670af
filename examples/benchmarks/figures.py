"""The figures of the evidence. Titles say what is shown, and nothing about how it came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .paired import Difference, Mean
from .style import finish, label_of, new_figure, save, style_of

__all__ = ["curves", "differences", "doses", "fitted", "heat_map"]

ERRORS = 2
"""Half the length of an interval, in standard errors."""


def differences(rows: Sequence[tuple[str, dict[str, Any], Difference]], title: str, reference: str, path: Path) -> None:
    """Draw a dot and an interval for each method's paired difference to a reference.

    Args:
        rows: Method, its parameters, difference; from top to bottom.
        title: Above the figure.
        reference: What the differences are to, for the axis.
        path: The file, without ending.
    """
    figure = new_figure(7, 0.8 + 0.32 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color="#000000", linewidth=0.8)
    for height, (method, _, found) in enumerate(reversed(rows)):
        style = style_of(method)
        half = ERRORS * found.error if found.error else None
        axes.errorbar(found.mean, height, xerr=half, color=style["color"], marker=style["marker"], markersize=6, lw=2)
    labels = [label_of(method, parameters) for method, parameters, _ in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    seeds = rows[0][2].seeds
    interval = f"\nmean and ± {ERRORS} standard errors over {seeds} seeds" if seeds > 1 else "\none seed"
    axes.set_xlabel(f"test loss minus that of {reference}, same seed{interval}", fontsize=9)
    figure.suptitle(title, fontsize=10)  # centred on the figure: beside long names the axes are narrow
    finish(axes)
    save(figure, path)


def doses(
    series: Mapping[str, Sequence[tuple[float, Difference]]], title: str, xlabel: str, ylabel: str, path: Path
) -> None:
    """Draw paired differences against a dose, one line for each series.

    Args:
        series: By method: dose and difference.
        title: Above the figure.
        xlabel: The dose.
        ylabel: The difference.
        path: The file, without ending.
    """
    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    axes.axhline(0, color="#000000", linewidth=0.8)
    for method, points in series.items():
        half = [ERRORS * (found.error or 0) for _, found in points]
        values = [found.mean for _, found in points]
        label = f"beside {label_of({'Algorithm 2': 'R', 'DROPOUT_k + xi': 'DROPOUT_k'}[method], {'k': 8})}"
        axes.errorbar([dose for dose, _ in points], values, yerr=half, capsize=2, label=label, **style_of(method))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.suptitle(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    finish(axes)
    save(figure, path)


def heat_map(cells: Mapping[tuple[float, int], Difference], title: str, xlabel: str, ylabel: str, path: Path) -> None:
    """Draw differences in standard errors as a coloured table.

    Args:
        cells: By column and row.
        title: Above the figure.
        xlabel: What the columns are.
        ylabel: What the rows are.
        path: The file, without ending.
    """
    columns, rows = sorted({column for column, _ in cells}), sorted({row for _, row in cells})
    values = [[cells[c, r].in_errors if (c, r) in cells else float("nan") for c in columns] for r in rows]
    figure = new_figure(6.6, 3.4)
    axes = figure.subplots()
    image = axes.imshow(values, cmap="PuOr_r", vmin=-8, vmax=8, aspect="auto", origin="lower")
    for y, r in enumerate(rows):
        for x, c in enumerate(columns):
            if (c, r) in cells:
                found = cells[c, r]
                ink = "#FFFFFF" if abs(found.in_errors) > 5 else "#000000"
                text = f"{found.in_errors:+.1f}\n({found.mean:+.3f})"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
    axes.set_yticks(range(len(rows)), [str(r) for r in rows])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="standard errors")
    save(figure, path)


def curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the mean test loss against the step.

    Args:
        records: One for each method.
        title: Above the figure.
        path: The file, without ending.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for record in records:
        label = f"{label_of(record['method'], record['parameters'])} ({Mean.of(record['test']).mean:.3f})"
        axes.plot(record["steps"], record["mean_test"], label=label, markevery=4, **style_of(record["method"]))
    axes.set(xlabel="step", ylabel="mean test loss")
    low = min(min(record["mean_test"]) for record in records)
    axes.set_ylim(0.97 * low, 1.8 * low)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2, title="(mean over seeds at each seed's best)", title_fontsize=8)
    finish(axes)
    save(figure, path)


def fitted(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw which share of the wrong and of the right training labels is predicted, against the step.

    Args:
        records: One for each method.
        title: Above the figure.
        path: The file, without ending.
    """
    figure = new_figure(8.5, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, which in zip(panels, ("wrong", "right"), strict=True):
        for record in records:
            label = label_of(record["method"], record["parameters"])
            shares = [100 * share for share in record[f"mean_fitted_{which}"]]
            axes.plot(record["steps"], shares, label=label, markevery=4, **style_of(record["method"]))
        axes.set(xlabel="step", ylabel=f"{which} labels predicted (%)")
        finish(axes)
    figure.suptitle(title, fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)
