"""Figures of a comparison: the validation metric against epoch and against time."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_dropreg.checks import need_matplotlib
from lightning_dropreg.cli.comparison import Comparison
from lightning_dropreg.cli.spread import Spread

__all__ = ["draw_bands", "draw_curves"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
Styles = Mapping[str, Mapping[str, str]]
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")


def draw_curves(comparison: Comparison, folder: Path, styles: Styles | None = None, title: str = "") -> list[Path]:
    """Draw the mean over seeds against epoch and time, each seed as a thin line behind it.

    What is more than half above all the best values, as the first epochs are, is cut off: the ends are close.

    Args:
        comparison: The runs.
        folder: Where ``curves.png`` and ``curves.svg`` go.
        styles: Colour, line and label of configurations, as arguments of matplotlib; by their order and name where
            not given.
        title: Above the figure.

    Returns:
        The files.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = _new_figure(10, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, config in enumerate(comparison.configs):
        style, histories = _style(number, config, styles), _histories(comparison, config)
        label = style.pop("label", config)
        for history in histories:
            left.plot([e for e, _, _ in history], [v for _, v, _ in history], lw=0.6, alpha=0.5, **style)
            right.plot([s for _, _, s in history], [v for _, v, _ in history], lw=0.6, alpha=0.5, **style)
        if histories:
            shared = list(zip(*histories, strict=False))  # as long as the shortest
            values = [mean(value for _, value, _ in point) for point in shared]
            left.plot([point[0][0] for point in shared], values, lw=2, label=label, **style)
            right.plot([mean(seconds for _, _, seconds in point) for point in shared], values, lw=2, **style)
    _cut_off_the_beginning(left, comparison)
    right.set(xlabel="seconds")
    spread = any(len(comparison.of(config)) > 1 for config in comparison.configs)
    lines = "thick: mean over seeds, thin: each seed" if spread else ""
    figure.suptitle("; ".join(part for part in (title, lines) if part), fontsize=10)
    _finish(left, comparison.metric)
    _finish(right, None)
    return _save(figure, folder / "curves")


def draw_bands(comparison: Comparison, title: str, path: Path, styles: Styles | None = None) -> list[Path]:
    """Draw the mean over seeds against the epoch, one standard deviation around it as a band.

    The beginning is cut off as in `draw_curves`.

    Args:
        comparison: The runs.
        title: Above the figure.
        path: Where it goes, without ending.
        styles: As for `draw_curves`.

    Returns:
        The files, PNG and SVG.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = _new_figure(6, 4.2)
    axes = figure.subplots()
    for number, config in enumerate(comparison.configs):
        shared = list(zip(*_histories(comparison, config), strict=False))
        spreads = [(point[0][0], Spread.of([value for _, value, _ in point])) for point in shared]
        points = [(epoch, spread.mean, spread.deviation or 0.0) for epoch, spread in spreads if spread]
        if points:
            epochs, means, deviations = zip(*points, strict=True)
            low = [m - d for m, d in zip(means, deviations, strict=True)]
            high = [m + d for m, d in zip(means, deviations, strict=True)]
            style, best = _style(number, config, styles), comparison.best(config)
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
            label = style.pop("label", config)
            axes.plot(epochs, means, lw=1.8, label=f"{label} ({best})", **style)
    _cut_off_the_beginning(axes, comparison)
    figure.suptitle(title, fontsize=10)
    _finish(axes, comparison.metric)
    if any(len(comparison.of(config)) > 1 for config in comparison.configs):
        axes.set_xlabel("epoch (bands and ±: one standard deviation over seeds)")
    return _save(figure, path)


def _cut_off_the_beginning(axes: Any, comparison: Comparison) -> None:
    bests = [best.mean for config in comparison.configs if (best := comparison.best(config))]
    if bests and comparison.mode == "min" and axes.get_ylim()[1] > 1.5 * max(bests):
        axes.set_ylim(0.95 * min(bests), 1.5 * max(bests))


def _new_figure(width: float, height: float) -> Any:
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style(number: int, config: str, styles: Styles | None) -> dict[str, str]:
    if styles and config in styles:
        return dict(styles[config])
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": "-" if number < len(_COLOURS) else "--"}


def _histories(comparison: Comparison, config: str) -> list[list[tuple[int, float, float]]]:
    return [run.result.history for run in comparison.of(config) if run.result.history]


def _finish(axes: Any, metric: str | None) -> None:
    """Frame and grid; the axes of `metric` get its label, a scale and a legend."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if metric is None:
        return
    axes.set(xlabel="epoch", ylabel=f"validation {metric.removeprefix('val_')}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if metric == "val_ppl":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
    if axes.has_data():
        axes.legend(frameon=False, fontsize=8)


def _save(figure: Any, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}{ending}") for ending in (".png", ".svg")]
    for file in paths:
        figure.savefig(file, dpi=150)
    return paths
