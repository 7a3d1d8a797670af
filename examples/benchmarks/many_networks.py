"""One LightningModule that trains many networks at once, one for every seed.

On a small network most of the time of a step is overhead, so 32 networks take far less than 32 times as long as one.
Every parameter has a leading dimension, one entry for each network, and the networks never meet but in the loss, which
is summed over them: the gradient that a network gets is the one that it would get alone. So is what the callbacks add:
penalty and noise of a sum are the sums of penalties and noises, and every row of every network has noise of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data

__all__ = ["Losses", "ManyNetworks", "start_of"]

Losses = Callable[["ManyNetworks", Tensor, Tensor], Tensor]
"""From networks, inputs ``(S, B, D)`` and targets to one loss for every row, ``(S * B,)``."""


class ManyNetworks(L.LightningModule):
    """Multilayer perceptrons with dropout before every layer, trained side by side.

    Args:
        data: Its test and held-out rows are evaluated after every epoch.
        seeds: One for each network: its initial weights.
        widths: Of the hidden layers.
        drop_probs: Of the input and of each hidden layer; 0 is no dropout there.
        activation: Of the hidden layers.
        optimizer: Makes it from the parameters.
        losses: One loss per row; by default cross entropy, or the squared error.
    """

    def __init__(
        self,
        data: Data,
        seeds: Sequence[int],
        widths: Sequence[int] = (64, 64),
        drop_probs: Sequence[float] = (0.2, 0.5, 0.5),
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        losses: Losses | None = None,
    ) -> None:
        super().__init__()
        self.data, self.drop_probs, self.activation = data, drop_probs, activation
        self.optimizer, self.losses = optimizer, losses or plain
        self.make_parameters(seeds, widths)
        self.history: list[dict[str, Tensor]] = []
        """What was measured after each epoch, one value for each network: `evaluate`, held out and on the test rows;
        where some training labels are wrong, of which share of these, and of the others, the label is predicted."""

    def make_parameters(self, seeds: Sequence[int], widths: Sequence[int]) -> None:
        """Make the parameters of every network, from its own seed."""
        sizes = [self.data.train[0].shape[-1], *widths, self.data.classes or 1]
        shapes = list(itertools.pairwise(sizes))
        start = [
            [torch.randn(shape, generator=g) / math.sqrt(shape[0]) for shape in shapes] for g in map(start_of, seeds)
        ]
        self.weights = nn.ParameterList(torch.stack(layer) for layer in zip(*start, strict=True))
        self.biases = nn.ParameterList(torch.zeros(len(seeds), 1, size) for size in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        for layer, (weight, bias, q) in enumerate(zip(self.weights, self.biases, self.drop_probs, strict=True)):
            x = self.activation(x) if layer else x
            x = torch.baddbmm(bias, F.dropout(x, q, self.training) if q else x, weight)
        return x

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        losses = self.losses(self, x, y)
        return len(x) * losses.sum() / losses.numel()  # the mean for each network, summed over networks

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.history.append(
            {
                f"{part}_{name}": value
                for part, rows in (("held_out", self.data.held_out), ("test", self.data.test))
                for name, value in self.evaluate(*rows).items()
            }
            | self.fitted()
        )

    def fitted(self) -> dict[str, Tensor]:
        """Return for each network how many wrong and how many right training labels it predicts, as shares ``(S,)``."""
        if self.data.wrong is None:
            return {}
        x, y = self.data.train
        hit = self(x).argmax(-1) == y
        rows = {"fitted_wrong": self.data.wrong, "fitted_right": ~self.data.wrong}
        return {name: (hit & chosen).sum(1) / chosen.sum(1) for name, chosen in rows.items()}

    def evaluate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return each network's mean loss, and its accuracy in classification, both ``(S,)``."""
        z = self(x)
        if self.data.classes is None:
            return {"loss": (z - y).square().mean((1, 2))}
        nll = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").unflatten(0, y.shape).mean(1)
        return {"loss": nll, "accuracy": (z.argmax(-1) == y).float().mean(1)}

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def plain(networks: ManyNetworks, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy, or for regression the squared error, of every row."""
    z = networks(x).flatten(0, -2)
    if networks.data.classes is None:
        return F.mse_loss(z, y.flatten(0, 1), reduction="none").flatten()
    return F.cross_entropy(z, y.flatten(), reduction="none")


def start_of(seed: int) -> torch.Generator:
    """Return what draws the initial weights of a seed."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1))  # another stream than the split's
