"""Your own LightningCLI, with the regularizers in the YAML file.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml [--trainer.fast_dev_run 2]

(The package's own command, ``dropreg fit``, is such a CLI too and takes any model by its class path.)
"""

import sys

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(L.LightningModule):
    """Predicts one number; squared error is one of the losses whose curvature is known."""

    def __init__(self, width: int = 64, drop_prob: float = 0.2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(drop_prob), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]), prog_bar=True)


class Waves(L.LightningDataModule):
    """A noisy sine of a projection."""

    def __init__(self, size: int = 512, batch_size: int = 32):
        super().__init__()
        self.size, self.batch_size = size, batch_size

    def _loader(self, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.size, 8, generator=g)
        y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * torch.randn(self.size, 1, generator=g)
        return DataLoader(TensorDataset(x, y), self.batch_size)

    def train_dataloader(self):
        return self._loader(1)

    def val_dataloader(self):
        return self._loader(2)


def main(args=None):
    args = sys.argv[1:] if args is None else args
    if "--fast" in args:
        args = [a for a in args if a != "--fast"] + ["--trainer.fast_dev_run", "2"]
    LightningCLI(Regressor, Waves, args=args)


if __name__ == "__main__":
    main()
