"""Whether some rows of a batch stand for all of it: two disjoint parts against the whole, without dropout.

With the weights of the whole batch the two parts must have, element by element, what the whole has: the same number of
elements that count, counting the same, of the same values. In-batch negatives and batch norm change the values, rows
that are not cut (unlabelled ones beside the labelled) the number; nothing of this can be seen in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_dropreg.errors import UnsupportedModuleError, UnsupportedRowsError
from lightning_dropreg.estimators.counts import (
    FIRST,
    LAST,
    LEVEL,
    MEAN,
    Counting,
    Known,
    Rows,
    is_level,
    known_weights,
    of_rows,
    weights_in_batch,
)
from lightning_dropreg.estimators.curvature import element_weights
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.losses import Loss
from lightning_dropreg.passes import Closure, Directions, Off, Pass, Tap, run_pass
from lightning_dropreg.passes.recognition import site_past_losses
from lightning_dropreg.passes.run import recounted

__all__ = ["RowsFound", "batch_norms", "measure_rows"]

_INSTEAD = "Use batch_fraction=None, which takes the whole batch."
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 5e-2
"""In half precision, whose digits come out otherwise for another number of rows."""


@dataclass(frozen=True)
class RowsFound:
    """What was found.

    Attributes:
        counting: How elements of the losses find their weights.
        measured: Of ``rows_found``, ``mean_over_rows`` and ``independent_rows``.
    """

    counting: Counting
    measured: list[Measured] = field(default_factory=list)

    @property
    def problem(self) -> Exception | None:
        """What is wrong, if anything is."""
        return next((each.problem for each in self.measured if each.problem is not None), None)


def measure_rows(
    whole: Closure,
    on_rows: Callable[[Tensor], Closure],
    rows: Rows,
    *,
    noise: bool,
    norms: Sequence[str] = (),
    draws: Callable[[], bool] = lambda: False,
) -> RowsFound:
    """Compare a part of the batch's rows and the rest of them with the whole batch, without dropout.

    Args:
        whole: Runs forward and loss on the whole batch, leaving no trace.
        on_rows: Returns what does the same on the rows of these numbers.
        rows: The first part.
        noise: Whether noise is taken from losses that may be unknown; a penalty is refused elsewhere for these.
        norms: What in the model is known to mix rows.
        draws: Says whether the last run has drawn random numbers (augmentation): these are others for other rows, so
            that values do not show whether rows depend on one another.

    Returns:
        What was found; nothing is raised.

    Example:
        >>> w = torch.ones(3, 1, requires_grad=True)
        >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> on = lambda rows: lambda: torch.nn.functional.mse_loss(x[rows] @ w, torch.zeros(len(rows), 1))
        >>> found = measure_rows(on(torch.arange(4)), on, Rows(torch.tensor([0, 2]), 4), noise=False)
        >>> found.problem is None, found.counting.kinds
        (True, ('mean',))
    """
    others = torch.ones(rows.count, dtype=torch.bool).index_fill_(0, rows.numbers, False).nonzero().flatten()
    if not len(others):
        return RowsFound(Counting())
    parts = (rows, Rows(others, rows.count))
    seen = _look(whole, mark=True)
    remainder = noise and seen.remainder
    try:
        pieces = [_look(on_rows(part.numbers)) for part in parts]
        kinds = tuple(_kind(number, seen, pieces, parts) for number in range(len(seen.known)))
        counting = Counting(kinds, remainder)
        weights = [
            weights_in_batch(piece.losses, seen.known, part, counting, piece.own)
            for piece, part in zip(pieces, parts, strict=True)
        ]
    except UnsupportedModuleError as error:
        problem = error if isinstance(error, UnsupportedRowsError) else UnsupportedRowsError(str(error))
        return RowsFound(Counting(remainder=remainder), [Measured("rows_found", outcome="error", problem=problem)])
    measured = [Measured("rows_found", float(rows.count), note="rows; two disjoint parts of them were run")]
    worst, moving = 0.0, False
    for number, known in enumerate(seen.known):
        off, name, text = _compare(
            known.name,
            _counting(known.weights, seen, number),
            [_counting(w[number], p, number) for w, p in zip(weights, pieces, strict=True)],
            seen.tolerance,
        )
        unclear = name == "independent_rows" and draws() and not norms
        if text and not unclear:
            return RowsFound(counting, [*measured, _refusal(name, off, seen.tolerance, text, norms)])
        worst, moving = max(worst, off), moving or unclear
    if remainder:
        off = _remainder_off(seen, pieces, weights, parts)
        unclear = not off <= seen.tolerance and draws() and not norms
        worst, moving = max(worst, off), moving or unclear
        if not (off <= seen.tolerance or unclear):
            text = (
                f"the loss ({seen.loss:.4g} for all rows, {pieces[0].loss:.4g} and {pieces[1].loss:.4g} for two parts "
                "of them) is no mean over rows, or a row's loss depends on the others"
            )
            return RowsFound(counting, [*measured, _refusal("mean_over_rows", off, seen.tolerance, text, norms)])
    if moving:
        note = (
            "The step draws random numbers (augmentation), which are others for other rows, so it cannot be measured "
            "whether a row's loss depends on the other rows of its batch (in-batch negatives, say), as batch_fraction "
            "supposes that it does not."
        )
        return RowsFound(counting, [*measured, Measured("independent_rows", worst, seen.tolerance, "warning", note)])
    note = "two disjoint parts against the whole batch, without dropout"
    held = [Measured(name, worst, seen.tolerance, note=note) for name in ("mean_over_rows", "independent_rows")]
    return RowsFound(counting, [*measured, *held])


def batch_norms(module: nn.Module) -> list[str]:
    """Name the layers of a module that normalize by the statistics of the batch."""
    norm = nn.modules.batchnorm._NormBase
    instance = nn.modules.instancenorm._InstanceNorm
    return [
        f"{name or 'the module'} ({type(layer).__name__})"
        for name, layer in module.named_modules()
        if isinstance(layer, norm) and not isinstance(layer, instance)
        if layer.training or layer.running_mean is None
    ]


@dataclass
class _Seen:
    """One pass: its loss, the recognized losses in it, and what their elements are and count."""

    loss: float
    losses: list[Loss]
    values: list[Tensor]
    known: list[Known]
    own: list[Tensor]
    remainder: bool
    tolerance: float


def _look(closure: Closure, mark: bool = False) -> _Seen:
    found: list[_Seen] = []

    def see(done: Pass) -> Tensor:
        known = known_weights(done.loss, done.losses)
        losses = done.losses if known else []
        site = site_past_losses(done.loss, losses, done.sites, done.site_nodes)[0] if mark else None
        values = [loss.per_element(loss.elements.detach()) for loss in losses]
        dtypes = {done.loss.dtype, *(loss.outputs.dtype for loss in losses)}
        coarse = done.in_bfloat16 or torch.is_autocast_enabled(done.loss.device.type)
        tolerance = _COARSE if coarse else max(_TOLERANCES.get(dtype, _COARSE) for dtype in dtypes)
        own = [w.detach() for w in element_weights(done.loss, losses)] if losses else []
        found.append(
            _Seen(float(done.loss.detach()), losses, values, known, own, not losses or site is not None, tolerance)
        )
        return done.loss

    # taps make the ways from sites on constants visible
    with recounted(see):
        run_pass(closure, Tap(Directions(0)) if mark else Off(), need_sites=False, written_out=False)
    return found[0]


def _kind(number: int, whole: _Seen, pieces: Sequence[_Seen], parts: Sequence[Rows]) -> str:
    """How elements find their weights."""
    known, values = whole.known[number], whole.values[number]
    if known.is_mean:
        return MEAN
    if any(number >= len(piece.known) for piece in pieces):
        return LEVEL  # told right after
    fits = not len(values) % parts[0].count
    for kind in (FIRST, LAST) if fits and len(values) else ():
        taken = [of_rows(values, part, kind == FIRST) for part in parts]
        if all(_close(a, piece.values[number], whole.tolerance) for a, piece in zip(taken, pieces, strict=True)):
            return kind
    if not is_level(known.weights) or any(not is_level(piece.own[number]) for piece in pieces):
        raise UnsupportedRowsError(
            f"The elements of {known.name} count differently, and it cannot be told which belong to which row of the "
            f"batch: those of some rows are not among those of all, in the order of the rows. They may depend on the "
            f"other rows. Let the loss function take the mean (reduction='mean'). {_INSTEAD}"
        )
    return LEVEL


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    return not a.numel() or bool((a - b).abs().max() <= tolerance * a.abs().max())


def _compare(
    name: str, whole: tuple[Tensor, Tensor], parts: Sequence[tuple[Tensor, Tensor]], tolerance: float
) -> tuple[float, str, str]:
    """Compare the elements of a loss that count: how many, how much, and what they are.

    Returns:
        The largest difference, and if it is too large, the assumption that does not hold and what is wrong.
    """
    together = [torch.cat(both).sort().values for both in zip(*parts, strict=True)]
    if len(together[0]) != len(whole[0]):
        sizes = " and ".join(str(len(part[0])) for part in parts)
        return float("inf"), "mean_over_rows", (
            f"{len(whole[0])} elements of {name} count in the whole batch, and {sizes} in two disjoint parts of "
            "its rows: what the loss is made of is not cut with the rows of the batch (unlabelled data beside the "
            "labelled, a queue, or rows that have another batch_dim)"
        )  # fmt: skip
    if not len(whole[0]):
        return 0.0, "", ""
    heavy, off = (_off(a, b) for a, b in zip(together, (each.sort().values for each in whole), strict=True))
    if not heavy <= tolerance:
        return heavy, "mean_over_rows", f"the elements of {name} count otherwise in two parts of the batch's rows"
    if not off <= tolerance:
        return off, "independent_rows", (
            f"a row's part in {name} depends on the other rows of the batch (in-batch negatives, statistics of "
            "the batch): it is another one among fewer rows"
        )  # fmt: skip
    return max(heavy, off), "", ""


def _counting(weights: Tensor, seen: _Seen, number: int) -> tuple[Tensor, Tensor]:
    """Weights, and weighted values, of the elements of a loss that count."""
    mass = seen.losses[number].mass
    counts = weights != 0 if mass is None else (weights != 0) & (mass != 0)
    chosen = weights[counts].double()
    return chosen, chosen * seen.values[number][counts].double()


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def _remainder_off(
    whole: _Seen, pieces: Sequence[_Seen], weights: Sequence[Sequence[Tensor]], parts: Sequence[Rows]
) -> float:
    """How far the mean over the two parts is from the whole, if what is not recognized is a mean over rows."""
    total = 0.0
    for piece, of_piece, part in zip(pieces, weights, parts, strict=True):
        right = sum(float((w * v).sum()) for w, v in zip(of_piece, piece.values, strict=True))
        own = sum(float((w * v).sum()) for w, v in zip(piece.own, piece.values, strict=True))
        total += part.fraction * (piece.loss - own) + right
    scale = max(abs(whole.loss), *(abs(piece.loss) for piece in pieces), 1e-300)
    return abs(total - whole.loss) / scale


def _refusal(name: str, off: float, tolerance: float, text: str, norms: Sequence[str]) -> Measured:
    cause = ""
    if norms and name != "rows_found":
        cause = f" The model normalizes by statistics of the batch, so rows depend on one another: {', '.join(norms)}."
    problem = UnsupportedRowsError(
        f"Some of the batch's rows do not stand for all of them, as batch_fraction supposes: {text}.{cause} {_INSTEAD}"
    )
    return Measured(name, off, tolerance, "error", problem=problem)
