"""What the package must know of a loss: its outputs, its elements, and the Hessian of one in the other.

A recognized loss is split in three: outputs ``z`` of shape ``(T, C)`` (``T`` examples or tokens with ``C`` outputs
each), elements ``l(z, y)`` before any reduction, and the reduction, which stays the user's own. Two families cover
the losses of practice:

* `CategoricalLoss`: one element per example, whose Hessian is ``s (diag(p) - p p^T)``, ``p = softmax(z)``;
* `ElementwiseLoss`: one element per output, so the Hessian is diagonal.

A new loss is one function at the end of this file and its row in `RECOGNIZED`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.dual import log_softmax
from lightning_dropreg.sites import noise_dtype

__all__ = ["RECOGNIZED", "CategoricalLoss", "ElementwiseLoss", "Loss"]


class Loss(ABC):
    """One loss as it was computed in a pass.

    Attributes:
        name: The function that computed it, e.g. ``"cross_entropy"``.
        outputs: The model outputs ``z``, shape ``(T, C)``, part of the pass's autograd graph.
        elements: The unreduced loss, in the shape that ``reduction="none"`` gives.
        function: Maps outputs ``(T, C)`` to elements (flattened); its Hessian defines the ``loss_hessian`` curvature.
    """

    def __init__(self, name: str, outputs: Tensor, elements: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.outputs = outputs
        self.elements = elements
        self.function = function

    @abstractmethod
    def per_element(self, values: Tensor) -> Tensor:
        """Reshape a tensor like `elements` to ``(T,)`` or ``(T, C)``."""

    @abstractmethod
    def example_weights(self, weights: Tensor) -> Tensor:
        """Weight of each example, shape ``(T,)``, from the weights of its elements (`per_element`)."""

    @abstractmethod
    def example_sum(self, values: Tensor) -> Tensor:
        """Sum `values` (`per_element`) over the elements of each example: shape ``(T,)``."""

    @abstractmethod
    def hessian_form(self, z: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        """Return ``sum_t w_t u_t^T H_t(z_t) u_t``, a scalar, differentiable in `z` and `u`."""

    @abstractmethod
    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """Return ``v`` of shape ``(T, C)`` with ``E[v_t v_t^T] = w_t H_t(z_t)`` over random `signs` ``(T, C)``."""


class CategoricalLoss(Loss):
    """Cross entropy in all its forms: ``H = s_t (diag(p_t) - p_t p_t^T)`` with ``p = softmax(z)``.

    Args:
        name: See `Loss`.
        outputs: See `Loss`.
        elements: See `Loss`.
        function: See `Loss`.
        scale: ``s``, shape ``(T,)``: the sum of the target's (class-weighted) probabilities; 0 for ignored targets,
            1 for an unweighted target.
        counted: 1 for examples that count and 0 for ignored ones, shape ``(T,)``.
    """

    def __init__(
        self,
        name: str,
        outputs: Tensor,
        elements: Tensor,
        function: Callable[[Tensor], Tensor],
        scale: Tensor,
        counted: Tensor,
    ) -> None:
        super().__init__(name, outputs, elements, function)
        self.scale = scale
        self.counted = counted

    def per_element(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values.reshape(-1)

    def example_weights(self, weights: Tensor) -> Tensor:
        """See `Loss`."""
        return weights * self.counted

    def example_sum(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values

    def hessian_form(self, z: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        """See `Loss`: ``sum_t w_t s_t Var_{y ~ softmax(z_t)}(u_ty)``."""
        p = z.softmax(-1)
        deviation = u - (p * u).sum(-1, keepdim=True)
        return ((p * deviation.square()).sum(-1) * (weights * self.scale)).sum()

    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        r"""See `Loss`.

        The paper samples a label ``y`` from the model and takes ``p - onehot(y)``: the right covariance, but a gradient
        that misses how the distribution of the label depends on the weights. ``sqrt(p) * r - p (sqrt(p) . r)`` has the
        same covariance, and its randomness ``r`` depends on nothing.

        Returns:
            ``v``, shape ``(T, C)``.
        """
        log_p = z.log_softmax(-1)
        spread = (0.5 * log_p).exp() * signs
        v = spread - log_p.exp() * spread.sum(-1, keepdim=True)
        return v * (weights * self.scale).sqrt().unsqueeze(-1)


class ElementwiseLoss(Loss):
    """One element per output, so ``H`` is diagonal. The last dimension of the outputs holds one example's outputs.

    Args:
        name: See `Loss`.
        outputs: See `Loss`.
        elements: See `Loss`.
        function: See `Loss`.
        second_derivative: Maps outputs ``(T, C)`` to ``d2 l / d z2``, shape ``(T, C)``, nonnegative.
        mean: Whether one example's loss is the mean of its elements (``reduction="mean"``) or their sum.
    """

    def __init__(
        self,
        name: str,
        outputs: Tensor,
        elements: Tensor,
        function: Callable[[Tensor], Tensor],
        second_derivative: Callable[[Tensor], Tensor],
        mean: bool,
    ) -> None:
        super().__init__(name, outputs, elements, function)
        self.second_derivative = second_derivative
        self.mean = mean

    def per_element(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values.reshape(self.outputs.shape)

    def example_weights(self, weights: Tensor) -> Tensor:
        """See `Loss`."""
        return weights.sum(-1) if self.mean else weights.mean(-1)

    def example_sum(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values.sum(-1)

    def hessian_form(self, z: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        """See `Loss`: ``sum w l''(z) u^2``."""
        return (weights * self.second_derivative(z) * u.square()).sum()

    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """See `Loss`: ``sqrt(w l''(z)) r``."""
        curvature = self.second_derivative(z)
        # the square root has no derivative at 0, where a masked element has its weight and a sigmoid its tail
        tiny = torch.finfo(curvature.dtype).tiny
        return (weights * curvature).clamp_min(tiny).sqrt() * signs


# --- the functions of torch.nn.functional -----------------------------------------------------------------------
#
# Each takes the arguments of the function it stands for and returns the loss as the user asked for it, reduced in
# the user's way, together with its description.


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Translate the two deprecated arguments that every torch loss still accepts."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def _reduce(elements: Tensor, reduction: str, denominator: Tensor | float) -> Tensor:
    if reduction == "none":
        return elements.clone()  # the user may go on in place, and ours must stay what they are
    return elements.sum() if reduction == "sum" else elements.sum() / denominator


def _classes_last(values: Tensor, classes: int) -> Tensor:
    """``(N, C, d1, ...)`` or ``(C,)`` to ``(T, C)``."""
    return values.movedim(1 if values.ndim > 1 else 0, -1).reshape(-1, classes)


def _categorical(
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
    log_probabilities: bool = False,
) -> tuple[Tensor, Loss]:
    classes = input.shape[1 if input.ndim > 1 else 0]
    outputs = _classes_last(input, classes)
    soft = target.is_floating_point()
    shape = input.shape[:1] + input.shape[2:] if input.ndim > 1 else torch.Size([])
    dtype = noise_dtype(input.dtype)
    class_weights = torch.ones(classes, dtype=dtype, device=input.device) if weight is None else weight.to(dtype)
    if soft:
        labels = _classes_last(target, classes)
        scale = labels.to(dtype) @ class_weights
        counted = torch.ones_like(scale)
        denominator: Tensor | float = float(max(outputs.shape[0], 1))
    else:
        labels = target.reshape(-1)
        counted = (labels != ignore_index).to(dtype)
        scale = class_weights[labels.clamp(0, classes - 1)] * counted
        denominator = scale.sum()
    if label_smoothing:
        scale = (1 - label_smoothing) * scale + label_smoothing / classes * class_weights.sum() * counted

    def of_log_probabilities(log_p: Tensor) -> Tensor:
        log_p = log_p.to(dtype)
        if soft:
            smooth = labels * (1 - label_smoothing) + label_smoothing / classes
            return -(log_p * (smooth * class_weights)).sum(-1)
        hard = F.nll_loss(log_p, labels, weight, ignore_index=ignore_index, reduction="none")
        if not label_smoothing:
            return hard
        return (1 - label_smoothing) * hard - label_smoothing / classes * (log_p @ class_weights) * counted

    def function(z: Tensor) -> Tensor:
        return of_log_probabilities(log_softmax(z, -1))

    # the curvature is that of `function` for log-probabilities too: log_softmax leaves their values alone
    elements = (of_log_probabilities if log_probabilities else function)(outputs).reshape(shape)
    return _reduce(elements, reduction, denominator), CategoricalLoss(name, outputs, elements, function, scale, counted)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.cross_entropy`, every option included."""
    reduction = _reduction(size_average, reduce, reduction)
    return _categorical("cross_entropy", input, target, weight, ignore_index, reduction, label_smoothing)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.nll_loss` of log-probabilities, which are logits whose softmax is already done."""
    reduction = _reduction(size_average, reduce, reduction)
    return _categorical("nll_loss", input, target, weight, ignore_index, reduction, log_probabilities=True)


def _outputs_last(values: Tensor) -> Tensor:
    """``(..., C)`` to ``(T, C)``, ``(N,)`` to ``(N, 1)``."""
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.binary_cross_entropy_with_logits`."""
    reduction = _reduction(size_average, reduce, reduction)
    outputs = _outputs_last(input)
    labels = _outputs_last(target)
    weights = None if weight is None else _outputs_last(weight.expand_as(input))
    positive = None if pos_weight is None else _outputs_last(pos_weight.expand_as(input))

    def function(z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, labels, weights, reduction="none", pos_weight=positive)

    def second_derivative(z: Tensor) -> Tensor:
        value = z.sigmoid() * (-z).sigmoid()
        if positive is not None:
            value = value * (positive * labels + 1 - labels)
        return value if weights is None else value * weights

    elements = function(outputs).reshape(input.shape)
    loss = ElementwiseLoss(
        "binary_cross_entropy_with_logits", outputs, elements, function, second_derivative, reduction == "mean"
    )
    return _reduce(elements, reduction, float(max(elements.numel(), 1))), loss


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.mse_loss`. A target that needs a gradient counts as output too: ``z = input - target``."""
    reduction = _reduction(size_average, reduce, reduction)
    input, target = torch.broadcast_tensors(input, target)
    both = target.requires_grad
    shape = input.shape
    outputs = _outputs_last(input - target) if both else _outputs_last(input)
    labels = torch.zeros_like(outputs) if both else _outputs_last(target)
    weights = None if weight is None else _outputs_last(weight.expand(shape))

    def function(z: Tensor) -> Tensor:
        squares = F.mse_loss(z, labels, reduction="none")
        return squares if weights is None else squares * weights

    def second_derivative(z: Tensor) -> Tensor:
        return torch.full_like(z, 2.0) if weights is None else (2.0 * weights).to(z.dtype)

    elements = function(outputs).reshape(shape)
    loss = ElementwiseLoss("mse_loss", outputs, elements, function, second_derivative, reduction == "mean")
    denominator = float(max(elements.numel(), 1)) if weights is None else weights.sum()
    return _reduce(elements, reduction, denominator), loss


RECOGNIZED: dict[Callable[..., Any], Callable[..., tuple[Tensor, Loss]]] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.mse_loss: mse_loss,
}
