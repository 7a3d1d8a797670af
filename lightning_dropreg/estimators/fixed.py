"""What the passes of an antithetic pair must have in common: the loss as a function of its outputs, and its weights.

The penalty follows how the outputs move with the noise. A target that moves too (a teacher's output, detached, from the
same dropped features) or a weight (a detached confidence) adds to the curvature without being an output; there
``E[loss] - loss`` has terms that no form in `curvature` knows. Nothing in the autograd graph tells, but the values do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.losses.base import differ
from lightning_dropreg.passes import Pass
from lightning_dropreg.passes.gradients import leaves_below

__all__ = ["are_fixed", "check_fixed"]

_DIGITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def check_fixed(
    plus: Pass, minus: Pass, weights: Sequence[tuple[Tensor, Tensor]], smaller: Callable[[], None] | None = None
) -> None:
    """Refuse a pair of passes whose losses differ in more than their outputs.

    Args:
        plus: The pass in one direction.
        minus: The pass in the other.
        weights: Weights of the elements of each recorded loss, in both.
        smaller: Compares a pair with a much smaller step in the same way; what does not differ there jumps (a label
            that is the largest of some scores) and has no part in a derivative.

    Raises:
        LossNotRecognizedError: If a target or a weight, or a part of the returned loss that no recognized loss accounts
            for, moves with the noise.
    """
    problem = _problem(plus, minus, weights)
    if problem and smaller is not None:
        smaller()
    elif problem:
        raise LossNotRecognizedError(problem)


def are_fixed(plus: Pass, minus: Pass, weights: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the values of two passes leave no doubt that `check_fixed` finds nothing; not where a part moves."""
    return not _problem(plus, minus, weights, of_values=True)


def _problem(plus: Pass, minus: Pass, weights: Sequence[tuple[Tensor, Tensor]], of_values: bool = False) -> str:
    if len(plus.losses) != len(minus.losses):
        return ""  # told elsewhere
    for a, b in zip(plus.losses, minus.losses, strict=True):
        if a.outputs.shape == b.outputs.shape and a.moves(b):
            return (
                f"What {a.name} compares the output with (its target, a weight or a variance) changes with the dropout "
                "noise, without having a gradient: a detached target from the same dropped features, or from a teacher "
                "whose dropout is on. It adds curvature that is only known for losses of the difference (mse_loss, "
                "huber_loss, smooth_l1_loss). Compute the target without dropout (teacher.eval()), use one of these, "
                "curvature='full', or ImplicitNoise, which needs no curvature."
            )
    for (w, other), loss in zip(weights, plus.losses, strict=True):
        if differ(w.detach(), other.detach()):
            return (
                f"The weights with which elements of {loss.name} count in the loss change with the dropout "
                "noise, though they have no gradient (a detached focal factor or confidence, or a division by a "
                "detached loss), so the loss has curvature that this package does not know. Compute the weights "
                "without dropout, or use curvature='full' or ImplicitNoise, which need no recognized loss."
            )
    return _unaccounted(plus, minus, weights, of_values)


def _unaccounted(plus: Pass, minus: Pass, weights: Sequence[tuple[Tensor, Tensor]], of_values: bool) -> str:
    """The difference of the losses must be that of the elements, or something else moves; where it moves a gradient."""
    rest = plus.loss - minus.loss
    scale = plus.loss.detach().abs() + minus.loss.detach().abs()
    for a, b, (w, other) in zip(plus.losses, minus.losses, weights, strict=True):
        if a.outputs.shape != b.outputs.shape:
            return ""
        mean, ends = (w + other) / 2, [each.per_element(each.elements) for each in (a, b)]
        rest = rest - (mean * (ends[0] - ends[1])).sum()
        scale = scale + (mean * ends[0]).detach().abs().sum()
    digits = _DIGITS.get(plus.loss.dtype, 0.1)
    if not bool(rest.detach().abs() > digits * scale):
        return ""
    if not (of_values or _moves_a_gradient(rest, plus.loss, digits)):
        return ""
    return (
        "A part of the returned loss changes with the dropout noise without going through a recognized loss function "
        f"({', '.join(loss.name for loss in plus.losses)}): it depends on a dropout under torch.no_grad or behind "
        ".detach(). Its curvature is unknown, and the penalty would miss it. Compute it with a loss function that "
        "this package knows, make it known with lightning_dropreg.recognize, or use curvature='full' or ImplicitNoise."
    )


def _moves_a_gradient(rest: Tensor, loss: Tensor, digits: float) -> bool:
    def size(value: Tensor) -> float:
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) if leaves else ()
        return sum(float(g.to_dense().abs().sum()) for g in found if g is not None)

    leaves = leaves_below(loss)
    return size(rest) > digits * size(loss)
