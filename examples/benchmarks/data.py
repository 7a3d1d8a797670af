"""The data of the evidence: for every seed a split of its own into training, held-out and test rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batches", "Data", "diabetes", "digits", "friedman"]


@dataclass
class Data:
    """Rows for S networks: inputs ``(S, N, D)``, targets ``(S, N)`` (classes) or ``(S, N, 1)`` (numbers)."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int | None
    """Number of classes; None for regression."""
    wrong: Tensor | None = None
    """Which training labels are wrong, ``(S, N)``; None where none is."""


class Batches:
    """Training batches for S networks at once, `steps` of them in an epoch; every network has an order of its own.

    Args:
        data: The rows.
        size: Rows of a batch; all rows, in their order, if there are no more.
        steps: Batches until the next evaluation.
        seeds: One for each network: the order of its rows.
    """

    def __init__(self, data: Data, size: int, steps: int, seeds: Sequence[int]) -> None:
        self.x, self.y = data.train
        self.size, self.steps = min(size, self.x.shape[1]), steps
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.order = torch.empty(len(seeds), 0, dtype=torch.long)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.x.shape[1]
        network = torch.arange(len(self.x))[:, None]
        for _ in range(self.steps):
            if self.size == rows:
                yield self.x, self.y
                continue
            if (
                self.order.shape[1] < self.size
            ):  # the next pass over the rows, what is left over of the last one dropped
                self.order = torch.stack([torch.randperm(rows, generator=g) for g in self.generators])
            chosen, self.order = self.order[:, : self.size], self.order[:, self.size :]
            yield self.x[network, chosen], self.y[network, chosen]


def digits(seeds: Sequence[int], label_noise: float, rows: int = 200, held_out: int = 400) -> Data:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels: few training rows, some with a random label.

    Args:
        seeds: One for each split; the first thing that is drawn from each, so that a seed means one split everywhere.
        label_noise: Probability with which a *training* label is replaced by a uniform digit (by itself, too);
            held-out and test labels stay clean.
        rows: Training rows.
        held_out: Held-out rows; all others are test rows.

    Returns:
        The rows.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    parts: list[list[tuple[Tensor, Tensor]]] = []
    changed: list[Tensor] = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=g)
        train, held, test = order.split([rows, held_out, len(x) - rows - held_out])
        wrong = torch.rand(rows, generator=g) < label_noise
        labels = torch.where(wrong, torch.randint(10, (rows,), generator=g), y[train])
        parts.append([(x[train], labels), (x[held], y[held]), (x[test], y[test])])
        changed.append(labels != y[train])
    return Data(*_stacked(parts), classes=10, wrong=torch.stack(changed) if label_noise else None)


def friedman(seeds: Sequence[int], rows: int = 200) -> Data:
    """Friedman's first problem: ten inputs, five of which count; training and held-out rows with noise of variance 1.

    Args:
        seeds: One for each draw.
        rows: Training rows, and as many held-out rows; 1,000 test rows without noise.

    Returns:
        The rows, all targets divided by the training targets' standard deviation after their mean is taken off: squared
        errors are fractions of the training variance.
    """
    parts = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        x = torch.rand(2 * rows + 1000, 10, generator=g)
        y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        y[: 2 * rows] += torch.randn(2 * rows, generator=g)
        parts.append(_scaled(2 * x - 1, y, [rows, rows, 1000]))
    return Data(*_stacked(parts), classes=None)


def diabetes(seeds: Sequence[int], rows: int = 242, held_out: int = 100) -> Data:
    """Scikit-learn's 442 diabetes patients.

    Args:
        seeds: One for each split.
        rows: Training rows.
        held_out: Held-out rows; the others are test rows.

    Returns:
        The rows, targets scaled as in `friedman`.
    """
    from sklearn.datasets import load_diabetes

    found = load_diabetes()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target, dtype=torch.float32)
    x = x / x.std(0)
    parts = []
    for seed in seeds:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts.append(_scaled(x[order], y[order], [rows, held_out, len(x) - rows - held_out]))
    return Data(*_stacked(parts), classes=None)


def _scaled(x: Tensor, y: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    y = ((y - y[: sizes[0]].mean()) / y[: sizes[0]].std())[:, None]
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def _stacked(parts: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])) for part in zip(*parts, strict=True)]
