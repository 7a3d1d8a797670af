"""Back-propagating one of several passes at once, so that only one autograd graph is alive at a time.

A pass whose share in the total loss is known can be differentiated as soon as it is made. `GradientSum` takes its value
and its gradient, parameter by parameter as they become ready, so that besides the sum there is never a second gradient
of all parameters. It ends as a scalar with the sum's value and gradient, which goes on through the user's one backward
(hooks, DDP, gradient scaler) as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.numerics.graph import nodes_behind
from lightning_dropreg.numerics.torch_private import has_gradient_hooks

__all__ = [
    "GradientSum",
    "Scaler",
    "backpropagate",
    "collect_gradients",
    "gradients_aside",
    "has_reentrant_checkpoint",
    "leaves_below",
    "leaves_of",
]

Scaler = Callable[[Tensor], Tensor]
"""Multiplies a tensor by the scale of a gradient scaler."""


def leaves_of(*values: Tensor) -> list[Tensor] | None:
    """Return the leaf tensors that `values` depend on.

    Returns:
        The leaves; None if their gradients cannot be taken alone: a hook on a leaf would act twice, and a reentrant
        checkpoint can only be differentiated by a ``backward`` of the whole.

    Example:
        >>> w, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> [leaf is w for leaf in leaves_of((2 * w).sum())]
        [True]
        >>> leaves_of((w * b).sum()) == [w, b]
        True
    """
    leaves: dict[Tensor, None] = {}
    for node in nodes_behind(*values):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if has_gradient_hooks(leaf):
                return None
            if leaf.requires_grad:  # toggle_optimizer may have frozen it since; a backward passes over it too
                leaves[leaf] = None
        elif node.name() in _IN_ONE_BACKWARD:
            return None
    return list(leaves)


def leaves_below(*values: Tensor) -> list[Tensor]:
    """Return all leaf tensors that `values` depend on, whatever stands on the way to them.

    Returns:
        The leaves.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> leaves_below((2 * w).sum())[0] is w
        True
    """
    return list(dict.fromkeys(node.variable for node in nodes_behind(*values) if hasattr(node, "variable")))


_SMALL = 1 << 18
"""So many numbers of gradients may be there a second time."""

_IN_ONE_BACKWARD = frozenset({"CheckpointFunctionBackward", "_ReentrantBackward"})


def has_reentrant_checkpoint(value: Tensor) -> bool:
    """Whether `value` depends on a reentrant checkpoint: ``autograd.grad`` passes by its parameters without a word."""
    return any(node.name() in _IN_ONE_BACKWARD for node in nodes_behind(value))


@contextmanager
def gradients_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Let a backward begin without any gradients, and put those back that were there."""
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


class GradientSum:
    """A weighted sum of scalars of which only values and gradients are left.

    Example:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> collected = GradientSum()
        >>> for loss in (w**2, 5 * w):
        ...     backpropagate(loss, [w], [(collected, 0.5)])
        >>> total = collected.scalar()
        >>> total.backward()
        >>> total.item(), w.grad.item()
        (12.0, 5.5)
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._by_leaf: dict[Tensor, Tensor] = {}
        self._scale: Tensor | None = None

    def add_value(self, value: Tensor, weight: float = 1.0, scale: Tensor | None = None) -> None:
        """Add ``weight`` times a value without a graph; `scale`: what all gradients are multiplied with."""
        self._value = weight * value if self._value is None else self._value + weight * value
        self._scale = scale

    def add_gradient(self, leaf: Tensor, gradient: Tensor, weight: float = 1.0) -> None:
        """Add ``weight`` times the gradient in one leaf."""
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


def backpropagate(
    total: Tensor, leaves: Sequence[Tensor], into: Sequence[tuple[GradientSum, float]], scaler: Scaler | None = None
) -> None:
    """Differentiate a scalar in `leaves`, each sum that it goes into with its factor there, and free its graph."""
    collect_gradients(total if scaler is None else scaler(total), leaves, into)
    scale = None if scaler is None else scaler(torch.ones((), device=total.device))
    for collected, weight in into:
        collected.add_value(total.detach(), weight, scale)


def collect_gradients(
    value: Tensor,
    leaves: Sequence[Tensor],
    into: Sequence[tuple[GradientSum, float]],
    keep_graph: bool = False,
    also: Sequence[Tensor] = (),
) -> None:
    """Differentiate a scalar in those of `leaves` that it depends on, adding up each gradient when it is ready.

    Args:
        value: A scalar with a graph.
        leaves: Leaf tensors.
        into: The sums that the gradients go into, each with its factor there.
        keep_graph: Whether the graph is needed once more.
        also: More leaves to differentiate in, whose gradients go nowhere.

    Raises:
        UnsupportedOperationError: If a part of the graph was freed by an earlier pass.
        RuntimeError: Whatever else the backward raises.
    """
    if sum(leaf.numel() for leaf in leaves) <= _SMALL:  # hooks would take longer than what they save is worth
        gradients = _gradients(value, leaves, also, keep_graph)
        for leaf, gradient in zip(leaves, gradients, strict=False):
            if gradient is not None:
                for collected, weight in into:
                    collected.add_gradient(leaf, gradient, weight)
        return

    def adding_up(leaf: Tensor) -> Callable[[Tensor], Tensor | None]:
        def add(gradient: Tensor) -> Tensor | None:
            for collected, weight in into:
                collected.add_gradient(leaf, gradient, weight)
            # autograd keeps what a hook returns; a number in the shape of the gradient takes no memory
            return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

        return add

    hooks = [leaf.register_hook(adding_up(leaf)) for leaf in leaves]
    try:
        _gradients(value, leaves, also, keep_graph)
    finally:
        for hook in hooks:
            hook.remove()


def _gradients(
    value: Tensor, leaves: Sequence[Tensor], also: Sequence[Tensor], keep_graph: bool
) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(value, [*leaves, *also], retain_graph=keep_graph, allow_unused=True)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise UnsupportedOperationError(
            "The passes over a batch share a part of their graph (something computed from parameters before the step, "
            "or kept from an earlier one), which cannot be freed after the first. Compute it inside training_step or "
            "detach it, or use low_memory=False."
        ) from error


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
