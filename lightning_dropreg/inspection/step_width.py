"""Whether the finite step of an antithetic pair is small enough, and no smaller: a pair with half of it gives the same.

The error of a pair falls as the square of its step, as long as the step is small against what the function bends over.
Batch norm behind dropout divides by the spread of a few rows, which may be smaller than the step itself. A step of some
hundred roundings has differences of which little but rounding is left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dropreg.errors import DropregError
from lightning_dropreg.estimators.antithetic import antithetic
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.passes import Closure
from lightning_dropreg.passes.gradients import leaves_below

__all__ = ["TOLERANCE", "measure_step"]

TOLERANCE = 0.25
"""Relative error from which on it is said. At the shipped step of 0.1 smooth networks are at 0.04 or below, and kinks
move the value of a penalty by up to 0.2."""
_KEY = 0  # of directions that nobody trains with
_ROUNDED = 1e4
"""Below so many roundings, in the square of the step for a second difference, the error is rounding's."""
_LITTLE = 1e-3
"""What is smaller than this part of the loss, or of its gradient, changes nothing when it is wrong."""


def measure_step(
    closure: Closure, *, curvature: str | None, noise: bool, step_size: float, mask: str, smooth: bool
) -> Measured:
    """Estimate penalty and noise with a step and with half of it, along the same directions.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        curvature: Of the penalty, or None for noise alone.
        noise: Whether there is noise.
        step_size: The step.
        mask: ``"as_model"`` or ``"elementwise"``.
        smooth: Whether the network has no kinks behind its dropout. Across kinks gradients differ at any step
            (``smooth`` is an assumption of its own), and values alone are compared.

    Returns:
        What was found of ``small_step``; a warning if the error is large.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
        >>> step = lambda: torch.nn.functional.cross_entropy(net(x), y)
        >>> how = dict(curvature="loss_hessian", noise=True, mask="as_model", smooth=True)
        >>> measure_step(step, step_size=0.1, **how).outcome
        'holds'
    """
    try:
        runs = [_estimate(closure, curvature, noise, step, mask, smooth) for step in (step_size, step_size / 2)]
    except (DropregError, RuntimeError, NotImplementedError) as problem:  # the estimator will say so itself
        return Measured("small_step", note=f"not compared: {str(problem).partition(chr(10))[0]}")
    (dtype, whole), (_, half) = runs
    error = max((_error(a, b, size) for (a, size), (b, _) in zip(whole, half, strict=True)), default=0.0)
    rounding = torch.finfo(dtype).eps
    if whole and step_size < rounding:  # 1 + step_size is 1, and so it is with half
        error = math.inf
    elif whole and all(a.any() and torch.equal(a, b) for (a, _), (b, _) in zip(whole, half, strict=True)):
        note = "not compared: half of the step gives the same numbers (in bfloat16 both are widened to one step)"
        return Measured("small_step", note=note)
    if error <= TOLERANCE:
        return Measured("small_step", error, TOLERANCE, note=f"step_size={step_size:g} against half of it")
    what = "penalty or noise, or their gradients," if smooth else "the penalty"
    size = f"about {100 * error:.0f} %" if error < 1 else "more than 100 %"
    if step_size < (_ROUNDED * rounding) ** (0.5 if curvature == FULL else 1.0):
        told = (
            f"step_size={step_size:g} is too small for {dtype}: little but rounding is left of the difference of two "
            f"passes, and the error of penalty or noise is {size} on the first batch. Take step_size=0.1, the default."
        )
        return Measured("small_step", error, TOLERANCE, "warning", told)
    told = (
        f"with half of step_size={step_size:g} {what} would be another on the first batch: the error of the finite "
        f"step is {size}. Something bends within the step, as batch norm behind dropout does where a batch has two or "
        "three rows. Larger batches, or GroupNorm or LayerNorm, put it right; so do estimator='forward' or "
        "'double_backward', which make no finite step, or, in double precision (and with a few rows more in single), "
        f"step_size={step_size / 10:g}."
    )
    return Measured("small_step", error, TOLERANCE, "warning", told)


def _estimate(
    closure: Closure, curvature: str | None, noise: bool, step: float, mask: str, smooth: bool
) -> tuple[torch.dtype, list[tuple[Tensor, float]]]:
    """The dtype of the loss; what is compared, and the size of the loss, or of its gradient, beside it."""
    found = antithetic(closure, curvature=curvature, noise=noise, step_size=step, mask=mask, key=_KEY)
    penalty = found.penalty
    compared = [] if penalty is None else [(penalty.detach().double().reshape(1), abs(float(found.loss.detach())))]
    if smooth:
        leaves = leaves_below(found.loss)
        size = float(_gradient(found.loss, leaves).norm())
        compared += [(_gradient(each, leaves), size) for each in (penalty, found.noise) if each is not None]
    return found.loss.dtype, compared


def _gradient(scalar: Tensor, leaves: list[Tensor]) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros(1, dtype=torch.float64)
    found = torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True)
    parts = [torch.zeros(1) if g is None else g.to_dense().flatten() for g in found]
    return torch.cat([part.double().cpu() for part in parts])


def _error(whole: Tensor, half: Tensor, size: float) -> float:
    """Error of `whole`, of which three quarters are gone at half the step."""
    return 4 / 3 * float((whole - half).norm()) / max(float(half.norm()), _LITTLE * size, 1e-300)
