"""A module that brings its regularizers along: whoever trains it need not know.

python examples/mixin.py [--fast]
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr


class Tagger(dr.ExplicitPenaltyMixin, dr.ImplicitNoiseMixin, L.LightningModule):
    """Tags every word of a sentence; the regularizers act on the dropout inside the LSTM and after it."""

    explicit_penalty = {"strength": 2.0}  # the arguments of ExplicitPenalty; on the instance they may differ

    def __init__(self, noise=1.0):
        super().__init__()
        self.implicit_noise = {"strength": noise}
        self.embed = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 32, num_layers=2, dropout=0.3, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, 5))

    def training_step(self, batch, batch_idx):
        words, tags = batch
        scores = self.head(self.rnn(self.embed(words))[0])
        return F.cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=-100)  # -100: padding

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def make_loader():
    """The tag is the word's remainder, shifted by the word before it; every sentence ends in padding."""
    words = torch.randint(1, 50, (256, 12), generator=torch.Generator().manual_seed(0))
    tags = (words + words.roll(1, 1)) % 5
    words[:, 10:], tags[:, 10:] = 0, -100
    return DataLoader(TensorDataset(words, tags), batch_size=32)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    L.seed_everything(1)
    trainer = L.Trainer(
        max_epochs=20, accelerator="cpu", fast_dev_run=2 if fast else False, logger=False, enable_checkpointing=False
    )
    trainer.fit(Tagger(), make_loader())
    for name in ("dropreg/loss", "dropreg/explicit_penalty", "dropreg/noise_norm"):
        if name in trainer.callback_metrics:
            print(f"{name:25s} {trainer.callback_metrics[name]:.4f}")


if __name__ == "__main__":
    main()
