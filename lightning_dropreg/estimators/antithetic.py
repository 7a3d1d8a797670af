"""Two passes in opposite directions: no double backward, no forward mode, any operation that has a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

from torch import Tensor

from lightning_dropreg.errors import InconsistentPassesError
from lightning_dropreg.estimators.base import Estimate, inactive
from lightning_dropreg.estimators.curvature import FULL, element_weights, pair_quadratic_form
from lightning_dropreg.estimators.fixed import are_fixed, check_fixed
from lightning_dropreg.estimators.precision import bfloat16_step_size
from lightning_dropreg.passes import Closure, Directions, Off, Pass, Perturb, run_pass
from lightning_dropreg.passes.directions import SAME_EVERY_TIME

__all__ = ["antithetic", "check_pair_of_steps", "combine", "second_difference"]

_SEEN_IN_BFLOAT16 = 0.3


def antithetic(
    closure: Closure,
    *,
    curvature: str | None,
    noise: bool,
    step_size: float,
    mask: str,
    key: int,
    restart: Callable[[], None] = lambda: None,
    run_without_trace: Closure | None = None,
) -> Estimate:
    r"""Estimate loss, penalty and noise by central differences over all dropout sites at once.

    With site factors ``1 + eps r`` in one pass and ``1 - eps r`` in the other, the directional derivative of the
    outputs is ``u = (z+ - z-) / 2 eps``, the noise is ``s = (L+ - L-) / 2 eps`` and the loss ``(L+ + L-) / 2``, all
    with errors ``O(eps^2)``. Since the sites' directions are independent, ``E[u u^T] = sum_i c_i J_i diag(h_i^2)
    J_i^T``, and ``1/2 u^T H u`` is an unbiased estimate of the penalty (4.4).

    With ``curvature="full"`` a third pass without noise gives ``(L+ + L- - 2 L0) / 2 eps^2``, half the second
    derivative of the loss in the direction, and the loss itself.

    In bfloat16 a step too small to be seen is widened, for one more pass
    (`lightning_dropreg.estimators.precision.bfloat16_step_size`; the callbacks find that out before training).

    The arguments are those of `lightning_dropreg.estimators.base.Estimator`; besides, `restart` is called when what the
    closure has done so far is not to count, and `run_without_trace` does the same as the closure, leaving no trace:
    given where it was not looked at before whether targets and weights stand still, so that every pair shows it
    (`lightning_dropreg.estimators.fixed`).

    Returns:
        Loss, penalty and noise.
    """
    directions = Directions(key, mask)
    record = curvature is not None and curvature != FULL
    plus = run_pass(closure, Perturb(directions, step_size), record_losses=record)
    if not plus.sites:
        return inactive(plus.loss, curvature, noise)
    wider = bfloat16_step_size(step_size, plus.sites, curvature == FULL) if plus.in_bfloat16 else step_size
    if wider > step_size:
        restart()
        step_size, directions = wider, Directions(key, mask)
        plus = run_pass(closure, Perturb(directions, step_size), record_losses=record)
    directions.rewind()
    minus = run_pass(closure, Perturb(directions, -step_size), record_losses=record)
    directions.rewind()
    if curvature == FULL:
        clean = run_pass(closure, Off()).loss
        slope = combine(plus, minus, [], None, noise, step_size).noise
        return Estimate(clean, second_difference(plus.loss, minus.loss, clean, step_size), slope)
    weights = []
    if record:
        of_both = weights_of_both(plus, minus)
        weights = [(a + b) / 2 for a, b in of_both]
        if run_without_trace is not None:
            check_fixed(
                plus, minus, of_both, lambda: check_pair_of_steps(run_without_trace, step_size / 100, mask, key)
            )
    return combine(plus, minus, weights, curvature, noise, step_size)


def combine(
    plus: Pass, minus: Pass, weights: Sequence[Tensor], curvature: str | None, noise: bool, step_size: float
) -> Estimate:
    """Compute the estimate from passes with factors ``1 + eps r`` and ``1 - eps r``, and the weights of elements."""
    penalty = None
    if curvature is not None:
        _check_pair(plus, minus)
        forms = [
            pair_quadratic_form(curvature, a, b, w, step_size) / 2
            for a, b, w in zip(plus.losses, minus.losses, weights, strict=True)
        ]
        penalty = sum(forms[1:], forms[0])  # passes without a loss are refused
    return Estimate(
        loss=(plus.loss + minus.loss) / 2,
        penalty=penalty,
        noise=(plus.loss - minus.loss) / (2 * step_size) if noise else None,
    )


def weights_of_both(plus: Pass, minus: Pass) -> list[tuple[Tensor, Tensor]]:
    """Return what the elements of each recorded loss count in either pass."""
    # in one go: the graphs of the two passes meet in the parameters only
    found = element_weights([plus.loss, minus.loss], [*plus.losses, *minus.losses])
    return list(zip(found[: len(plus.losses)], found[len(plus.losses) :], strict=False))


def check_pair_of_steps(closure: Closure, step_size: float, mask: str, key: int) -> None:
    """Refuse a step whose targets or weights move with the noise (`lightning_dropreg.estimators.fixed.check_fixed`)."""
    directions = Directions(key, mask)

    def run(sign: int) -> Pass:
        return run_pass(closure, Perturb(directions, sign * step_size), record_losses=True)

    plus = _without_graph(run(1))
    if plus[0].in_bfloat16 and step_size < _SEEN_IN_BFLOAT16:
        step_size, directions = _SEEN_IN_BFLOAT16, Directions(key, mask)
        plus = _without_graph(run(1))
    directions.rewind()
    minus = _without_graph(run(-1))
    directions.rewind()
    # one graph at a time, unless only both together can tell
    if not are_fixed(plus[0], minus[0], list(zip(plus[1], minus[1], strict=False))):
        first = run(1)
        directions.rewind()
        second = run(-1)
        check_fixed(first, second, weights_of_both(first, second))


def _without_graph(done: Pass) -> tuple[Pass, list[Tensor]]:
    """The values of a pass and of the weights in it."""
    weights = [weight.detach() for weight in element_weights(done.loss, done.losses)]
    losses = [copy(loss) for loss in done.losses]
    for loss in losses:
        loss.outputs, loss.elements = loss.outputs.detach(), loss.elements.detach()
        loss.logits = loss.end = None
    return Pass(done.loss.detach(), losses, done.sites, done.in_bfloat16), weights


def second_difference(plus: Tensor, minus: Tensor, clean: Tensor, step_size: float) -> Tensor:
    """Half the second derivative of a loss along a direction: ``(L+ + L- - 2 L0) / 2 eps^2``.

    Args:
        plus: Losses with factors ``1 + eps r``, of any shape.
        minus: Losses with factors ``1 - eps r``.
        clean: Losses without noise.
        step_size: ``eps``.

    Returns:
        Tensor of the same shape, right up to ``O(eps^2)``.

    Example:
        >>> import torch
        >>> f = lambda x: 3 * x**2 + 5 * x
        >>> second_difference(*(f(torch.tensor(x)) for x in (1.5, 0.5, 1.0)), step_size=0.5).item()
        3.0
    """
    return ((plus - clean) + (minus - clean)) / (2 * step_size**2)


def _check_pair(plus: Pass, minus: Pass) -> None:
    kinds = [[(loss.name, loss.outputs.shape) for loss in one.losses] for one in (plus, minus)]
    if kinds[0] != kinds[1]:
        raise InconsistentPassesError(
            f"The two passes over this batch computed different losses: {kinds[0]} and {kinds[1]}. {SAME_EVERY_TIME}"
        )
