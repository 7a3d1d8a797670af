"""Distributed data parallel: two processes on one CPU, by gloo. On GPUs only accelerator and devices differ.

pip install scikit-learn;  python examples/ddp.py [--fast]

Every rank draws its own noise; the replicas stay equal, bit for bit, which is checked at the end.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def on_train_end(self):
        weights = torch.cat([p.detach().flatten() for p in self.parameters()])
        replicas = self.all_gather(weights)
        if self.trainer.is_global_zero:
            equal = all(torch.equal(replicas[0], replica) for replica in replicas)
            print(
                f"{len(replicas)} replicas, {'equal' if equal else 'DIFFERENT'}; test accuracy {accuracy(self.net):.3f}"
            )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def make_loader():
    """Handwritten digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return DataLoader(TensorDataset(x[:512], y[:512]), batch_size=32)  # Lightning shares it out to the ranks


def accuracy(net):
    """Share of the other 1,285 digits that are read right."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[512:], dtype=torch.float32) / 16, torch.tensor(digits.target[512:])
    with torch.no_grad():
        return (net.eval()(x).argmax(1) == y).float().mean().item()


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    L.seed_everything(1)
    trainer = L.Trainer(
        max_epochs=5,
        callbacks=[dr.ExplicitPenalty(), dr.ImplicitNoise()],
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="fork"),  # "popen", the default, for GPUs
        fast_dev_run=2 if fast else False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), make_loader())


if __name__ == "__main__":
    main()
