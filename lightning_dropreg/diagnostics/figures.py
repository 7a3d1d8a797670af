"""What was found, drawn: effect by site, effect over training, approximation against truth. Needs matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dropreg.checks import need_matplotlib
from lightning_dropreg.diagnostics.diagnosis import Diagnosis
from lightning_dropreg.diagnostics.noise import NoiseReport
from lightning_dropreg.diagnostics.statistics import Interval
from lightning_dropreg.estimators.curvature import OF_OUTPUTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "approximation_against_truth",
    "draw",
    "effect_by_site",
    "effect_over_training",
    "noise_by_layer",
]

# Okabe and Ito's palette, which can be told apart with any kind of colour vision; the markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TRUTH, APPROX = r"$R_\mathrm{drop}$ (true)", r"$R_\mathrm{approx}$"
GRAY = "#777777"
TWO_IN_A_ROW, LONGEST = 24, 40
"""Characters of a name in a legend of two columns, and of any name."""
XI_DROP, XI_APPROX = r"$\xi_\mathrm{drop}$ (true)", r"$\xi_\mathrm{approx}$"
LAYERS = 20
"""Layers in a figure; the loudest ones."""
FAR_APART = 30
"""Between the largest effect and most of them, from which on an axis is logarithmic."""
LABELLED = 12
"""Sites that have their names beside them in a cloud of points."""
LINES = 6
"""Sites with a line of their own over training; the largest ones."""


def draw(history: Sequence[Diagnosis], folder: Path) -> list[Path]:
    """Draw what there is to draw, each figure as PNG and as SVG.

    Args:
        history: Diagnoses of one run in the order of training; the figures by site show the last.
        folder: Where to write; made if it is not there.

    Returns:
        The files.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    need_matplotlib()
    figures = {"effect_by_site": effect_by_site(history[-1])}
    if not history[-1].effect.problem:
        figures["approximation_against_truth"] = approximation_against_truth(history)
    if history[-1].noise is not None:
        figures["noise_by_layer"] = noise_by_layer(history[-1].noise)
    if len(history) > 1:
        figures["effect_over_training"] = effect_over_training(history)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=150)
            paths.append(path)
    return paths


def effect_by_site(diagnosis: Diagnosis) -> Figure:
    """Draw truth and approximations for every site alone and for all together.

    Returns:
        The figure: truth and ``R_approx`` on the left, the ablations on the right, both on one scale.
    """
    effect = diagnosis.effect
    sites = sorted(range(len(effect.sites)), key=lambda i: effect.truth(i).value)
    rows: list[int | None] = [*sites, None]
    labels = [f"{_short(effect.names[i])}  (q = {effect.sites[i].p:g})" for i in sites] + ["all together"]
    panels: list[list[tuple[str, list[Interval], int]]] = [[(TRUTH, [effect.truth(i) for i in rows], 0)]]
    if not effect.problem:
        panels[0].append((APPROX, [effect.approximation(site=i) for i in rows], 1))
        panels.append(
            [
                (f"{curvature} ablation", [effect.approximation(curvature, i) for i in rows], 2 + n)
                for n, curvature in enumerate(OF_OUTPUTS[1:])
            ]
        )
    longest = max(len(label) for label in labels)
    figure = _figure(3.6 * len(panels) + 0.075 * longest, 1.9 + 0.42 * len(rows))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    sizes = sorted(abs(i.value) for panel in panels for _, intervals, _ in panel for i in intervals if i.value)
    far_apart = len(sizes) > 1 and sizes[-1] > FAR_APART * sizes[len(sizes) // 4]
    for ax, panel in zip(axes, panels, strict=True):
        for n, (label, intervals, style) in enumerate(panel):
            shift = 0.14 * (1 if n == 0 else -1) * (len(panel) > 1)
            _points(ax, intervals, [y + shift for y in range(len(rows))], style, label)
        ax.axvline(0, color=GRAY, linewidth=0.8, zorder=0)
        ax.axhspan(len(rows) - 1.5, len(rows) - 0.5, color="#EEEEEE", zorder=0)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlabel("added to the loss of this batch" + (", logarithmic away from 0" if far_apart else ""))
        ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        if far_apart:
            ax.set_xscale("symlog", linthresh=sizes[len(sizes) // 4])
            ax.tick_params(axis="x", labelsize=8, rotation=30)
        else:
            ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
            ax.locator_params(axis="x", nbins=5)
        _legend_above(ax)
    axes[0].set_yticks(range(len(rows)), labels)
    figure.suptitle(f"Explicit effect of dropout by site ({_intervals(diagnosis)})", fontsize=10)
    return figure


def noise_by_layer(noise: NoiseReport) -> Figure:
    """Draw how much gradient noise each layer has, and how alike the directions of truth and approximation are.

    Returns:
        The figure: traces of the covariances on the left, the cosine between them on the right.
    """
    loudest = sorted(range(len(noise.layers)), key=lambda i: -noise.trace_drop(i).value)[:LAYERS]
    layers = [i for i in reversed(loudest) if noise.trace_drop(i).value > 0]
    rows: list[int | None] = [*layers, None]
    labels = [*(_short(noise.layers[i]) for i in layers), "all parameters"]
    figure = _figure(7.2 + 0.075 * max(map(len, labels)), 1.9 + 0.36 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    at = range(len(rows))
    traces = ((XI_DROP, noise.trace_drop, 0.14, 0), (XI_APPROX, noise.trace_approx, -0.14, 1))
    for label, trace, shift, style in traces:
        _points(left, [trace(i) for i in rows], [y + shift for y in at], style, label, (0, math.inf))
    _points(right, [noise.alignment(i) for i in rows], list(at), 2, "cosine of the two", (-1, 1))
    sizes = [trace(i) for _, trace, _, _ in traces for i in rows]
    if _decades(sizes) > 1:
        _logarithmic(left, "x", sizes)
    left.set_xlabel("trace of the covariance")
    right.set_xlabel("1: the same shape, 0: nothing shared")
    right.axvline(1, color=GRAY, linewidth=0.8, zorder=0)
    right.set_xlim(left=min(0.0, right.get_xlim()[0]))
    for ax in (left, right):
        ax.axhspan(len(rows) - 1.5, len(rows) - 0.5, color="#EEEEEE", zorder=0)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        _legend_above(ax)
    left.set_yticks(list(at), labels)
    told = f"{100 * noise.confidence:g} % intervals, {noise.draws} draws"
    figure.suptitle(f"Gradient noise of dropout by layer ({told})", fontsize=10)
    return figure


def effect_over_training(history: Sequence[Diagnosis]) -> Figure:
    """Draw the effect of all sites together, of the largest sites, and the noise, over training.

    Args:
        history: Diagnoses in the order of training, at least two.

    Returns:
        The figure, with a panel for each.
    """
    steps = [diagnosis.step for diagnosis in history]
    last = history[-1]
    with_sites = len(last.effect.sites) > 1 and all(len(d.effect.sites) == len(last.effect.sites) for d in history)
    with_noise = all(d.noise is not None for d in history)
    lines = min(LINES, len(last.effect.sites)) if with_sites else 0
    figure = _figure(3.9 * (1 + with_sites + with_noise), 3.6 + 0.17 * lines)
    axes = list(figure.subplots(1, 1 + with_sites + with_noise, squeeze=False)[0])

    _band(axes[0], steps, [d.effect.truth() for d in history], 0, TRUTH)
    if not last.effect.problem:
        _band(axes[0], steps, [d.effect.approximation() for d in history], 1, APPROX)
    axes[0].set_ylabel("added to the loss of this batch")
    if with_sites:
        largest = sorted(range(len(last.effect.sites)), key=lambda i: -abs(last.effect.truth(i).value))[:LINES]
        for style, i in enumerate(largest):
            _band(axes[1], steps, [d.effect.truth(i) for d in history], style, _short(last.effect.names[i]))
        axes[1].set_ylabel(f"{TRUTH}, each site alone")
    if with_noise:
        noises = [d.noise for d in history if d.noise is not None]
        _band(axes[-1], steps, [n.trace_drop() for n in noises], 0, XI_DROP)
        _band(axes[-1], steps, [n.trace_approx() for n in noises], 1, XI_APPROX)
        axes[-1].set_ylabel("gradient noise, trace of covariance")
    for ax in axes:
        ax.set_xlabel("optimizer step")
        ax.grid(color="#DDDDDD", linewidth=0.6)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")  # no common factor in the legend's place
        _legend_above(ax)
    figure.suptitle(f"What dropout does, over training ({_intervals(last)})", fontsize=10)
    return figure


def approximation_against_truth(history: Sequence[Diagnosis]) -> Figure:
    """Draw ``R_approx`` against ``R_drop``, with the range in which the approximation is trusted.

    Args:
        history: Diagnoses of one run; with one only, its sites (and drop probabilities, if some were tried) are the
            points, else also all sites together at every moment.

    Returns:
        The figure.
    """
    last = history[-1]
    groups: list[tuple[str, list[Interval], list[Interval]]] = []
    if last.effect.sites:
        numbers = range(len(last.effect.sites))
        groups.append(
            (
                "each site alone",
                [last.effect.truth(i) for i in numbers],
                [last.effect.approximation(site=i) for i in numbers],
            )
        )
    together = "all sites, every time" if len(history) > 1 else "all sites together"
    groups.append(
        (together, [d.effect.truth() for d in history], [d.effect.approximation() for d in history]),
    )
    if last.sweep:
        reports = [report for _, report in last.sweep]
        groups.append(("all sites at other q", [r.truth() for r in reports], [r.approximation() for r in reports]))
    figure = _figure(4.8, 5.0)
    ax = figure.subplots()
    everything = [i for _, xs, ys in groups for i in (*xs, *ys)]
    logarithmic = all(i.low > 0 for i in everything) and _decades(everything) > 1
    if logarithmic:
        _logarithmic(ax, "x", everything)
        _logarithmic(ax, "y", everything)
    for style, (label, xs, ys) in enumerate(groups):
        ax.errorbar(
            [x.value for x in xs],
            [y.value for y in ys],
            xerr=[x.margin for x in xs],
            yerr=[y.margin for y in ys],
            **{**_style(style), **({"markerfacecolor": "none", "markersize": 10} if label == together else {})},
            label=label,
        )
    for name, x, y in zip(last.effect.names[:LABELLED], *groups[0][1:], strict=False) if last.effect.sites else ():
        ax.annotate(_short(name), (x.value, y.value), textcoords="offset points", xytext=(6, -9), fontsize=7)
    if last.sweep:
        for q, report in last.sweep:
            place = (report.truth().value, report.approximation().value)
            ax.annotate(f"q = {q:g}", place, textcoords="offset points", xytext=(-8, 4), ha="right", fontsize=7)
    ends = [end for _, xs, ys in groups for i in (*xs, *ys) for end in (i.low, i.high)]
    low, high = min(ends), max(ends)
    low, high = (low / 1.6, high * 1.6) if logarithmic else (low - 0.08 * (high - low), high + 0.08 * (high - low))
    line = [low + (high - low) * k / 200 for k in range(201)]
    ax.plot(line, line, color=GRAY, linewidth=1, zorder=0)
    below, above = ([x + abs(x) * t for x in line] for t in (-last.tolerance, last.tolerance))
    told = f"within {100 * last.tolerance:g} % of the truth"
    ax.fill_between(line, below, above, color="#DDDDDD", zorder=0, linewidth=0, label=told)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_xlabel(f"{TRUTH}")
    ax.set_ylabel(APPROX)
    _legend_above(ax)
    figure.suptitle(f"Approximation against truth ({_intervals(last)})", fontsize=10)
    return figure


def _figure(width: float, height: float) -> Figure:
    # not pyplot: no window, no global state, no backend of the user's changed
    from matplotlib.figure import Figure as New

    return New(figsize=(width, height), layout="constrained")


def _style(style: int) -> dict[str, Any]:
    at = style % len(COLORS)
    return {
        "fmt": MARKERS[at],
        "color": COLORS[at],
        "markersize": 5,
        "capsize": 2.5,
        "elinewidth": 1.2,
        "linestyle": "none",
    }


def _points(
    ax: Axes,
    intervals: Sequence[Interval],
    at: Sequence[float],
    style: int,
    label: str,
    possible: tuple[float, float] = (-math.inf, math.inf),
) -> None:
    """Draw values with their intervals, these as far as values are possible."""
    values = [i.value for i in intervals]
    below = [max(min(i.margin, i.value - possible[0]), 0.0) for i in intervals]  # NaN, not known, stays NaN
    above = [max(min(i.margin, possible[1] - i.value), 0.0) for i in intervals]
    ax.errorbar(values, at, xerr=[below, above], label=label, **_style(style))


def _band(ax: Axes, steps: Sequence[int], intervals: Sequence[Interval], style: int, label: str) -> None:
    at = style % len(COLORS)
    values = [i.value for i in intervals]
    ax.plot(steps, values, color=COLORS[at], marker=MARKERS[at], markersize=4, linewidth=1.4, label=label)
    ax.fill_between(
        steps, [i.low for i in intervals], [i.high for i in intervals], color=COLORS[at], alpha=0.18, linewidth=0
    )


def _decades(intervals: Sequence[Interval]) -> float:
    """How many powers of ten lie between the smallest and the largest value."""
    values = [i.value for i in intervals if i.value > 0]
    return math.log10(max(values) / min(values)) if values else 0.0


def _logarithmic(ax: Axes, axis: str, intervals: Sequence[Interval]) -> None:
    """A logarithmic axis whose labels do not run into each other; fewer than three decades have few powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set(**{f"{axis}scale": "log"})
    one = ax.xaxis if axis == "x" else ax.yaxis
    if _decades(intervals) < 3:
        one.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        one.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:g}")
    one.set_minor_formatter(NullFormatter())


def _legend_above(ax: Axes) -> None:
    """Above the axes, where it covers no data."""
    labels = ax.get_legend_handles_labels()[1]
    widths = [len(re.sub(r"\\[a-z]+|[${}_]", "", label)) for label in labels]  # without the commands of formulas
    columns = 1 if max(widths) > TWO_IN_A_ROW else min(2, len(labels))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=8)


def _short(name: str) -> str:
    """A long path without its beginning."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _intervals(diagnosis: Diagnosis) -> str:
    return f"{100 * diagnosis.effect.confidence:g} % intervals, {diagnosis.effect.draws} draws"
