"""Attention whose scores depend on what a word is and on how far back it lies."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RelativeAttention", "relative_shift"]


class RelativeAttention(nn.Module):
    r"""Multi-head attention with relative positions, section 3.3 of Dai et al.

    The score of query ``i`` for key ``j``, which lies ``i - j >= 0`` words back, is
    ``((q_i + u) . k_j + (q_i + v) . W_r r_{i-j}) / sqrt(head_dim)``.

    Args:
        dim: Width of the hidden states, at least 1.
        heads: Number of heads, at least 1.
        head_dim: Width of each head, at least 1.
        drop_prob: Probability, in ``[0, 1)``, with which an attention probability is dropped.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, drop_prob: float) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.position = nn.Linear(dim, heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, dim, bias=False)
        self.dropout = nn.Dropout(drop_prob)

    def forward(
        self, hidden: Tensor, context: Tensor, positions: Tensor, content_bias: Tensor, position_bias: Tensor
    ) -> Tensor:
        """Attend from every word to itself and to what came before it.

        Args:
            hidden: States of the words, ``(batch, time, dim)``.
            context: States of the memory and the words, ``(batch, length, dim)``, ``length >= time``.
            positions: Embedded distances ``length - 1, ..., 0``, of shape ``(1, length, dim)``.
            content_bias: ``u``, of shape ``(heads, 1, head_dim)``.
            position_bias: ``v``, of the same shape.

        Returns:
            Tensor ``(batch, time, dim)``.
        """
        query = self._by_head(self.query(hidden))
        key, value = (self._by_head(part) for part in self.key_value(context).chunk(2, -1))
        distance = self._by_head(self.position(positions))
        by_content = (query + content_bias) @ key.transpose(-2, -1)
        by_position = relative_shift((query + position_bias) @ distance.transpose(-2, -1))
        scores = (by_content + by_position) / math.sqrt(self.head_dim)
        time, length = scores.shape[-2:]
        ahead = torch.ones(time, length, dtype=torch.bool, device=scores.device).triu(1 + length - time)
        weights = self.dropout(F.softmax(scores.masked_fill(ahead, -math.inf), -1))
        attended: Tensor = self.output((weights @ value).transpose(1, 2).flatten(2))
        return attended

    def _by_head(self, values: Tensor) -> Tensor:
        """``(batch, time, heads * head_dim)`` to ``(batch, heads, time, head_dim)``."""
        return values.reshape(*values.shape[:-1], self.heads, self.head_dim).transpose(1, 2)


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by distance into scores by key.

    Column ``c`` of the input is for the distance ``length - 1 - c``. For the last of ``time`` queries that is the key
    in column ``c`` too; every query before it must be shifted by one more. Padding each row with one entry and reading
    the same memory in rows that are one shorter does just that.

    Args:
        scores: Shape ``(..., time, length)``.

    Returns:
        Same shape; entries for keys that lie ahead are without meaning.

    Example:
        >>> relative_shift(torch.tensor([[2, 1, 0], [2, 1, 0]])).tril(1)  # 2 queries, 3 keys: distances
        tensor([[1, 0, 0],
                [2, 1, 0]])
    """
    *lead, time, length = scores.shape
    padded = F.pad(scores, (1, 0)).reshape(*lead, length + 1, time)
    return padded[..., 1:, :].reshape(*lead, time, length)
