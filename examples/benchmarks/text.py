"""Language models for many seeds at once: windows of text, and LSTMs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dropreg.interception.handlers.custom import drop
from lightning_dropreg.paper.data import PennTreebank, PythonManual, TextFolder
from lightning_dropreg.paper.data.encoding import TextEncoder

from .data import Data
from .many_networks import ManyNetworks, start_of

__all__ = ["ManyLSTMs", "ManyLanguageModels", "ptb", "python_manual"]

VOCABULARY = 400
WINDOW = 12
ROOT: Path | None = None
"""Where the corpus lies: ``python -m examples.benchmarks.run text --root``."""


def ptb(seeds: Sequence[int], corpus: type[TextFolder] = PennTreebank, rows: int = 160, length: int = WINDOW) -> Data:
    """Windows of the training text of Penn Treebank, or of another corpus; every seed draws its own."""
    if ROOT is None:
        raise SystemExit(f"{corpus.__name__} is not part of this repository: --root FOLDER says where it lies.")
    return windows(TextEncoder(corpus(ROOT), VOCABULARY), seeds, rows, length=length)


def python_manual(seeds: Sequence[int]) -> Data:
    """Windows of the embedded corpus."""
    return windows(TextEncoder(PythonManual(), VOCABULARY), seeds)


def windows(
    encoder: TextEncoder,
    seeds: Sequence[int],
    rows: int = 160,
    held_out: int = 250,
    test: int = 500,
    length: int = WINDOW,
) -> Data:
    """Cut a training text into windows and draw from them, for every seed anew.

    Args:
        encoder: Of the text.
        seeds: One for each draw.
        rows: Training windows.
        held_out: Held-out windows.
        test: Test windows.
        length: Tokens of a window.

    Returns:
        For each window the tokens, and the next token of each.
    """
    stream = encoder.encode("train").long()
    starts = torch.arange(0, len(stream) - length, length)
    parts = []
    for seed in seeds:
        order = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))]
        cut = order[: rows + held_out + test, None] + torch.arange(length + 1)
        parts.append(stream[cut].split([rows, held_out, test]))
    train, held, tested = ((found[..., :-1], found[..., 1:]) for found in map(torch.stack, zip(*parts, strict=True)))
    return Data(train, held, tested, classes=len(encoder))


class ManyLanguageModels(ManyNetworks):
    """What those that predict the next token have in common: `embedding`, ``(networks, words, size)``, and the loss."""

    embedding: nn.Parameter

    def embedded(self, x: Tensor) -> Tensor:
        """Return the embeddings of tokens, each network's from its own table."""
        words = torch.arange(len(x))[:, None, None] * self.embedding.shape[1]
        return F.embedding(x + words, self.embedding.flatten(0, 1))

    def evaluate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return each network's mean loss per token, ``(S,)``."""
        losses = F.cross_entropy(self(x).flatten(0, -2), y.flatten(), reduction="none")
        return {"loss": losses.unflatten(0, y.shape).mean((1, 2))}


class ManyLSTMs(ManyLanguageModels):
    """Language models with one LSTM layer, tied embedding, and locked dropout before and after the LSTM.

    A window starts from nothing: no state is carried from one to the next. `widths` is the size of embedding and state;
    of `drop_probs` the second and the third count. Otherwise as `ManyNetworks`.
    """

    def make_parameters(self, seeds: Sequence[int], widths: Sequence[int]) -> None:
        """See `ManyNetworks`."""
        size, words = widths[0], self.data.classes or 0
        shapes = [(words, size), (size, 4 * size), (size, 4 * size)]
        start = [[torch.randn(shape, generator=g) / math.sqrt(size) for shape in shapes] for g in map(start_of, seeds)]
        self.embedding, self.into, self.around = (
            nn.Parameter(torch.stack(matrices)) for matrices in zip(*start, strict=True)
        )
        bias = torch.zeros(len(seeds), 1, 4 * size)
        bias[..., :size] = 1  # the forget gate
        self.bias, self.of_words = nn.Parameter(bias), nn.Parameter(torch.zeros(len(seeds), 1, words))

    def forward(self, x: Tensor) -> Tensor:
        networks, rows, time = x.shape
        h = self._drop(self.embedded(x), self.drop_probs[1])
        gates = torch.baddbmm(self.bias, h.flatten(1, 2), self.into).unflatten(1, (rows, time)).unbind(2)
        state = cell = h.new_zeros(networks, rows, h.shape[-1])
        states = []
        for at_step in gates:
            forget, enter, leave, new = torch.baddbmm(at_step, state, self.around).chunk(4, -1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = leave.sigmoid() * cell.tanh()
            states.append(state)
        h = self._drop(torch.stack(states, 2), self.drop_probs[2])
        return torch.baddbmm(self.of_words, h.flatten(1, 2), self.embedding.mT).unflatten(1, (rows, time))

    def _drop(self, h: Tensor, q: float) -> Tensor:
        return drop(h, q, (*h.shape[:2], 1, h.shape[3]), self.training, kind="locked") if q else h
