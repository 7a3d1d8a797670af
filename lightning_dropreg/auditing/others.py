"""Random numbers that are no dropout, and dropout where it harms: before batch norm, on outputs, with a line search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lightning_dropreg.auditing.findings import Finding
from lightning_dropreg.auditing.places import Place, defined_at, made_at
from lightning_dropreg.auditing.record import Record
from lightning_dropreg.auditing.watch import is_dropout
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS

__all__ = ["check_optimizers", "check_output", "check_random", "check_variance"]

_NOISY = 0.25
"""Ratio of variances from which on dropout before a regression's last layer is worth a warning."""
_FEW = 8  # rows over which no variance is compared
_SHIFT = 1.25
"""Ratio of variances from which on `check_variance` warns."""


def check_random(record: Record) -> Iterator[Finding]:
    """Tell what draws random numbers and is no dropout that this package knows: ``hand-made``."""
    masks = {mask.place: mask for mask in record.hand_masks.get("training", ())}
    for place, mask in masks.items():
        yield Finding(
            "hand-made",
            "warning",
            str(place),
            f"a mask that is no known dropout's acts on an activation: {mask.dropped} of {mask.entries} entries are "
            "dropped, others every time (2 draws with the known dropout off; no chance involved). Whether it scales is "
            "not looked at.",
            "Call lightning_dropreg.drop or nn.functional.dropout in its place.",
        )
    counts: dict[tuple[str, Place], int] = {}
    told = {place.path for place in masks}
    for draw in record.drawn:
        if draw.place.path in told:
            continue
        counts[draw.what, draw.place] = counts.get((draw.what, draw.place), 0) + 1
    for (what, place), count in counts.items():
        yield Finding(
            "hand-made",
            "note",
            str(place),
            f"{what}: the state of a random generator changed {count} times in {record.draws} training steps "
            "(no chance involved).",
            "If it is a dropout, call lightning_dropreg.drop, so that it is seen and can be replaced.",
        )
    for tally in record.training:
        layer, call = tally.call.layer, tally.call
        if layer is None or call.inner or call.kind != type(layer).__name__ or not is_dropout(layer):
            continue
        by_torch = isinstance(layer, DROPOUT_LAYERS) or call.expected is None
        inside = any(other.call.layer is layer and other.call.inner for other in record.training)
        if call.drops and not by_torch and not inside:
            yield Finding(
                "hand-made",
                "note",
                str(Place(call.place.path, defined_at(layer))),
                f"{type(layer).__name__} drops {tally.entries - tally.kept} of {tally.entries} entries by itself in "
                f"{tally.draws} draws.",
                "Let it call lightning_dropreg.drop, so that it is seen and can be replaced.",
            )


def check_variance(record: Record) -> Iterator[Finding]:
    """Compare the variance of what batch norm is given with and without dropout.

    The statistics that batch norm keeps are those with dropout; in evaluation it meets activations without. The ratio
    is the mean over channels of the two variances, over the draws; from 1.25 on there is a warning if its lower bound
    (four standard errors) is above that too.

    Yields:
        Findings ``variance-shift``.
    """
    for norm, without in record.norms_without.items():
        if not norm.track_running_stats or norm not in record.norms_with:
            continue
        ratios = torch.tensor([_ratio(one, without) for one in record.norms_with[norm]], dtype=torch.float64)
        if len(ratios) < 2:
            continue
        mean, error = float(ratios.mean()), float(ratios.std()) / len(ratios) ** 0.5
        if max(mean, 1 / mean) < _SHIFT or abs(mean - 1) - 4 * error < abs(_SHIFT - 1):
            continue
        yield Finding(
            "variance-shift",
            "warning",
            str(Place(record.path(norm), made_at(record.paths, norm))),
            f"with dropout its input has {mean:.3g} +- {error:.2g} times the variance that it has without, in "
            f"{len(ratios)} draws (warned from {_SHIFT} on, at four standard errors: 6e-5 for normal ratios).",
            "Put the dropout behind the last batch norm, or use layer norm.",
        )


def _ratio(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    variances = [(square - mean.square()).clamp(min=1e-12) for mean, square in (one, other)]
    return float(variances[0].mean() / variances[1].mean())


def check_output(record: Record) -> Iterator[Finding]:
    """Find dropout on what a loss is given, and right before the last linear layer of a regression.

    The first is an error. The second changes the variance of the prediction between training and evaluation: a warning
    where the masks give it a quarter or more of the variance that it has over the examples, else a note.

    Yields:
        Findings ``on-output``.
    """
    for loss, call, linear, ratio, rows in record.outputs:
        if not linear:
            shape = f", shape {loss.shape}" if loss.shape else ""
            yield Finding(
                "on-output",
                "error",
                str(call.place),
                f"{loss.name} is given what comes out of this dropout{shape}, with no layer between (graph of 1 "
                "training step; no chance involved).",
                "Put the dropout before the last layer.",
            )
            continue
        noisy = ratio is not None and rows >= _FEW and ratio >= _NOISY
        seen = "" if ratio is None else f": its masks give a prediction {ratio:.2g} times the variance that it has over"
        yield Finding(
            "on-output",
            "warning" if noisy else "note",
            str(call.place),
            f"only a linear layer is between this dropout and {loss.name}, a regression{seen}"
            + f" {rows} rows (1 draw; a warning from {_NOISY} on)." * bool(seen),
            "Move the dropout to an earlier layer: evaluation has none of this variance.",
        )


def check_optimizers(record: Record) -> Iterator[Finding]:
    """Find optimizers that compare losses of several evaluations, with different masks: ``noise-on-line-search``."""
    if record.subject.configure_optimizers is None or not any(tally.call.drops for tally in record.training):
        return
    try:
        configured = record.subject.configure_optimizers()
    except Exception:  # it may need a Trainer
        return
    for optimizer in _optimizers(configured):
        if isinstance(optimizer, torch.optim.LBFGS) or "SAM" in type(optimizer).__name__:
            yield Finding(
                "noise-on-line-search",
                "warning",
                record.subject.name,
                f"{type(optimizer).__name__} evaluates the loss several times for one step, and "
                f"{sum(tally.call.drops and not tally.call.inner for tally in record.training)} dropouts draw new "
                "masks each time.",
                "Use ExplicitPenalty in place of dropout (no noise), or another optimizer.",
            )


def _optimizers(configured: Any) -> Iterable[Any]:
    if isinstance(configured, dict):
        configured = configured.get("optimizer")
    if isinstance(configured, (list, tuple)):
        for one in configured:
            yield from _optimizers(one)
    elif isinstance(configured, torch.optim.Optimizer):
        yield configured
