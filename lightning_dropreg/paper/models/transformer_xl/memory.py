"""The hidden states of earlier windows that the words of a window can attend to."""

import torch
from torch import Tensor

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["Memory", "context_of", "remember"]

Memory = list[Tensor]
"""The input of each layer for earlier words, each of shape ``(batch, words, dim)``; the latest last."""


def context_of(memory: Tensor | None, hidden: Tensor) -> Tensor:
    """Put the memory of one layer before the states of the words.

    Args:
        memory: ``(batch, words, dim)``; None for none yet.
        hidden: ``(batch, time, dim)``.

    Returns:
        ``(batch, words + time, dim)``.

    Raises:
        InvalidArgumentError: If they have not the same number of rows.
    """
    if memory is None:
        return hidden
    if memory.shape[0] != hidden.shape[0]:
        raise InvalidArgumentError(
            f"The memory is of {memory.shape[0]} rows of text, but the batch has {hidden.shape[0]}. All batches of an "
            "epoch must have as many rows (drop the last, smaller batch)."
        )
    return torch.cat([memory, hidden], 1)


def remember(context: Tensor, length: int) -> Tensor:
    """Keep the last states, without the graph behind them.

    Args:
        context: ``(batch, words, dim)``.
        length: How many, at least 0.

    Returns:
        ``(batch, min(words, length), dim)``.

    Example:
        >>> remember(torch.arange(5.0).view(1, 5, 1), 2).flatten()
        tensor([3., 4.])
        >>> remember(torch.arange(5.0).view(1, 5, 1), 0).shape
        torch.Size([1, 0, 1])
    """
    return context[:, max(0, context.shape[1] - length) :].detach()
