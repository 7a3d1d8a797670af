"""Embedding, layers with memory, final dropout: text in, hidden states out."""

import math

import torch
from torch import Tensor, nn

from lightning_dropreg.paper.models.transformer_xl.layer import TransformerXLLayer
from lightning_dropreg.paper.models.transformer_xl.memory import Memory, context_of, remember
from lightning_dropreg.paper.models.transformer_xl.positions import RelativePositions

__all__ = ["TransformerXL"]


class TransformerXL(nn.Module):
    """Transformer with relative attention over the words of a window and a memory of those before it.

    With ``L`` layers there are ``3 L + 3`` places of dropout: the scaled word embedding, the position embedding (shared
    by the batch), three in every layer, the final hidden state; and the attention probabilities, if those are
    dropped too. What is remembered is never dropped from again.

    Args:
        vocab_size: Number of words, at least 1.
        dim: Width of the hidden states, even.
        layers: Number of layers, at least 1.
        heads: Number of heads, at least 1.
        head_dim: Width of each head, at least 1.
        inner_dim: Width of the feed-forward activation, at least 1.
        memory_length: How many earlier words can be attended to, at least 0.
        drop_prob: Drop probability, in ``[0, 1)``.
        attention_drop_prob: Drop probability of attention probabilities, in ``[0, 1)``.

    Example:
        >>> net = TransformerXL(50, dim=8, layers=2, heads=2, head_dim=4, inner_dim=16, memory_length=5)
        >>> hidden, memory = net(torch.randint(50, (3, 7)))
        >>> hidden.shape, memory[0].shape
        (torch.Size([3, 7, 8]), torch.Size([3, 5, 8]))
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        layers: int,
        heads: int,
        head_dim: int,
        inner_dim: int,
        memory_length: int,
        drop_prob: float = 0.1,
        attention_drop_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.memory_length = memory_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.embedding_dropout = nn.Dropout(drop_prob)
        self.positions = RelativePositions(dim, drop_prob)
        # shared by the layers
        self.content_bias = nn.Parameter(torch.empty(heads, 1, head_dim))
        self.position_bias = nn.Parameter(torch.empty(heads, 1, head_dim))
        self.layers = nn.ModuleList(
            TransformerXLLayer(dim, heads, head_dim, inner_dim, drop_prob, attention_drop_prob) for _ in range(layers)
        )
        self.final_dropout = nn.Dropout(drop_prob)
        for name, parameter in self.named_parameters():
            if name.endswith("_norm.weight"):
                nn.init.normal_(parameter, 1.0, 0.02)
            elif name.endswith("bias") and parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, 0.02)

    def forward(self, text: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Compute the hidden state after every word.

        Args:
            text: Word numbers, ``(batch, time)``.
            memory: What the last window left; None at the beginning of a text.

        Returns:
            Hidden states ``(batch, time, dim)``, and the memory for the next window.
        """
        hidden = self.embedding_dropout(self.embedding(text) * math.sqrt(self.embedding.embedding_dim))
        remembered = 0 if memory is None else memory[0].shape[1]
        positions = self.positions(remembered + text.shape[1])
        new_memory: Memory = []
        for index, layer in enumerate(self.layers):
            context = context_of(None if memory is None else memory[index], hidden)
            new_memory.append(remember(context, self.memory_length))
            hidden = layer(hidden, context, positions, self.content_bias, self.position_bias)
        return self.final_dropout(hidden), new_memory
