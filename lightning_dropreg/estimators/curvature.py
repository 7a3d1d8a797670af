"""The curvatures that stand between the model's outputs and the penalty, each written in three ways.

Let ``M_t`` be the ``(C, C)`` matrix of one example and ``w_t = dL/dl_t`` the weight with which the user's own
reduction counts it. The explicit penalty is ``R = 1/2 sum_t E[u_t^T w_t M_t u_t]`` over the random directional
derivatives ``u`` of the outputs. An *example* is a row of what the loss function was given, or a token where the loss
has one element for each; an *output* is a logit; however the loss is spelled (`lightning_dropreg.losses.base`). The
curvatures are

| name              | ``M_t``                       | paper                 |
|-------------------|-------------------------------|-----------------------|
| ``loss_hessian``  | ``H_out = d2 l_t / dz_t2``    | (4.4), ``R_approx``   |
| ``identity``      | ``I / C``                     | section 5.2, ablation |
| ``loss_jacobian`` | ``(dl_t/dz_t)^T (dl_t/dz_t)`` | (5.1), ablation       |

and the estimators need ``u^T M u`` (`quadratic_form`, or `pair_quadratic_form`, which takes ``u`` from the difference
of an antithetic pair's passes), a random ``v`` with ``E[v v^T] = w M`` (`factor`), or ``w M`` itself (`matrix`, by
automatic differentiation of the loss alone: the oracle for the others).

A fourth, ``full``, is no matrix between outputs: it is the second derivative of the returned loss itself in the sites'
activations, ``1/2 sum_i c_i <d2 L/dh_i2, diag(h_i^2)>``, the whole of (4.2) with the term ``dl/dz d2z/dh2`` that (4.3)
drops. The estimators take it from the loss, so no loss need be recognized, and it may be negative without bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.losses import Loss
from lightning_dropreg.losses.base import midpoint_and_slope, root
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.graph import nodes_behind
from lightning_dropreg.numerics.noise import random_signs

__all__ = [
    "CURVATURES",
    "FULL",
    "OF_OUTPUTS",
    "UNBOUNDED",
    "differentiated_outputs",
    "element_weights",
    "factor",
    "matrix",
    "pair_quadratic_form",
    "quadratic_form",
]

OF_OUTPUTS = ("loss_hessian", "identity", "loss_jacobian")
"""Names of the curvatures in the outputs of recognized losses: the paper's, and its two ablations."""
FULL = "full"
"""The second derivative of the loss in the activations: any loss, recognized or not."""
CURVATURES = (*OF_OUTPUTS, FULL)
"""Names of all curvatures."""
UNBOUNDED = (
    "curvature='full' is not bounded below: on examples that the model has wrong it can fall without end while the "
    "loss rises. Keep the best checkpoint, lower the strength or the learning rate if the loss rises late, and let "
    "lightning_dropreg.DivergenceDetector watch it."
)
"""What everybody who uses it should know."""


def element_weights(total: Tensor | Sequence[Tensor], losses: Sequence[Loss]) -> list[Tensor]:
    """Read off the user's own reduction how much each loss element counts: ``w_t = dL/dl_t``.

    Masks, class balancing and several weighted losses act on the penalty as they act on the loss, whatever code
    computes them. Only the graph between elements and `total` is traversed, a few small operations.

    Args:
        total: The scalar loss ``L`` that the step returned, or those of several passes.
        losses: The losses recognized in it.

    Returns:
        For each loss the weights in the shape of its `Loss.per_element`; zeros for a loss that `total` does not use.

    Raises:
        LossNotRecognizedError: If `total` is not linear in the elements, so that they have no fixed weights.
    """
    totals = [total] if isinstance(total, Tensor) else total
    if len(totals) == len(losses) and all(loss.is_all_of(one) for one, loss in zip(totals, losses, strict=True)):
        ones = [loss.elements.new_ones(()).div(loss.denominator) for loss in losses]
        return [loss.per_element(one.expand_as(loss.elements)) for loss, one in zip(losses, ones, strict=True)]
    gradients = torch.autograd.grad(
        total, [loss.elements for loss in losses], retain_graph=True, create_graph=True, allow_unused=True
    )
    curved = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
    if not {loss.elements.grad_fn for loss in losses}.isdisjoint(nodes_behind(*curved)):
        names = ", ".join(dict.fromkeys(loss.name for loss in losses))
        raise LossNotRecognizedError(
            f"The returned loss is not a weighted sum of the elements of {names} "
            "(a power, a root or a focal factor, say), so it has curvature that these do not know. Make it known "
            "as a whole with lightning_dropreg.recognize, or use ImplicitNoise, which needs no curvature, "
            "or curvature='full', which takes that of any loss."
        )
    return [
        loss.per_element(torch.zeros_like(loss.elements) if gradient is None else gradient)
        for loss, gradient in zip(losses, gradients, strict=True)
    ]


def quadratic_form(curvature: str, loss: Loss, z: Tensor, u: Tensor, slope: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_t w_t u_t^T M_t u_t``.

    Args:
        curvature: One of `OF_OUTPUTS`.
        loss: The loss.
        z: Outputs at which the curvature is taken, ``(T, C)``.
        u: Directional derivative of the outputs, ``(T, C)``.
        slope: Directional derivative of the loss elements in the same direction, shape of `Loss.per_element`.
        weights: Weights of the elements, same shape.

    Returns:
        Scalar, differentiable in `z`, `u`, `slope` and `weights`.
    """
    if curvature == "loss_hessian":
        return loss.hessian_form(z, u, weights)
    if curvature == "identity":
        return _identity_form(loss, u * _moves(differentiated_outputs(curvature, loss)), weights)
    return _jacobian_form(loss, slope, weights)


def pair_quadratic_form(curvature: str, plus: Loss, minus: Loss, weights: Tensor, step: float) -> Tensor:
    """`quadratic_form` by central differences between the two passes of an antithetic pair.

    Args:
        curvature: One of `OF_OUTPUTS`.
        plus: The loss in the pass with ``+ step``.
        minus: The loss in the pass with ``- step``.
        weights: Weights of the elements, shape of `Loss.per_element`.
        step: The step, positive.

    Returns:
        Scalar, differentiable in the outputs and elements of both passes and in `weights`.
    """
    if curvature == "loss_hessian":
        return plus.pair_hessian_form(plus.outputs, minus.outputs, weights, step)
    if curvature == "identity":
        ends = differentiated_outputs(curvature, plus), differentiated_outputs(curvature, minus)
        return _identity_form(plus, midpoint_and_slope(*ends, step)[1], weights)
    return _jacobian_form(plus, plus.per_element(plus.elements - minus.elements) / (2 * step), weights)


def differentiated_outputs(curvature: str, loss: Loss) -> Tensor:
    """Return the outputs ``(T, C)`` that a curvature speaks of.

    Args:
        curvature: One of `CURVATURES`.
        loss: The loss.

    Returns:
        The outputs of the loss; for ``identity`` the logits behind them, if these are log-probabilities.

    Raises:
        LossNotRecognizedError: If those are not known.
    """
    if curvature != "identity":
        return loss.outputs
    if loss.logits is None:
        raise LossNotRecognizedError(
            f"{loss.name} was given log-probabilities that are not the result of log_softmax in this step, so the "
            "logits behind them, whose changes curvature='identity' averages, are unknown. Make them with "
            "torch.nn.functional.log_softmax inside the step, or use cross_entropy, or another curvature."
        )
    return loss.logits


def _moves(z: Tensor) -> Tensor:
    """1 for outputs, and 0 for classes that are masked out with -inf: whatever is added to them, they stay there."""
    return z.detach().isfinite().to(z.dtype)


def _identity_form(loss: Loss, u: Tensor, weights: Tensor) -> Tensor:
    return (loss.example_weights(weights) * u.square().mean(-1)).sum()


def _jacobian_form(loss: Loss, slope: Tensor, weights: Tensor) -> Tensor:
    # an example of several elements has one loss, and the slope of that is what is squared
    return _divide(loss.example_sum(weights * slope).square(), loss.example_weights(weights)).sum()


def factor(curvature: str, loss: Loss, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return random ``v`` with ``E[v_t v_t^T] = w_t M_t``, uncorrelated between examples.

    Args:
        curvature: One of `OF_OUTPUTS`.
        loss: The loss.
        weights: Weights of the elements, shape of `Loss.per_element`; nonnegative.
        generator: Source of the randomness, on the device of the outputs.

    Returns:
        Tensor ``(T, C)``, differentiable in the outputs.
    """
    outputs = differentiated_outputs(curvature, loss)
    z = outputs.to(noise_dtype(outputs.dtype))
    signs = random_signs(z.shape, z.dtype, generator)
    if curvature == "loss_hessian":
        return loss.hessian_factor(z, weights, signs)
    example_weights = loss.example_weights(weights)
    if curvature == "identity":
        return root(loss.name, example_weights / z.shape[-1]).unsqueeze(-1) * signs * _moves(z)
    gradient = _gradient(loss, weights)
    # where an example has no weight its gradient is 0 too
    return gradient / root(loss.name, example_weights).unsqueeze(-1) * signs[:, :1]


def matrix(curvature: str, loss: Loss, weights: Tensor) -> Tensor:
    """Return ``w_t M_t`` for every example.

    Args:
        curvature: One of `OF_OUTPUTS`.
        loss: The loss.
        weights: Weights of the elements, shape of `Loss.per_element`.

    Returns:
        Tensor ``(T, C, C)``, differentiable in the outputs.
    """
    z = loss.outputs
    if curvature == "loss_hessian":
        with torch.enable_grad():
            value = (weights * loss.per_element(loss.function(z))).sum()
            (gradient,) = torch.autograd.grad(value, z, create_graph=True)
            if not gradient.requires_grad:  # a loss that is linear in its outputs
                return z.new_zeros(*z.shape, z.shape[-1])
            rows = [torch.autograd.grad(gradient[:, c].sum(), z, create_graph=True)[0] for c in range(z.shape[-1])]
        return torch.stack(rows, dim=1)
    example_weights = loss.example_weights(weights)
    if curvature == "identity":
        return example_weights[:, None, None] * torch.diag_embed(
            _moves(differentiated_outputs(curvature, loss)) / z.shape[-1]
        )
    gradient = _gradient(loss, weights)
    return _divide(gradient.unsqueeze(-1) * gradient.unsqueeze(-2), example_weights[:, None, None])


def _gradient(loss: Loss, weights: Tensor) -> Tensor:
    """``d (sum w l) / dz`` through this loss alone, ``(T, C)``."""
    value = (weights * loss.per_element(loss.elements)).sum()
    return torch.autograd.grad(value, loss.outputs, create_graph=True)[0]


def _divide(value: Tensor, weight: Tensor) -> Tensor:
    """``value / weight``, and 0 where an example has no weight (nor then any value)."""
    return value / torch.where(weight == 0, torch.ones_like(weight), weight)
