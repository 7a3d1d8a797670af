"""Add the regularizers to a Trainer that already works. Nothing in the model changes.

python examples/existing_trainer.py [--fast]
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr


class Classifier(L.LightningModule):
    """Your model, as it is: its dropout layers say where the regularizers act, and how strongly."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def make_loader(size, seed):
    """Noisy labels of a linear teacher."""
    teacher = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 20, generator=g)
    y = (x @ teacher + 3 * torch.randn(size, 4, generator=g)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=32)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    L.seed_everything(1)

    trainer = L.Trainer(
        max_epochs=10,
        callbacks=[dr.ExplicitPenalty(), dr.ImplicitNoise()],  # this line is all: dropout is replaced (Algorithm 2)
        accelerator="cpu",
        fast_dev_run=2 if fast else False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), make_loader(512, seed=1), make_loader(512, seed=2))
    for name in ("dropreg/loss", "dropreg/explicit_penalty", "dropreg/noise_norm", "dropreg/grad_norm", "val_loss"):
        if name in trainer.callback_metrics:
            print(f"{name:25s} {trainer.callback_metrics[name]:.4f}")


if __name__ == "__main__":
    main()
