"""Transformers for many seeds at once, side by side: small causal language models on windows of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .many_networks import start_of
from .text import ManyLanguageModels

__all__ = ["ManyTransformers"]

BLOCKS, HEADS, WIDER = 2, 4, 2
"""Of each network: its blocks, the heads of each, how much wider its feed-forward layer is."""


class ManyTransformers(ManyLanguageModels):
    """Language models with pre-norm blocks, tied embedding and learned positions.

    Dropout is where Vaswani et al. (2017) have it: on the sum of embedding and position, and on what each sublayer
    adds. `widths` is the size of the embedding; of `drop_probs` the second is for the sum, the third for the sublayers.
    Otherwise as `ManyNetworks`.
    """

    def make_parameters(self, seeds: Sequence[int], widths: Sequence[int]) -> None:
        """See `ManyNetworks`."""
        size, words, length = widths[0], self.data.classes or 0, self.data.train[0].shape[-1]
        block = [(size, 3 * size), (size, size), (size, WIDER * size), (WIDER * size, size)]
        shapes = [(words, size), (length, size), *BLOCKS * block]
        start = [
            [
                torch.randn(shape, generator=g) / math.sqrt(size if at < 2 else shape[0])
                for at, shape in enumerate(shapes)
            ]
            for g in map(start_of, seeds)
        ]
        embedding, positions, *matrices = (nn.Parameter(torch.stack(each)) for each in zip(*start, strict=True))
        self.embedding, self.positions, self.matrices = embedding, positions, nn.ParameterList(matrices)
        self.biases = nn.ParameterList(torch.zeros(len(seeds), 1, m.shape[-1]) for m in matrices)
        self.gains = nn.ParameterList(torch.ones(len(seeds), 1, size) for _ in range(2 * BLOCKS + 1))
        self.shifts = nn.ParameterList(torch.zeros(len(seeds), 1, size) for _ in range(2 * BLOCKS + 1))
        self.of_words = nn.Parameter(torch.zeros(len(seeds), 1, words))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedded(x) * math.sqrt(self.embedding.shape[-1]) + self.positions[:, None]
        h = self._drop(h, self.drop_probs[1])  # (networks, rows, time, size)
        for block in range(BLOCKS):
            h = h + self._drop(self._attend(self._norm(h, 2 * block), block), self.drop_probs[2])
            h = h + self._drop(self._feed(self._norm(h, 2 * block + 1), block), self.drop_probs[2])
        h = self._norm(h, 2 * BLOCKS)
        return torch.baddbmm(self.of_words, h.flatten(1, 2), self.embedding.mT).unflatten(1, h.shape[1:3])

    def _attend(self, h: Tensor, block: int) -> Tensor:
        parts = self._linear(h, 4 * block).unflatten(-1, (3 * HEADS, -1)).transpose(2, 3)
        query, key, value = parts.chunk(3, 2)  # each (networks, rows, heads, time, size / heads)
        seen = torch.ones(h.shape[2], h.shape[2], dtype=torch.bool).tril()
        scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~seen, -math.inf)
        mixed = scores.softmax(-1) @ value
        return self._linear(mixed.transpose(2, 3).flatten(-2), 4 * block + 1)

    def _feed(self, h: Tensor, block: int) -> Tensor:
        return self._linear(F.gelu(self._linear(h, 4 * block + 2)), 4 * block + 3)

    def _linear(self, h: Tensor, which: int) -> Tensor:
        found = torch.baddbmm(self.biases[which], h.flatten(1, 2), self.matrices[which])
        return found.unflatten(1, h.shape[1:3])

    def _norm(self, h: Tensor, which: int) -> Tensor:
        gain, shift = (each[which][:, None] for each in (self.gains, self.shifts))
        return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), gain)

    def _drop(self, h: Tensor, q: float) -> Tensor:
        return F.dropout(h, q, self.training) if q else h
