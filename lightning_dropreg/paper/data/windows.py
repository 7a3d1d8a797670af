"""Cuts a stream of tokens into the consecutive windows of truncated back-propagation through time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.numerics.noise import fold_key

__all__ = ["InOrder", "StreamWindows", "WindowLoader", "jittered_ends"]

Span = tuple[int, int]


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
        jitter: Seed of random lengths, others in every epoch (see `jittered_ends`; `window` must be at least 10);
            None for equal ones.

    Raises:
        InvalidArgumentError: If the stream is too short to give every row a word and its successor, or the window too
            short for jitter.

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

    def __init__(
        self,
        stream: Tensor,
        batch_size: int,
        window: int,
        shard: tuple[int, int] = (0, 1),
        jitter: int | None = None,
    ) -> None:
        index, shards = shard
        length = len(stream) // (batch_size * shards)
        if length < 2:
            raise InvalidArgumentError(
                f"{len(stream)} tokens cannot fill {batch_size * shards} rows with at least 2 tokens each; "
                "use a smaller batch_size or more text."
            )
        if jitter is not None and window < 10:
            raise InvalidArgumentError(f"window={window} is too short for jitter: it must be at least 10.")
        start = index * batch_size * length
        self._rows = stream[start : start + batch_size * length].view(batch_size, length)
        self._window = window
        self._jitter = jitter
        self._first = self.spans(0)

    def spans(self, epoch: int) -> list[Span]:
        """Return where the windows of an epoch start and stop; there are equally many in all epochs.

        Args:
            epoch: Number of the epoch, from 0.

        Returns:
            One pair for each window.
        """
        length = self._rows.shape[1] - 1
        if self._jitter is None:
            ends = [*range(self._window, length, self._window), length]
        else:
            ends = jittered_ends(length, self._window, fold_key(self._jitter, epoch))
        return list(zip([0, *ends], ends, strict=False))

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._first)

    def __getitem__(self, index: int | Span) -> tuple[Tensor, Tensor]:
        """Return one window of every row.

        Args:
            index: Number of the window in epoch 0, from 0; or where the window starts and stops.

        Returns:
            The words and the words that follow them, each of shape ``(batch, time)``.

        Raises:
            IndexError: If there is no such window.
        """
        if isinstance(index, int) and not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._first[index] if isinstance(index, int) else index
        # streams are int32 to save memory; an embedding and a loss take int64
        return self._rows[:, start:stop].long(), self._rows[:, start + 1 : stop + 1].long()


def jittered_ends(length: int, window: int, key: int) -> list[int]:
    """Draw where windows of random length end, so that an epoch does not cut a text where the last one did.

    A window is ``normal(window, 5)`` long, every twentieth ``normal(window / 2, 5)``, none shorter than 5 (Merity et
    al., 2018). So that all epochs have equally many steps and none leaves out the end of the text, the lengths are
    scaled, by less than a percent where there are hundreds, to fill it.

    Args:
        length: What the windows have to fill, at least 1.
        window: The usual length, at least 10.
        key: Seed.

    Returns:
        The ends, the last of them `length`.

    Example:
        >>> jittered_ends(300, 70, key=1)[-1]
        300
    """
    generator = torch.Generator().manual_seed(key)
    count = max(1, round(length / (0.975 * window)))
    usual = torch.where(torch.rand(count, generator=generator) < 0.95, float(window), window / 2)
    lengths = torch.normal(usual, 5.0, generator=generator).clamp(min=5).double()
    ends: list[int] = (lengths.cumsum(0) * (length / lengths.sum())).round().long().tolist()
    return ends


class InOrder(DistributedSampler[Any]):
    """The windows of the current epoch, in order.

    Rows are shared out among processes before. Without a DistributedSampler, Lightning would deal consecutive windows
    out to different processes and break the carried state. Lightning tells it the epoch (`set_epoch`).

    Args:
        windows: The windows.
    """

    def __init__(self, windows: StreamWindows) -> None:
        super().__init__(windows, num_replicas=1, rank=0, shuffle=False)
        self._windows = windows
        self.resume_at: tuple[int, int] | None = None
        """Epoch and number of the window to go on from, once."""

    def start(self) -> int:
        """Return the number of the first window to serve."""
        return self.resume_at[1] if self.resume_at is not None and self.resume_at[0] == self.epoch else 0

    def __iter__(self) -> Iterator[Span]:
        """Yield where the windows start and stop."""
        start, self.resume_at = self.start(), None
        return iter(self._windows.spans(self.epoch)[start:])

    def __len__(self) -> int:
        """Return the number of windows of a whole epoch."""
        return len(self._windows)


class WindowLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader that goes on, in a resumed run, where the checkpoint was made.

    Lightning puts `state_dict` into checkpoints.
    """

    _served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the windows of the sampler's epoch."""
        self._served = self.sampler.start() if isinstance(self.sampler, InOrder) else 0
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its windows were served."""
        return {"epoch": self.sampler.epoch if isinstance(self.sampler, InOrder) else 0, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where `state` was taken, if it is over the same epoch.

        Args:
            state: What `state_dict` returned.
        """
        if isinstance(self.sampler, InOrder):  # Lightning's own options may have put another in its place
            self.sampler.resume_at = (state["epoch"], state["served"])
