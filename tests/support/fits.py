"""An ordinary module, its data, and how it is fitted."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    """An ordinary module, as a user has it: nothing in it knows of this package."""

    def __init__(self, p=0.4, lr=0.1, dtype=torch.float64, norm=False):
        super().__init__()
        layers = [
            nn.Linear(4, 8),
            nn.BatchNorm1d(8) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(p),
            nn.Linear(8, 3),
        ]
        self.net = nn.Sequential(*layers).to(dtype)
        self.lr = lr
        self.gradients = []
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(torch.cat([p.grad.reshape(-1) for p in self.parameters()]).clone())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def make_loader(n=24, batch_size=6, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 4, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def make_trainer(callbacks=(), **kwargs):
    options = dict(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return L.Trainer(callbacks=list(callbacks), **{**options, **kwargs})


def train(callbacks=(), seed=0, make=Classifier, loader=None, model_options=None, **kwargs):
    """Fit a fresh model and return it."""
    L.seed_everything(seed, verbose=False)
    model = make(**(model_options or {}))
    trainer = make_trainer(callbacks, **kwargs)
    trainer.fit(model, loader or make_loader())
    return model


def same(a, b):
    """Losses and gradients of two runs, bit for bit."""
    assert len(a.gradients) == len(b.gradients) > 0
    return all(torch.equal(x, y) for x, y in zip(a.gradients + a.losses, b.gradients + b.losses))
