"""Losses of a choice among classes: cross entropy in all its forms, and the divergence of two distributions.

All have the Hessian ``s (diag(p) - p p^T)`` with ``p = softmax(z)``, one example a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.losses.base import (
    Loss,
    PerOutputLoss,
    classes_last,
    outputs_last,
    reduced,
    reduction_of,
    refuse_trained,
    root,
)
from lightning_dropreg.losses.softmax import pair_variance, symmetric_divergence, variance
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.dual import log_softmax

__all__ = ["CategoricalLoss", "DivergenceLoss", "cross_entropy", "kl_div", "nll_loss"]


def softmax_factor(name: str, z: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
    """Return random ``v`` with ``E[v_t v_t^T] = s_t (diag(p_t) - p_t p_t^T)``.

    The paper samples a label ``y`` from the model and takes ``p - onehot(y)``: the right covariance, but a gradient
    that misses how the distribution of the label depends on the weights. ``sqrt(p) * r - p (sqrt(p) . r)`` has the
    same covariance, and its randomness ``r`` depends on nothing.
    """
    log_p = z.log_softmax(-1)
    spread = (0.5 * log_p).exp() * signs
    v = spread - log_p.exp() * spread.sum(-1, keepdim=True)
    return v * root(name, scale).unsqueeze(-1)


def _check_log_probabilities(name: str, z: Tensor) -> None:
    total = z.detach().to(noise_dtype(z.dtype)).logsumexp(-1)
    tolerance = 1e-3 if z.dtype in {torch.float32, torch.float64} else 0.1
    if total.numel() and bool((total.abs() > tolerance).any()):
        raise LossNotRecognizedError(
            f"The input of {name} is not made of log-probabilities over its classes (they sum to "
            f"{float(total.exp().flatten()[0]):.3g}), so its curvature in the logits is unknown. Apply log_softmax "
            "over the classes, or use cross_entropy."
        )


class CategoricalLoss(Loss):
    """Cross entropy in all its forms: ``H = s_t (diag(p_t) - p_t p_t^T)`` with ``p = softmax(z)``.

    Args:
        name: See `Loss`.
        outputs: See `Loss`.
        elements: See `Loss`.
        function: See `Loss`.
        scale: ``s``, shape ``(T,)``: the sum of the target's (class-weighted) probabilities; 0 for ignored targets,
            1 for an unweighted target. Label smoothing moves probability between classes, so it leaves 1 as it is.
        counted: 1 for examples that count and 0 for ignored ones, shape ``(T,)``.

    Attributes:
        labels_are_given: Whether targets are numbers of classes, and classes all weigh the same.
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
        self.labels_are_given = False

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
        return variance(z, u, weights * self.scale)

    def pair_hessian_form(self, plus: Tensor, minus: Tensor, weights: Tensor, step: float) -> Tensor:
        """See `Loss`."""
        return pair_variance(plus, minus, weights * self.scale, step)

    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """See `Loss`."""
        return softmax_factor(self.name, z, weights * self.scale, signs)

    def symmetric_divergence(self, other: Loss, weights: Tensor) -> Tensor:
        """See `Loss`."""
        return symmetric_divergence(self.outputs, other.outputs, weights * self.scale)

    def parts(self, split: Callable[[Tensor], Sequence[Tensor]]) -> list[Loss]:
        """See `Loss`."""
        # what is split twice is differentiated twice
        behind = None if self.logits is self.outputs else self.logits
        tensors = (self.outputs, self.per_element(self.elements), self.scale, self.counted)
        logits = None if behind is None else split(behind)
        parts: list[Loss] = []
        for number, (outputs, elements, scale, counted) in enumerate(zip(*map(split, tensors), strict=True)):
            part = object.__new__(type(self))  # copy.copy takes ten times as long
            part.__dict__.update(self.__dict__)
            part.outputs, part.elements, part.scale, part.counted = outputs, elements, scale, counted
            if self.logits is not None:
                part.logits = outputs if logits is None else logits[number]
            parts.append(part)
        return parts

    def moves(self, other: Loss) -> bool:
        """See `Loss`: what changes where labels are numbers jumps, and has no derivative (but at the jump)."""
        return not self.labels_are_given and super().moves(other)

    def take_logits(self, logits: Tensor) -> None:
        """See `Loss`."""
        self.logits = classes_last(logits, self.outputs.shape[-1])

    def check(self) -> None:
        """See `Loss`."""
        if self.name == "nll_loss":
            _check_log_probabilities(self.name, self.outputs)


class DivergenceLoss(PerOutputLoss):
    """Kullback-Leibler divergence of log-probabilities ``z`` from a fixed target: ``sum_c y_c (log y_c - z_c)``.

    It is linear in log-probabilities; these are logits whose softmax is already done, and in the logits its Hessian is
    that of cross entropy with soft targets.

    Args:
        name: See `Loss`.
        outputs: See `Loss`.
        elements: See `Loss`; one for every class.
        function: See `Loss`.
        labels: Probabilities of the target, shape ``(T, C)``.
        mean: See `PerOutputLoss`.
    """

    def __init__(
        self,
        name: str,
        outputs: Tensor,
        elements: Tensor,
        function: Callable[[Tensor], Tensor],
        labels: Tensor,
        mean: bool | None,
    ) -> None:
        super().__init__(name, outputs, elements, function, mean)
        self.labels = labels

    def hessian_form(self, z: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        """See `Loss`."""
        return variance(z, u, (weights * self.labels).sum(-1))

    def pair_hessian_form(self, plus: Tensor, minus: Tensor, weights: Tensor, step: float) -> Tensor:
        """See `Loss`."""
        return pair_variance(plus, minus, (weights * self.labels).sum(-1), step)

    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """See `Loss`."""
        return softmax_factor(self.name, z, (weights * self.labels).sum(-1), signs)

    def symmetric_divergence(self, other: Loss, weights: Tensor) -> Tensor:
        """See `Loss`."""
        return symmetric_divergence(self.outputs, other.outputs, (weights * self.labels).sum(-1))

    def take_logits(self, logits: Tensor) -> None:
        """See `Loss`."""
        self.logits = outputs_last(logits.expand(self.elements.shape))

    def check(self) -> None:
        """See `Loss`."""
        _check_log_probabilities(self.name, self.outputs)


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
    outputs = classes_last(input, classes)
    soft = target.is_floating_point()
    shape = input.shape[:1] + input.shape[2:] if input.ndim > 1 else torch.Size([])
    dtype = noise_dtype(input.dtype)
    if weight is None and not (soft or label_smoothing):
        class_weights = target  # nobody asks for them
    else:
        class_weights = input.new_ones(classes, dtype=dtype) if weight is None else weight.to(dtype)
    if soft:
        refuse_trained(name, target)
        labels = classes_last(target, classes)
        scale = labels.to(dtype) @ class_weights
        counted = torch.ones_like(scale)
        denominator: Tensor | float = float(max(outputs.shape[0], 1))
    else:
        labels = target.reshape(-1)
        counted = (labels != ignore_index).to(dtype)
        scale = counted if weight is None else class_weights[labels.clamp(0, classes - 1)] * counted
        denominator = scale.sum()
    mass = None if soft or reduction != "mean" else scale
    if label_smoothing:
        scale = (1 - label_smoothing) * scale + label_smoothing / classes * class_weights.sum() * counted

    def of_log_probabilities(log_p: Tensor) -> Tensor:
        log_p = log_p.to(dtype)
        if soft:
            smooth = labels * (1 - label_smoothing) + label_smoothing / classes
            return -(log_p * (smooth * class_weights)).sum(-1)
        known = None if weight is None else class_weights
        hard = F.nll_loss(log_p, labels, known, ignore_index=ignore_index, reduction="none")
        if not label_smoothing:
            return hard
        return (1 - label_smoothing) * hard - label_smoothing / classes * (log_p @ class_weights) * counted

    def function(z: Tensor) -> Tensor:
        return of_log_probabilities(log_softmax(z, -1))

    # the curvature is that of `function` for log-probabilities too: log_softmax leaves their values alone
    elements = (of_log_probabilities if log_probabilities else function)(outputs).reshape(shape)
    loss = CategoricalLoss(name, outputs, elements, function, scale, counted)
    loss.mass, loss.is_mean = mass, reduction == "mean"
    loss.labels_are_given = not soft and weight is None
    if log_probabilities:
        loss.logits = None
    return reduced(loss, reduction, denominator), loss


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
    reduction = reduction_of(size_average, reduce, reduction)
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
    reduction = reduction_of(size_average, reduce, reduction)
    return _categorical("nll_loss", input, target, weight, ignore_index, reduction, log_probabilities=True)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> tuple[Tensor, Loss]:
    """`torch.nn.functional.kl_div` of log-probabilities over the last dimension."""
    refuse_trained("kl_div", target)
    reduction = reduction_of(size_average, reduce, reduction)
    input, target = torch.broadcast_tensors(input, target)
    outputs, labels = outputs_last(input), outputs_last(target)
    probabilities = labels.exp() if log_target else labels

    def divergence(log_p: Tensor) -> Tensor:
        return F.kl_div(log_p, labels, reduction="none", log_target=log_target)

    elements = divergence(outputs).reshape(input.shape)
    loss = DivergenceLoss(
        "kl_div",
        outputs,
        elements,
        lambda z: divergence(log_softmax(z, -1)),
        probabilities,
        {"mean": True, "none": None}.get(reduction, False),  # the others add up an example's elements
    )
    loss.logits, loss.is_mean = None, reduction in {"mean", "batchmean"}
    if outputs.device.type == "cpu":
        loss.check()
    if reduction == "batchmean":
        return elements.sum() / input.shape[0], loss
    return reduced(loss, reduction, float(max(elements.numel(), 1))), loss
