"""The penalty from the full Jacobian, one backward per output: the oracle that tests the other estimators."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dropreg.estimators.base import Estimate, inactive
from lightning_dropreg.estimators.curvature import FULL, differentiated_outputs, element_weights, matrix
from lightning_dropreg.estimators.double_backward import (
    check_twice_differentiable,
    directional_derivative,
    tap_gradients,
)
from lightning_dropreg.passes import Closure, Directions, Pass, Tap, run_pass

__all__ = ["exact"]


def exact(closure: Closure, *, curvature: str | None, noise: bool, step_size: float, mask: str, key: int) -> Estimate:
    """Compute ``R = 1/2 sum_i c_i <J_i^T M J_i, diag(h_i^2)>`` (4.4) with nothing random in it.

    Costs one backward pass for each entry of the outputs, and the memory of all of them: for small problems. ``M`` is
    found by differentiating the loss twice, not from a closed form. With ``curvature="full"`` it is the diagonal of the
    Hessian of the loss in the activations, one backward pass for each entry of the sites' masks. See
    `lightning_dropreg.estimators.base.Estimator` for the arguments.

    Returns:
        Loss, penalty and noise.
    """
    full = curvature == FULL
    tap = Tap(Directions(key, mask), draw=noise, thrice=full)
    done = run_pass(closure, tap, record_losses=curvature is not None and not full)
    if not done.sites:
        return inactive(done.loss, curvature, noise)
    penalty = None
    if curvature is not None:
        penalty = _half_trace(done, tap) if full else _penalty(curvature, done, tap)
    return Estimate(
        loss=done.loss,
        penalty=penalty,
        noise=directional_derivative(done.loss, tap) if noise else None,
    )


def _penalty(curvature: str, done: Pass, tap: Tap) -> Tensor:
    penalty = done.loss.new_zeros(())
    for loss, weights in zip(done.losses, element_weights(done.loss, done.losses), strict=True):
        outputs = differentiated_outputs(curvature, loss)
        curvatures = matrix(curvature, loss, weights)
        for site, jacobian in zip(tap.sites, _jacobians(outputs, tap), strict=True):
            j = jacobian.reshape(*outputs.shape, -1)
            penalty = penalty + site.variance / 2 * torch.einsum("tcm,tcd,tdm->", j, curvatures, j)
    return penalty


def _half_trace(done: Pass, tap: Tap) -> Tensor:
    """``1/2 sum_i c_i <d2 L/dh_i2, diag(h_i^2)>``: a diagonal, because the noises of mask entries are independent."""
    penalty = done.loss.new_zeros(()).requires_grad_()
    for site, t, gradient in zip(tap.sites, tap.taps, tap_gradients([done.loss], tap, None), strict=True):
        for number, slope in enumerate(gradient.reshape(-1) if gradient.requires_grad else ()):
            (row,) = torch.autograd.grad(slope, [t], create_graph=True, allow_unused=True)
            if row is not None:
                penalty = penalty + site.variance / 2 * row.reshape(-1)[number]
    return penalty


def _jacobians(outputs: Tensor, tap: Tap) -> list[Tensor]:
    """``J_i diag(h_i)`` of every site: one tensor ``(entries of the outputs, *mask shape)`` each."""
    rows = []
    for entry in outputs.reshape(-1):
        gradients = torch.autograd.grad(entry, tap.taps, create_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tap.taps, strict=True)])
    jacobians = [torch.stack(column) for column in zip(*rows, strict=True)]
    check_twice_differentiable(jacobians, [outputs])
    return jacobians
