"""Cuts a stream of tokens into the consecutive windows of truncated back-propagation through time."""

import math

from torch import Tensor
from torch.utils.data import Dataset

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["StreamWindows"]


class StreamWindows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows over parallel rows of one stream, as torchtext's ``BPTTIterator`` cuts them.

    The stream is laid out in rows of equal length; item ``i`` is the ``i``-th window of all rows, so a hidden
    state carried from item to item continues every row where it stopped. Unlike ``BPTTIterator`` this is a
    map-style data set, so any number of worker processes yields the same windows in the same order, and the
    tokens that do not fill the rows are left out instead of padded.

    Args:
        stream: Token numbers, of shape ``(tokens,)``.
        batch_size: Rows of each window, at least 1.
        window: Length of each window (the last may be shorter), at least 1.
        shard: Which shard of the rows to serve, and how many shards there are. Each has ``batch_size`` rows.

    Raises:
        InvalidArgumentError: If the stream is too short to give every row a word and its successor.

    Example:
        >>> import torch
        >>> text, target = StreamWindows(torch.arange(10), batch_size=2, window=3)[0]
        >>> text
        tensor([[0, 1, 2],
                [5, 6, 7]])
        >>> target
        tensor([[1, 2, 3],
                [6, 7, 8]])
    """

    def __init__(self, stream: Tensor, batch_size: int, window: int, shard: tuple[int, int] = (0, 1)) -> None:
        index, shards = shard
        length = len(stream) // (batch_size * shards)
        if length < 2:
            raise InvalidArgumentError(
                f"{len(stream)} tokens cannot fill {batch_size * shards} rows with at least 2 tokens each; "
                "use a smaller batch_size or more text."
            )
        start = index * batch_size * length
        self._rows = stream[start : start + batch_size * length].view(batch_size, length)
        self._window = window

    def __len__(self) -> int:
        """Return the number of windows."""
        return math.ceil((self._rows.shape[1] - 1) / self._window)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one window of every row.

        Args:
            index: Number of the window, from 0.

        Returns:
            The words and the words that follow them, each of shape ``(batch, time)``.

        Raises:
            IndexError: If there is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._window
        stop = min(start + self._window, self._rows.shape[1] - 1)
        # streams are int32 to save memory; an embedding and a loss take int64
        return self._rows[:, start:stop].long(), self._rows[:, start + 1 : stop + 1].long()
