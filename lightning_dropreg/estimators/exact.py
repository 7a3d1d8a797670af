"""The penalty from the full Jacobian, one backward per output: the oracle that tests the other estimators."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dropreg.estimators.base import Estimate, inactive
from lightning_dropreg.estimators.curvature import element_weights, matrix
from lightning_dropreg.estimators.double_backward import check_twice_differentiable, noise_scalar
from lightning_dropreg.passes import Closure, Directions, Pass, Tap, run_pass

__all__ = ["exact"]


def exact(closure: Closure, *, curvature: str | None, noise: bool, step_size: float, mask: str, key: int) -> Estimate:
    """Compute ``R = 1/2 sum_i c_i <J_i^T M J_i, diag(h_i^2)>`` (4.4) with nothing random in it.

    Costs one backward pass for each entry of the outputs, and the memory of all of them: for small problems. ``M`` is
    found by differentiating the loss twice, not from a closed form. See
    `lightning_dropreg.estimators.base.Estimator` for the arguments.

    Returns:
        Loss, penalty and noise.
    """
    tap = Tap(Directions(key, mask), draw=noise)
    done = run_pass(closure, tap, record_losses=curvature is not None)
    if not done.sites:
        return inactive(done.loss, curvature, noise)
    return Estimate(
        loss=done.loss,
        penalty=None if curvature is None else _penalty(curvature, done, tap),
        noise=noise_scalar(done.loss, tap) if noise else None,
    )


def _penalty(curvature: str, done: Pass, tap: Tap) -> Tensor:
    penalty = done.loss.new_zeros(())
    for loss, weights in zip(done.losses, element_weights(done.loss, done.losses), strict=True):
        examples, outputs = loss.outputs.shape
        curvatures = matrix(curvature, loss, weights)
        for site, jacobian in zip(tap.sites, _jacobians(loss.outputs, tap), strict=True):
            j = jacobian.reshape(examples, outputs, -1)
            penalty = penalty + site.variance / 2 * torch.einsum("tcm,tcd,tdm->", j, curvatures, j)
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
