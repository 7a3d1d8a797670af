"""Autograd graphs, looked through."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

__all__ = ["nodes_behind"]


def nodes_behind(*values: Tensor, ends: Collection[Any] = ()) -> Iterator[Any]:
    """Go through the autograd graph that tensors were made by.

    Args:
        values: The tensors.
        ends: Nodes behind which nothing is looked for.

    Yields:
        Its nodes, each once; inputs of an operation in their order.

    Example:
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> [node.name() for node in nodes_behind((2 * w).sum())]
        ['SumBackward0', 'MulBackward0', 'torch::autograd::AccumulateGrad']
    """
    seen: set[Any] = set()
    stack = [value.grad_fn for value in reversed(values)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in ends:
            stack.extend(following for following, _ in reversed(node.next_functions))
