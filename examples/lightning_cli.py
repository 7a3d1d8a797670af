"""Your own LightningCLI, with the regularizers in the YAML file.

pip install scikit-learn
python examples/lightning_cli.py fit --config examples/lightning_cli.yaml [--trainer.fast_dev_run 2]

(The package's own command, ``dropreg fit``, is such a CLI too and takes any model by its class path.)
"""

import sys

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(L.LightningModule):
    """Predicts one number; squared error is one of the losses whose curvature is known."""

    def __init__(self, width: int = 64, drop_prob: float = 0.2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Dropout(drop_prob), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]), prog_bar=True)


class Diabetes(L.LightningDataModule):
    """442 patients: ten measurements, and the progression of the disease a year later, in standard deviations.

    The mean predicts with a squared error of 1; least squares with about 0.5.
    """

    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size
        x, y = load_diabetes(return_X_y=True, scaled=False)
        data = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
        x, y = ((values - values.mean(0)) / values.std(0) for values in data)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.parts = [TensorDataset(x[rows], y[rows]) for rows in (order[:300], order[300:])]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], len(self.parts[1]))


def main(args=None):
    args = sys.argv[1:] if args is None else args
    if "--fast" in args:
        args = [a for a in args if a != "--fast"] + ["--trainer.fast_dev_run", "2"]
    cli = LightningCLI(Regressor, Diabetes, args=args)
    print(f"val_loss {cli.trainer.callback_metrics['val_loss']:.3f} (1 is the mean, about 0.5 least squares)")


if __name__ == "__main__":
    main()
