"""Distributed data parallel: two processes on one CPU, by gloo. On GPUs only accelerator and devices differ.

python examples/ddp.py [--fast]

Every rank draws its own noise; the replicas stay equal, bit for bit, which is checked at the end.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def on_train_end(self):
        weights = torch.cat([p.detach().flatten() for p in self.parameters()])
        replicas = self.all_gather(weights)
        if self.trainer.is_global_zero:
            equal = all(torch.equal(replicas[0], replica) for replica in replicas)
            print(f"{len(replicas)} replicas, {'equal' if equal else 'DIFFERENT'}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_loader():
    x = torch.randn(512, 20, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)  # Lightning shares it out to the ranks


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
