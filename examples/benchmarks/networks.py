"""A ReLU network and a small convolutional one, and digits for them: what most models look like.

dropreg bench --config configs/bench/mlp.yaml      (conv.yaml)
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["ConvNet", "Digits", "ReLUNet"]


class Classifier(L.LightningModule):
    """Trains ``self.net`` with the cross entropy."""

    net: nn.Module

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class ReLUNet(Classifier):
    """Three layers with ReLU; dropout on the hidden ones."""

    def __init__(self, width: int = 1024, drop_prob: float = 0.5, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate)
        self.net = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64, width), nn.ReLU(), nn.Dropout(drop_prob)),
            *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(drop_prob)),
            nn.Linear(width, 10),
        )


class ConvNet(Classifier):
    """Two convolutions with pooling, and a hidden layer."""

    def __init__(self, channels: int = 32, drop_prob: float = 0.5, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Dropout2d(drop_prob / 4)),
            *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(drop_prob / 2), nn.Linear(32 * channels, 128), nn.ReLU()),
            *(nn.Dropout(drop_prob), nn.Linear(128, 10)),
        )


class Digits(L.LightningDataModule):
    """Scikit-learn's 1,797 digits of 8 x 8 pixels.

    Args:
        batch_size: Rows of a training batch.
        rows: Training rows; the others are for validation.
        label_noise: Share of the training labels that are replaced by a random digit.
        seed: Of split, noise and order.
    """

    def __init__(self, batch_size: int = 128, rows: int = 1000, label_noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=generator)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
        y = torch.tensor(labels)[order]
        noisy = torch.rand(rows, generator=generator) < label_noise
        own = torch.where(noisy, torch.randint(10, (rows,), generator=generator), y[:rows])
        self.batch_size, self.generator = batch_size, generator
        self.train, self.held_out = TensorDataset(x[:rows], own), TensorDataset(x[rows:], y[rows:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, generator=self.generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, len(self.held_out))
