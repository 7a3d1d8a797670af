"""What every recognized loss has, and what reading one takes.

An *example* is what has a loss of its own: a row of what the loss function was given, that is one entry of its first
dimension; a token (a pixel) where the function gives one element for each, as ``cross_entropy`` does. An *output* is a
logit, or what else the loss function compares with the target; of log-probabilities, the logits behind ``log_softmax``.
The ablations need both words: ``identity`` averages over the outputs of an example, ``loss_jacobian`` squares the
derivative of an example's loss.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.errors import LossNotRecognizedError, UnsupportedOperationError
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.dual import divided

__all__ = [
    "Loss",
    "PerOutputLoss",
    "classes_last",
    "differ",
    "midpoint_and_slope",
    "outputs_last",
    "outputs_of_rows",
    "reduced",
    "reduction_of",
    "refuse_trained",
    "root",
]


class Loss(ABC):
    """One loss as it was computed in a pass.

    Attributes:
        name: The function that computed it, e.g. ``"cross_entropy"``.
        outputs: The model outputs ``z``, shape ``(T, C)``, part of the pass's autograd graph.
        elements: The unreduced loss, in the shape that ``reduction="none"`` gives.
        function: Maps outputs ``(T, C)`` to elements (flattened); its Hessian defines the ``loss_hessian`` curvature.
        is_mean: Whether the loss function itself took the mean of its elements, so that what they count is known for
            any number of them. (A user's own reduction may divide by anything.)
        mass: What each element (`per_element`) counts in the denominator of the mean that the loss function took; None
            where all count 1, or the loss function took no mean.
        logits: What ``identity`` averages over, ``(T, C)``: the outputs themselves, but the logits behind them where
            these are log-probabilities; None where those are not known.
        value: The same as `function`, of losses whose `function` refuses because its Hessian says nothing.
        as_sum: Whether an example's loss is the sum of its elements, as the whole batch has shown; None where these are
            the elements of a whole batch, which show it themselves (`counts_as_sum`).
        end: The node of the autograd graph at which the loss function ended in a sum or mean; None if elsewhere.
        denominator: What it divided the sum by.
    """

    is_mean = False
    as_sum: Tensor | None = None
    mass: Tensor | None = None
    end: Any = None
    denominator: Tensor | float = 1.0
    logits: Tensor | None

    def __init__(self, name: str, outputs: Tensor, elements: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.outputs = outputs
        self.elements = elements
        self.function = function
        self.logits = outputs
        self.value = function

    def is_all_of(self, total: Tensor) -> bool:
        """Whether what a step returned is what the loss function gave, as it was."""
        return self.end is not None and total.grad_fn is self.end and not total._backward_hooks

    @abstractmethod
    def per_element(self, values: Tensor) -> Tensor:
        """Reshape a tensor like `elements` to ``(T,)`` or ``(T, C)``."""

    @abstractmethod
    def example_weights(self, weights: Tensor) -> Tensor:
        """Weight of each example, shape ``(T,)``, from the weights of its elements (`per_element`)."""

    def counts_as_sum(self, weights: Tensor) -> Tensor | None:
        """Whether the weights of a whole batch say that an example's loss is the sum of its elements, not their mean.

        Returns:
            A boolean scalar; None where an example has one element.
        """
        return None

    @abstractmethod
    def example_sum(self, values: Tensor) -> Tensor:
        """Sum `values` (`per_element`) over the elements of each example: shape ``(T,)``."""

    @abstractmethod
    def hessian_form(self, z: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        """Return ``sum_t w_t u_t^T H_t(z_t) u_t``, a scalar, differentiable in `z` and `u`."""

    def pair_hessian_form(self, plus: Tensor, minus: Tensor, weights: Tensor, step: float) -> Tensor:
        """Return `hessian_form` for an antithetic pair: ``z`` is the mean, ``u`` the central difference."""
        return self.hessian_form(*midpoint_and_slope(plus, minus, step), weights)

    @abstractmethod
    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """Return ``v`` of shape ``(T, C)`` with ``E[v_t v_t^T] = w_t H_t(z_t)`` over random `signs` ``(T, C)``."""

    def symmetric_divergence(self, other: Loss, weights: Tensor) -> Tensor:
        """Return ``sum_t w_t (KL_t + KL'_t) / 2`` between the predictions of two passes, a scalar.

        Args:
            other: The same loss in the other pass.
            weights: Weights of the elements (`per_element`).

        Raises:
            LossNotRecognizedError: If this is no loss between distributions over classes.
        """
        raise LossNotRecognizedError(
            f"R-Drop compares the predictions of two draws as distributions over classes, and {self.name} is no loss "
            "between such (cross_entropy, nll_loss, kl_div and binary_cross_entropy are). Use ExplicitPenalty(strength="
            "1 + 2 * alpha), which is the same to second order and knows this loss."
        )

    def parts(self, split: Callable[[Tensor], Sequence[Tensor]]) -> list[Loss] | None:
        """Return the losses of parts of its examples, to compare with one another in `pair_hessian_form`.

        Args:
            split: Splits a tensor ``(T, ...)`` along its first dimension; one call for each tensor, because the
                backward of several is several times the size of the whole.

        Returns:
            One loss for each part; None for a kind of loss that can be had of all its examples only.
        """
        return None

    def reordered(self, order: Tensor) -> Loss:
        """Return the loss with the outputs and elements of its examples in another order, and nothing else."""
        other = copy.copy(self)
        other.outputs = self.outputs[order]
        other.logits = None if self.logits is None else self.logits[order]
        other.elements = self.per_element(self.elements)[order].reshape(self.elements.shape)
        return other

    def moves(self, other: Loss) -> bool:
        """Whether the loss is another function of its outputs than `other`, the same loss in another pass.

        That is so where a target, a weight or a variance changed; it reads values, so the device is waited for.

        Returns:
            Whether it is.
        """
        with torch.no_grad():
            ours, theirs = (self.per_element(each.value(self.outputs)) for each in (self, other))
        return differ(ours, theirs)

    def take_logits(self, logits: Tensor) -> None:  # noqa: B027
        """Take note of the logits behind log-probabilities, in the shape in which the loss was given these."""

    def check(self) -> None:  # noqa: B027
        """Raise if the values are not what the curvature supposes; reads values, so the device is waited for."""


class PerOutputLoss(Loss):
    """A loss with one element per output; the last dimension of the outputs holds one example's.

    Args:
        name: See `Loss`.
        outputs: See `Loss`.
        elements: See `Loss`.
        function: See `Loss`.
        mean: Whether the loss function made the mean of one example's elements its loss, or (``reduction="sum"``) their
            sum; None if it left that to the user.
    """

    def __init__(
        self, name: str, outputs: Tensor, elements: Tensor, function: Callable[[Tensor], Tensor], mean: bool | None
    ) -> None:
        super().__init__(name, outputs, elements, function)
        self.mean = mean

    def per_element(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values.reshape(self.outputs.shape)

    def example_weights(self, weights: Tensor) -> Tensor:
        """See `Loss`: all weights of an example together where its loss is a mean, the weight of one where it is a sum.

        Returns:
            The weights.
        """
        total = weights.sum(-1)
        as_sum = self.counts_as_sum(weights) if self.as_sum is None else self.as_sum
        return torch.where(as_sum, total / (weights != 0).sum(-1).clamp_min(1), total)

    def counts_as_sum(self, weights: Tensor) -> Tensor:
        """See `Loss`.

        A mean over rows of sums over outputs has the same value as a mean of everything, times a constant, so the
        weights must tell which it is. With ``n`` examples of ``c`` outputs, a weight of ``1/n`` or 1 is that of
        sums over the outputs, one of ``1/(n c)`` or ``1/c`` that of means, whatever the loss function was asked for;
        with any other weight that decides, and where it was asked for neither, the nearer of the two.

        Returns:
            A boolean scalar.
        """
        per_example = (weights != 0).sum(-1)
        n = (per_example > 0).sum().clamp_min(1)
        entries = per_example.sum().clamp_min(1)
        c, level = entries / n, weights.sum().abs() / entries
        of_sums = _is_one(level * n) | _is_one(level)
        of_means = _is_one(level * n * c) | _is_one(level * c)
        if self.mean is None:
            return of_sums | (~of_means & (level * n * c.sqrt() > 1))
        return of_sums if self.mean else of_sums | ~of_means

    def example_sum(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values.sum(-1)


def _is_one(value: Tensor) -> Tensor:
    return (value - 1).abs() < 1e-4


def midpoint_and_slope(plus: Tensor, minus: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Mean and central difference of the outputs of an antithetic pair, in float32 at least."""
    dtype = noise_dtype(plus.dtype)  # a difference of half-precision numbers needs more digits than they have
    plus, minus = plus.to(dtype), minus.to(dtype)
    masked = plus.isinf() & (plus == minus)  # classes that are masked out with -inf do not change
    return (plus + minus) / 2, (plus - minus).masked_fill(masked, 0.0) / (2 * step)


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by more than rounding, on the scale of the larger."""
    if a.shape != b.shape:
        return True
    digits = {torch.float64: 1e-9, torch.float32: 1e-5}.get(a.dtype, 1e-2)
    return bool(((a - b).abs() > digits * torch.maximum(a.abs(), b.abs()).amax()).any()) if a.numel() else False


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Translate the two deprecated arguments that every torch loss still accepts."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def reduced(loss: Loss, reduction: str, denominator: Tensor | float) -> Tensor:
    """Reduce the elements of `loss` as torch does, with `denominator` for the mean."""
    if reduction == "none":
        return loss.elements.clone()  # the user may go on in place, and ours must stay what they are
    value = loss.elements.sum()
    if reduction != "sum":
        value, loss.denominator = divided(value, denominator), denominator
    loss.end = value.grad_fn
    return value


def classes_last(values: Tensor, classes: int) -> Tensor:
    """``(N, C, d1, ...)`` or ``(C,)`` to ``(T, C)``."""
    if values.ndim > 2:
        values = values.movedim(1, -1)
    return values.reshape(-1, classes)


def outputs_last(values: Tensor) -> Tensor:
    """``(..., C)`` to ``(T, C)``, ``(N,)`` to ``(N, 1)``."""
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)


def outputs_of_rows(values: Tensor) -> Tensor:
    """``(N, ...)`` to ``(N, C)``: everything in a row is an output of one example."""
    return values.flatten(1) if values.ndim > 1 else values.reshape(-1, 1)


def refuse_trained(name: str, target: Tensor) -> None:
    """Refuse a target that depends on what is trained: its part in the curvature is not known.

    Raises:
        LossNotRecognizedError: If it needs a gradient.
    """
    if target.requires_grad:
        raise LossNotRecognizedError(
            f"The target of {name} needs a gradient, so the loss has curvature in it too, which this package does not "
            "know. Detach the target, or write the loss as a function of one output (lightning_dropreg.recognize)."
        )


def root(name: str, value: Tensor) -> Tensor:
    """Square root of a curvature, with a derivative at 0, where a masked element has its weight.

    Args:
        name: The loss, for the message.
        value: Nonnegative curvatures times weights.

    Returns:
        The root; of 0 the root of the smallest positive number.

    Raises:
        UnsupportedOperationError: If a value is negative (a loss that is subtracted, or not convex).
    """
    if value.device.type == "cpu" and bool((value < 0).any()):  # elsewhere reading a value would stall the device
        raise UnsupportedOperationError(
            f"The curvature of {name} times its weight in the returned loss is negative, and "
            "estimator='double_backward' draws from a distribution with that covariance. Use estimator='antithetic'."
        )
    tiny = torch.finfo(value.dtype).tiny
    return torch.where(value < 0, torch.full_like(value, torch.nan), value.clamp_min(tiny).sqrt())
