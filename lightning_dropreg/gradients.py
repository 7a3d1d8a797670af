"""Back-propagating one of several passes at once, so that only one autograd graph is alive at a time.

A pass whose share in the total loss is known can be differentiated as soon as it is made: what is kept of it is its
value and its parameter gradient. `GradientSum` collects these and ends as a scalar with the sum's value and gradient,
which goes on through the user's one backward (hooks, DDP, gradient scaler) as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dropreg.errors import UnsupportedOperationError

__all__ = [
    "GradientSum",
    "Gradients",
    "Scaler",
    "backpropagate",
    "gradients_in",
    "has_reentrant_checkpoint",
    "leaves_of",
]

Scaler = Callable[[Tensor], Tensor]
"""Multiplies a tensor by the scale of a gradient scaler."""


@dataclass
class Gradients:
    """A scalar and its gradient.

    Attributes:
        value: The scalar, without a graph.
        by_leaf: Its gradient in every leaf tensor that it depends on, times `scale`.
        scale: What the gradients are multiplied with (that of a gradient scaler, against underflow), or None.
    """

    value: Tensor
    by_leaf: dict[Tensor, Tensor]
    scale: Tensor | None = None


def leaves_of(*values: Tensor) -> list[Tensor] | None:
    """Return the leaf tensors that `values` depend on.

    Args:
        values: Tensors with an autograd graph.

    Returns:
        The leaves; None if their gradients cannot be taken aside: a hook on a leaf would act twice, and a reentrant
        checkpoint can only be differentiated by a ``backward`` of the whole.

    Example:
        >>> w, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> [leaf is w for leaf in leaves_of((2 * w).sum())]
        [True]
        >>> leaves_of((w * b).sum()) == [w, b]
        True
    """
    leaves: dict[Tensor, None] = {}
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn for value in reversed(values)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if leaf._backward_hooks:
                return None
            if leaf.requires_grad:  # toggle_optimizer may have frozen it since; a backward passes over it too
                leaves[leaf] = None
        elif node.name() in _NOT_ASIDE:
            return None
        stack.extend(next_node for next_node, _ in reversed(node.next_functions))
    return list(leaves)


_NOT_ASIDE = frozenset({"CheckpointFunctionBackward", "_ReentrantBackward"})


def has_reentrant_checkpoint(value: Tensor) -> bool:
    """Whether `value` depends on a reentrant checkpoint: ``autograd.grad`` passes by its parameters without a word."""
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() in _NOT_ASIDE:
            return True
        seen.add(node)
        stack.extend(next_node for next_node, _ in node.next_functions)
    return False


def backpropagate(total: Tensor, leaves: Sequence[Tensor], scaler: Scaler | None = None) -> Gradients:
    """Differentiate a scalar in `leaves` and free its graph.

    Args:
        total: The scalar.
        leaves: See `leaves_of`.
        scaler: Multiplies a loss by the scale of a gradient scaler; None without one.

    Returns:
        Value and gradients.
    """
    found = gradients_in([total if scaler is None else scaler(total)], leaves)
    scale = None if scaler is None else scaler(torch.ones((), device=total.device))
    return Gradients(total.detach(), found, scale)


def gradients_in(
    values: Sequence[Tensor],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    keep_graph: bool = False,
) -> dict[Tensor, Tensor]:
    """Differentiate `values` (times `cotangents`) in those of `leaves` that they depend on.

    Args:
        values: Tensors with a graph.
        leaves: Leaf tensors.
        cotangents: One for each value, of its shape; not needed for scalars.
        keep_graph: Whether the graph is needed once more.

    Returns:
        The gradient in each leaf.

    Raises:
        UnsupportedOperationError: If a part of the graph was freed by an earlier pass.
        RuntimeError: Whatever else the backward raises.
    """
    try:
        gradients = torch.autograd.grad(
            list(values), list(leaves), cotangents, retain_graph=keep_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise UnsupportedOperationError(
            "The passes over a batch share a part of their graph (something computed from parameters before the step, "
            "or kept from an earlier one), which cannot be freed after the first. Compute it inside training_step or "
            "detach it, or use low_memory=False."
        ) from error
    return {leaf: gradient for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


class GradientSum:
    """A weighted sum of scalars of which only values and gradients are left.

    Example:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> collected = GradientSum()
        >>> for loss in (w**2, 5 * w):
        ...     collected.add(backpropagate(loss, [w]), 0.5)
        >>> total = collected.scalar()
        >>> total.backward()
        >>> total.item(), w.grad.item()
        (12.0, 5.5)
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._by_leaf: dict[Tensor, Tensor] = {}
        self._scale: Tensor | None = None

    def add(self, gradients: Gradients, weight: float = 1.0) -> None:
        """Add ``weight`` times a scalar.

        Args:
            gradients: Its value and gradients; all that are added must have the same scale.
            weight: The factor.
        """
        self._value = weight * gradients.value if self._value is None else self._value + weight * gradients.value
        self._scale = gradients.scale
        for leaf, gradient in gradients.by_leaf.items():
            held = self._by_leaf.get(leaf)
            if held is None:
                self._by_leaf[leaf] = gradient * weight  # a tensor of its own, to be added to in place
            elif held.is_sparse or gradient.is_sparse:
                self._by_leaf[leaf] = held + weight * gradient
            else:
                held.add_(gradient, alpha=weight)

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return self._value is not None

    def scalar(self) -> Tensor:
        """Return a scalar with the sum's value, whose backward brings its gradient."""
        attached: Tensor = _Attach.apply(  # type: ignore[no-untyped-call]
            self._value, self._scale, list(self._by_leaf.values()), *self._by_leaf
        )
        return attached


class _Attach(torch.autograd.Function):
    """A constant with a given gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor | None, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad if ctx.scale is None else grad / ctx.scale
        return (None, None, None, *(gradient * factor.to(gradient.dtype) for gradient in ctx.gradients))
