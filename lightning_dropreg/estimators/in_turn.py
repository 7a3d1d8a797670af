"""The antithetic pair with one graph alive at a time: half the activations in memory for one forward pass more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

from torch import Tensor

from lightning_dropreg.curvature import element_weights
from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.estimators.antithetic import combine
from lightning_dropreg.estimators.base import Estimate
from lightning_dropreg.gradients import Gradients, GradientSum, Scaler, gradients_in, leaves_of
from lightning_dropreg.passes import Closure, Pass, Perturb, run_pass
from lightning_dropreg.sites import Directions

__all__ = ["antithetic_in_turn"]


def antithetic_in_turn(
    closure: Closure,
    again: Closure,
    weigh: Callable[[Estimate], Sequence[Tensor]],
    *,
    curvature: str | None,
    noise: bool,
    step_size: float,
    mask: str,
    key: int,
    scaler: Scaler | None = None,
) -> tuple[Estimate, list[Tensor]]:
    """Estimate as `antithetic` does, and differentiate at once.

    The pass in one direction gives its values and is let go; the opposite pass and everything computed from both is
    differentiated, which frees it; the first pass is made once more and gets the cotangents of its values.

    Args:
        closure: See `lightning_dropreg.estimators.base.Estimator`.
        again: Does the same as `closure`, for the repetition.
        weigh: Makes the scalars to be differentiated from the estimate.
        curvature: See `lightning_dropreg.estimators.base.Estimator`.
        noise: See `lightning_dropreg.estimators.base.Estimator`.
        step_size: See `lightning_dropreg.estimators.base.Estimator`.
        mask: See `lightning_dropreg.estimators.base.Estimator`.
        key: See `lightning_dropreg.estimators.base.Estimator`.
        scaler: Multiplies by the scale of a gradient scaler; None without one.

    Returns:
        The estimate, without graphs, and the scalars of `weigh`, with their gradients.
    """
    directions = Directions(key, mask)
    record = curvature is not None
    plus = _cut(run_pass(closure, Perturb(directions, step_size), record_losses=record))
    directions.rewind()
    minus = run_pass(closure, Perturb(directions, -step_size), record_losses=record)
    directions.rewind()
    # those of the plus pass are the same: they are constants, or functions of parameters alone
    weights = element_weights(minus.loss, minus.losses) if record else []
    estimate = combine(plus, minus, weights, curvature, noise, step_size)
    scalars = list(weigh(estimate))
    values = [scalar.detach() for scalar in scalars]
    ends = _ends(plus)
    ids = {id(end) for end in ends}
    leaves = [leaf for leaf in _leaves(scalars) if id(leaf) not in ids]
    sums = [GradientSum() for _ in scalars]
    scale = None if scaler is None else scaler(values[0].new_ones(()))
    cotangents = []
    for position, (scalar, value, collected) in enumerate(zip(scalars, values, sums, strict=True)):
        scaled = scalar if scaler is None else scaler(scalar)
        found = gradients_in([scaled], [*ends, *leaves], keep_graph=position < len(scalars) - 1)
        cotangents.append([found.pop(end, None) for end in ends])
        collected.add(Gradients(value, found, scale))
    estimate = Estimate(
        loss=estimate.loss.detach(),
        penalty=None if estimate.penalty is None else estimate.penalty.detach(),
        noise=None if estimate.noise is None else estimate.noise.detach(),
    )
    del minus, plus, weights, scalars, scalar, scaled

    repeated = run_pass(again, Perturb(directions, step_size), record_losses=record)
    directions.rewind()
    ends = _ends(repeated)
    leaves = _leaves(ends)
    for position, (cotangent, collected) in enumerate(zip(cotangents, sums, strict=True)):
        pairs = [(end, c) for end, c in zip(ends, cotangent, strict=True) if c is not None]
        found = gradients_in([e for e, _ in pairs], leaves, [c for _, c in pairs], position < len(sums) - 1)
        collected.add(Gradients(values[position].new_zeros(()), found, scale))
    return estimate, [collected.scalar() for collected in sums]


def _cut(done: Pass) -> Pass:
    """The values of a pass without its graph, themselves to be differentiated in."""
    losses = []
    for loss in done.losses:
        cut = copy(loss)
        cut.outputs, cut.elements = _leaf(loss.outputs), _leaf(loss.elements)
        losses.append(cut)
    return Pass(_leaf(done.loss), losses, done.sites)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _ends(done: Pass) -> list[Tensor]:
    """Everything that an estimate is computed from."""
    return [done.loss, *(loss.outputs for loss in done.losses), *(loss.elements for loss in done.losses)]


def _leaves(values: Sequence[Tensor]) -> list[Tensor]:
    leaves = leaves_of(*values)
    if leaves is None:
        raise UnsupportedOperationError(
            "low_memory=True differentiates the passes one after the other, which a hook on a parameter "
            "(Tensor.register_hook) or a reentrant checkpoint does not allow. Remove the hook, use "
            "torch.utils.checkpoint with use_reentrant=False, or low_memory=False."
        )
    return leaves
