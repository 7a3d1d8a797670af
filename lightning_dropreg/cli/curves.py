"""The figure of a comparison: validation metric against epoch and against time."""

from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_dropreg.cli.comparison import Comparison
from lightning_dropreg.errors import MissingDependencyError

__all__ = ["draw_curves"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LONG = 8
"""Runs of so many epochs are drawn without their beginning."""


def draw_curves(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw the mean over seeds, each seed as a thin line behind it.

    Args:
        comparison: The runs.
        folder: Where ``curves.png`` and ``curves.svg`` go.

    Returns:
        The files.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Figures need matplotlib: pip install 'lightning-dropreg[plot]', or leave out --figure."
        ) from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, config in enumerate(comparison.configs):
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": "-" if number < len(_COLOURS) else "--"}
        histories = [run.result.history for run in comparison.of(config) if run.result.history]
        for history in histories:
            left.plot([e for e, _, _ in history], [v for _, v, _ in history], lw=0.6, alpha=0.5, **style)
            right.plot([s for _, _, s in history], [v for _, v, _ in history], lw=0.6, alpha=0.5, **style)
        if histories:
            _plot_mean(left, right, histories, config, style)
    _leave_out_the_beginning(left, comparison)
    left.set(xlabel="epoch", ylabel=f"validation {comparison.metric.removeprefix('val_')}")
    right.set(xlabel="seconds")
    if comparison.metric == "val_ppl":
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:.0f}")
        left.yaxis.set_minor_formatter("{x:.0f}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    paths = [folder / "curves.png", folder / "curves.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _leave_out_the_beginning(axes: Any, comparison: Comparison) -> None:
    """Fit the axis to what comes after the first quarter: the fall of the first epochs would hide all differences."""
    histories = [history for run in comparison.runs if (history := run.result.history)]
    longest = max(map(len, histories), default=0)
    values = [v for history in histories for _, v, _ in history[longest // 4 :] if isfinite(v)]
    if longest < LONG or not values:
        return
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(max(values))
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_title(f"the first {longest // 4} epochs may lie outside", fontsize=8, loc="left")


def _plot_mean(left: Any, right: Any, histories: list[Any], config: str, style: dict[str, str]) -> None:
    shortest = min(len(history) for history in histories)
    epochs = [histories[0][i][0] for i in range(shortest)]
    values = [mean(history[i][1] for history in histories) for i in range(shortest)]
    seconds = [mean(history[i][2] for history in histories) for i in range(shortest)]
    left.plot(epochs, values, lw=2, label=config, **style)
    right.plot(seconds, values, lw=2, **style)
