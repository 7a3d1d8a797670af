"""Monte Carlo dropout in one picture: is it calibrated, and does the first order explain it? Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_dropreg.checks import need_matplotlib
from lightning_dropreg.errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["calibration", "reliability", "uncertainty_figure"]

# Okabe and Ito's palette, which can be told apart with any kind of colour vision; the markers differ too
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def calibration(probabilities: Tensor, target: Tensor, bins: int = 15) -> float:
    """Compute the expected calibration error (Guo et al., ICML 2017) of class probabilities, by torchmetrics.

    Args:
        probabilities: ``(N, C)``, for example `MonteCarloPrediction.mean`, or the softmax of its `outputs`.
        target: True classes, ``(N,)``.
        bins: Number of equal bins of confidence, at least 1.

    Returns:
        Mean distance between confidence and accuracy, in ``[0, 1]``.

    Example:
        >>> round(calibration(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 3)
        0.4
    """
    return float(multiclass_calibration_error(probabilities, target, probabilities.shape[-1], n_bins=bins, norm="l1"))


def reliability(probabilities: Tensor, target: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what a reliability diagram shows.

    Args:
        probabilities: ``(N, C)``.
        target: ``(N,)``.
        bins: Number of equal bins of confidence, at least 1.

    Returns:
        Mean confidence, accuracy and number of examples of the bins that have any.

    Example:
        >>> confidence, accuracy, count = reliability(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]))
        >>> accuracy.tolist(), count.tolist()
        ([0.5], [2])
    """
    confidence, predicted = probabilities.max(-1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    count = torch.bincount(index, minlength=bins)
    used = count > 0
    mean = torch.bincount(index, confidence, bins)[used] / count[used]
    accuracy = torch.bincount(index, (predicted == target).to(confidence.dtype), bins)[used] / count[used]
    return mean, accuracy, count[used]


def uncertainty_figure(
    probabilities: Mapping[str, Tensor],
    target: Tensor,
    variance: Tensor | None = None,
    first_order_variance: Tensor | None = None,
    bins: int = 10,
) -> Figure:
    """Draw reliability diagrams, and the variance over draws against its first-order value.

    Args:
        probabilities: Class probabilities ``(N, C)`` by name, for example without dropout and their mean over draws.
        target: True classes, ``(N,)``.
        variance: Variance of the outputs over draws; with `first_order_variance` a second panel.
        first_order_variance: The same to first order, in the same shape.
        bins: Number of equal bins of confidence.

    Returns:
        The figure, to be saved with ``savefig``. Bins with less than 1 % of the examples are left out of it.

    Raises:
        InvalidArgumentError: If there are more than four names, or the shapes of the variances differ.
        MissingDependencyError: If matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    if len(probabilities) > len(_STYLES):
        raise InvalidArgumentError(f"At most {len(_STYLES)} predictions can be told apart; found {len(probabilities)}.")
    both = variance is not None and first_order_variance is not None
    figure = Figure(figsize=(9.5 if both else 4.8, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    _draw_reliability(panels[0], probabilities, target, bins)
    if variance is not None and first_order_variance is not None:
        if variance.shape != first_order_variance.shape:
            raise InvalidArgumentError(
                f"The variances have shapes {tuple(variance.shape)} and {tuple(first_order_variance.shape)}."
            )
        _draw_variances(panels[1], variance.flatten(), first_order_variance.flatten())
    return figure


def _draw_reliability(axes: Axes, probabilities: Mapping[str, Tensor], target: Tensor, bins: int) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", zorder=0)
    for (name, p), (color, marker) in zip(probabilities.items(), _STYLES, strict=False):
        confidence, accuracy, count = reliability(p, target, bins)
        shown = count >= 0.01 * len(target)  # a bin of one example is at 0 or 1 and says nothing
        confidence, accuracy, count = confidence[shown], accuracy[shown], count[shown]
        label = f"{name} (ECE {calibration(p, target, bins):.3f})"
        axes.plot(confidence, accuracy, color=color, linewidth=1.5)
        axes.scatter(confidence, accuracy, 15 + 300 * count / len(target), color=color, marker=marker, alpha=0.7)
        axes.plot([], [], color=color, marker=marker, markersize=6, label=label)
    axes.set(xlim=(0, 1.04), ylim=(0, 1.04), ylabel="accuracy", title="Calibration", aspect="equal")
    axes.set_xlabel("confidence (marker area: examples; bins with at least 1 %)")
    axes.legend(loc="lower right", fontsize=9, framealpha=0.9)


def _draw_variances(axes: Axes, variance: Tensor, first_order: Tensor) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    keep = (variance > 0) & (first_order > 0)
    variance, first_order = variance[keep].double(), first_order[keep].double()
    axes.scatter(first_order, variance, s=9, alpha=0.4, color=_STYLES[0][0], linewidths=0, rasterized=True)
    ends = torch.cat([variance, first_order])
    low, high = float(ends.min()) / 1.5, float(ends.max()) * 1.5
    axes.plot([low, high], [low, high], color="0.6", linewidth=1, linestyle="--", zorder=0)
    ratio = float(variance.sum() / first_order.sum())
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    thirds = high / low < 1000  # less than three decades have few powers of ten
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if thirds else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="first-order variance", ylabel="variance over draws")
    axes.set_title(f"Variance of the outputs: {ratio:.2f} of first order")
