"""Losses with one element per output, so that the Hessian is diagonal.

Most are one line each: the elements, and their second derivative in the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.losses.base import (
    Loss,
    PerOutputLoss,
    outputs_of_rows,
    reduced,
    reduction_of,
    refuse_trained,
    root,
)
from lightning_dropreg.losses.custom import DifferentiatedLoss
from lightning_dropreg.numerics.dtypes import noise_dtype

__all__ = [
    "ElementwiseLoss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "gaussian_nll_loss",
    "huber_loss",
    "l1_loss",
    "mse_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
]

Function = Callable[[Tensor], Tensor]


class ElementwiseLoss(PerOutputLoss):
    """A loss with a diagonal Hessian.

    Args:
        name: See `Loss`.
        outputs: See `Loss`.
        elements: See `Loss`.
        function: See `Loss`.
        second_derivative: Maps outputs ``(T, C)`` to ``d2 l / d z2``, shape ``(T, C)``.
        mean: See `PerOutputLoss`.
    """

    def __init__(
        self,
        name: str,
        outputs: Tensor,
        elements: Tensor,
        function: Function,
        second_derivative: Function,
        mean: bool | None,
    ) -> None:
        super().__init__(name, outputs, elements, function, mean)
        self.second_derivative = second_derivative

    def hessian_form(self, z: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        """See `Loss`: ``sum w l''(z) u^2``."""
        return (weights * self.second_derivative(z) * u.square()).sum()

    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """See `Loss`: ``sqrt(w l''(z)) r``."""
        return root(self.name, weights * self.second_derivative(z)) * signs


class MeanAndVarianceLoss(DifferentiatedLoss, PerOutputLoss):
    """Elements of two outputs each, ``(T, C)`` of the outputs ``(T, 2 C)``: all means, then all variances."""

    def per_element(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values.reshape(len(self.outputs), -1)


class BernoulliLoss(ElementwiseLoss):
    """Binary cross entropy of logits, one distribution for every output."""

    def symmetric_divergence(self, other: Loss, weights: Tensor) -> Tensor:
        """See `Loss`: ``(p - q) (z_p - z_q) / 2`` for every output."""
        one, two = (loss.outputs.to(noise_dtype(loss.outputs.dtype)) for loss in (self, other))
        scale = 4 * self.second_derivative(torch.zeros_like(one))  # class weights: p (1 - p) is 1/4 there
        return (weights * scale * (one.sigmoid() - two.sigmoid()) * (one - two)).sum() / 2


def of_means(reduction: str) -> bool | None:
    """Whether an example's loss is the mean of its elements; None if the user says."""
    return None if reduction == "none" else reduction != "sum"


def _loss(
    name: str,
    outputs: Tensor,
    shape: torch.Size,
    function: Function,
    second_derivative: Function,
    reduction: str,
    mass: Tensor | None = None,
    kind: type[ElementwiseLoss] = ElementwiseLoss,
) -> tuple[Tensor, Loss]:
    """Compute and describe a loss whose elements have `shape`, reduced by `reduction`; `mass` as in `Loss`."""
    elements = function(outputs).reshape(shape)
    loss = kind(name, outputs, elements, function, second_derivative, of_means(reduction))
    loss.mass, loss.is_mean = (mass if reduction == "mean" else None), reduction == "mean"
    count = float(max(elements.numel(), 1)) if mass is None else mass.sum()
    return reduced(loss, reduction, count), loss


def _residual(input: Tensor, target: Tensor) -> tuple[Tensor, torch.Size]:
    """Outputs of a loss of ``input - target``: the difference, which is right for targets that move too."""
    input, target = torch.broadcast_tensors(input, target)
    return outputs_of_rows(input - target), input.shape


def _weighted(function: Function, weight: Tensor | None) -> Function:
    return function if weight is None else lambda z: function(z) * weight


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.mse_loss`: ``l'' = 2``. The output is ``input - target``: both may move."""
    outputs, shape = _residual(input, target)
    weights = None if weight is None else outputs_of_rows(weight.expand(shape))
    return _loss(
        "mse_loss",
        outputs,
        shape,
        _weighted(lambda z: z.square(), weights),
        _weighted(lambda z: torch.full_like(z, 2.0), weights),
        reduction_of(size_average, reduce, reduction),
        weights,
    )


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.huber_loss`: ``l'' = 1`` within `delta` of the target and 0 outside."""
    outputs, shape = _residual(input, target)
    weights = None if weight is None else outputs_of_rows(weight.expand(shape))
    return _loss(
        "huber_loss",
        outputs,
        shape,
        _weighted(lambda z: F.huber_loss(z, torch.zeros_like(z), reduction="none", delta=delta), weights),
        _weighted(lambda z: (z.abs() <= delta).to(z.dtype), weights),
        reduction,
    )


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.smooth_l1_loss`: ``l'' = 1/beta`` within `beta` of the target and 0 outside."""
    if beta == 0:
        return l1_loss(input, target, size_average, reduce, reduction)
    outputs, shape = _residual(input, target)
    return _loss(
        "smooth_l1_loss",
        outputs,
        shape,
        lambda z: F.smooth_l1_loss(z, torch.zeros_like(z), reduction="none", beta=beta),
        lambda z: (z.abs() < beta).to(z.dtype) / beta,
        reduction_of(size_average, reduce, reduction),
    )


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.l1_loss`, which has no Hessian that says anything.

    It is 0 almost everywhere, but dropout does raise the expected loss, by what happens at the kink. A penalty of 0
    would be wrong, so this curvature is refused; those that need no Hessian are not.

    Returns:
        The reduced loss and its description.
    """
    outputs, shape = _residual(input, target)
    weights = None if weight is None else outputs_of_rows(weight.expand(shape))
    distance = _weighted(torch.abs, weights)

    def refuse(z: Tensor) -> Tensor:
        raise LossNotRecognizedError(
            "l1_loss has the second derivative 0 everywhere but at its kink, so the explicit penalty with curvature="
            "'loss_hessian' would be 0, which is not what dropout does. Use huber_loss or smooth_l1_loss, or "
            "curvature='identity' or 'loss_jacobian'."
        )

    elements = distance(outputs).reshape(shape)
    reduction = reduction_of(size_average, reduce, reduction)
    loss = ElementwiseLoss("l1_loss", outputs, elements, refuse, refuse, of_means(reduction))
    loss.value = distance
    loss.mass, loss.is_mean = (weights if reduction == "mean" else None), reduction == "mean"
    count = float(max(elements.numel(), 1)) if weights is None else weights.sum()
    return reduced(loss, reduction, count), loss


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.binary_cross_entropy_with_logits`: ``l'' = p (1 - p)``, weighted."""
    refuse_trained("binary_cross_entropy_with_logits", target)
    reduction = reduction_of(size_average, reduce, reduction)
    labels = outputs_of_rows(target)
    weights = None if weight is None else outputs_of_rows(weight.expand_as(input))
    positive = None if pos_weight is None else outputs_of_rows(pos_weight.expand_as(input))
    name, outputs = "binary_cross_entropy_with_logits", outputs_of_rows(input)
    return _bernoulli(name, outputs, input.shape, labels, weights, positive, reduction)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.binary_cross_entropy`: the outputs are the logits ``log p - log(1 - p)`` of its input.

    The penalty is that of the same model written with logits. As torch does, each logarithm is bounded below by -100.

    Returns:
        The reduced loss and its description.
    """
    refuse_trained("binary_cross_entropy", target)
    p = outputs_of_rows(input)
    smallest, below_one = torch.finfo(p.dtype).tiny, 1 - torch.finfo(p.dtype).eps / 2
    log_p = p.clamp_min(smallest).log().masked_fill(p <= 0, -100.0)
    log_q = torch.log1p(-p.clamp_max(below_one)).masked_fill(p >= 1, -100.0)
    weights = None if weight is None else outputs_of_rows(weight.expand_as(input))
    reduction = reduction_of(size_average, reduce, reduction)
    labels, outputs = outputs_of_rows(target), log_p - log_q
    return _bernoulli("binary_cross_entropy", outputs, input.shape, labels, weights, None, reduction)


def _bernoulli(
    name: str,
    outputs: Tensor,
    shape: torch.Size,
    labels: Tensor,
    weights: Tensor | None,
    positive: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Loss]:
    def function(z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, labels, weights, reduction="none", pos_weight=positive)

    def second_derivative(z: Tensor) -> Tensor:
        value = z.sigmoid() * (-z).sigmoid()
        if positive is not None:
            value = value * (positive * labels + 1 - labels)
        return value if weights is None else value * weights

    return _loss(name, outputs, shape, function, second_derivative, reduction, kind=BernoulliLoss)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.soft_margin_loss`, ``log(1 + exp(-y z))``: ``l'' = y^2 p (1 - p)``."""
    refuse_trained("soft_margin_loss", target)
    labels = outputs_of_rows(target)
    return _loss(
        "soft_margin_loss",
        outputs_of_rows(input),
        input.shape,
        lambda z: F.softplus(-labels * z),
        lambda z: labels.square() * z.sigmoid() * (-z).sigmoid(),
        reduction_of(size_average, reduce, reduction),
    )


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.poisson_nll_loss`: ``l'' = exp(z)``, or ``y / (z + eps)^2`` with ``log_input=False``."""
    refuse_trained("poisson_nll_loss", target)
    input, target = torch.broadcast_tensors(input, target)
    labels = outputs_of_rows(target)

    def function(z: Tensor) -> Tensor:
        return F.poisson_nll_loss(z, labels, log_input=log_input, full=full, eps=eps, reduction="none")

    return _loss(
        "poisson_nll_loss",
        outputs_of_rows(input),
        input.shape,
        function,
        (lambda z: z.exp()) if log_input else (lambda z: labels / (z + eps).square()),
        reduction_of(size_average, reduce, reduction),
    )


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.gaussian_nll_loss`: ``l'' = 1 / var`` in the mean.

    A variance that is trained is an output as well: then every element has the two outputs ``(mean, var)`` and its full
    ``2 x 2`` Hessian, which is not always positive.

    Returns:
        The reduced loss and its description.
    """
    refuse_trained("gaussian_nll_loss", target)
    checked = F.gaussian_nll_loss(input.detach(), target, _detached(var), full, eps, "none")  # torch's own checks
    if isinstance(var, float):
        var = torch.full_like(input, var)
    elif var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    mean, variance, target = torch.broadcast_tensors(input, var, target)
    constant = 0.5 * math.log(2 * math.pi) if full else 0.0

    def element(mean: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        bounded = variance + (variance.clamp_min(eps) - variance).detach()  # as torch: bounded in value only
        return 0.5 * (bounded.log() + (mean - labels).square() / bounded) + constant

    if not variance.requires_grad:
        fixed, labels = outputs_of_rows(variance), outputs_of_rows(target)
        return _loss(
            "gaussian_nll_loss",
            outputs_of_rows(mean),
            checked.shape,
            lambda z: element(z, fixed, labels),
            lambda z: 1 / fixed.clamp_min(eps).expand_as(z),
            reduction,
        )
    labels = outputs_of_rows(target)
    outputs = torch.cat([outputs_of_rows(mean), outputs_of_rows(variance)], -1)

    def function(z: Tensor) -> Tensor:
        mean, variance = z.chunk(2, -1)
        return element(mean, variance, labels)

    elements = function(outputs).reshape(checked.shape)
    name = "gaussian_nll_loss with a trained variance"
    loss = MeanAndVarianceLoss(name, outputs, elements, function, of_means(reduction))
    return reduced(loss, reduction, float(max(elements.numel(), 1))), loss


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value
