"""Sinusoidal embeddings of how far back a word lies."""

import torch
from torch import Tensor, nn

from lightning_dropreg.interception.handlers.custom import drop

__all__ = ["RelativePositions"]


class RelativePositions(nn.Module):
    """Embeds the distances ``length - 1, ..., 1, 0``, with dropout shared by all rows of a batch.

    Args:
        dim: Width of the embeddings, even.
        drop_prob: Probability, in ``[0, 1)``, with which an entry is dropped.

    Example:
        >>> RelativePositions(dim=6, drop_prob=0.0)(length=4).shape
        torch.Size([1, 4, 6])
    """

    def __init__(self, dim: int, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.frequencies: Tensor
        self.register_buffer("frequencies", 10_000.0 ** -(torch.arange(0, dim, 2) / dim), persistent=False)

    def forward(self, length: int) -> Tensor:
        """Embed the distances.

        Args:
            length: Number of words that can be attended to.

        Returns:
            Sines, then cosines, of shape ``(1, length, dim)``; the farthest first.
        """
        distances = torch.arange(length - 1, -1, -1, device=self.frequencies.device, dtype=self.frequencies.dtype)
        angles = torch.outer(distances, self.frequencies)
        embedded = torch.cat([angles.sin(), angles.cos()], -1).unsqueeze(0)
        # one mask for the whole batch, as there is one embedding for it
        return drop(embedded, self.drop_prob, tuple(embedded.shape), self.training, kind="position")
