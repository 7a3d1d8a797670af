"""A module that brings its regularizers along: whoever trains it need not know.

pip install scikit-learn;  python examples/mixin.py [--fast]
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr


class Reader(dr.ExplicitPenaltyMixin, dr.ImplicitNoiseMixin, L.LightningModule):
    """Reads a digit line by line; the regularizers act on the dropout inside the LSTM and after it."""

    explicit_penalty = {"strength": 1.0}  # the arguments of ExplicitPenalty; on the instance they may differ

    def __init__(self, noise=1.0):
        super().__init__()
        self.implicit_noise = {"strength": noise}
        self.rnn = nn.LSTM(8, 32, num_layers=2, dropout=0.3, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, 10))

    def forward(self, images):
        return self.head(self.rnn(images)[0][:, -1])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def make_loaders():
    """Handwritten digits, 8 lines of 8 pixels."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return DataLoader(TensorDataset(x[:512], y[:512]), 32), DataLoader(TensorDataset(x[512:], y[512:]), 1285)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    L.seed_everything(1)
    trainer = L.Trainer(
        max_epochs=10, accelerator="cpu", fast_dev_run=2 if fast else False, logger=False, enable_checkpointing=False
    )
    trainer.fit(Reader(), *make_loaders())
    for name in ("dropreg/loss", "dropreg/explicit_penalty", "dropreg/noise_norm", "accuracy"):
        if name in trainer.callback_metrics:
            print(f"{name:25s} {trainer.callback_metrics[name]:.4f}")


if __name__ == "__main__":
    main()
