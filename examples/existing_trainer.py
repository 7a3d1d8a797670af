"""Add the regularizers to a Trainer that already works. Nothing in the model changes.

pip install scikit-learn matplotlib;  python examples/existing_trainer.py [--fast] [--figure existing_trainer.png]

Handwritten digits, every fifth training label wrong; the same module with its dropout, and with penalty and noise
instead.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr


class Classifier(L.LightningModule):
    """Your model, as it is: its dropout layers say where the regularizers act, and how strongly."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 256), nn.Tanh(), nn.Dropout(0.5), nn.Linear(256, 256), nn.Tanh(), nn.Dropout(0.5),
            nn.Linear(256, 10),
        )  # fmt: skip
        self.curve = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("val_loss", loss)
        self.curve.append(loss.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def make_loaders():
    """300 training digits with noisy labels, 1,497 for the test."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=g)
    train, test = order[:300], order[300:]
    noisy = y[train].clone()
    noisy[::5] = torch.randint(10, (60,), generator=g)
    return DataLoader(TensorDataset(x[train], noisy), 100, shuffle=True), DataLoader(
        TensorDataset(x[test], y[test]), 1500
    )


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    parser.add_argument("--figure", default="existing_trainer.png", help="where to write the picture")
    options = parser.parse_args(args)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, callbacks, color in (
        ("dropout", [], "#000000"),
        ("penalty and noise", [dr.ExplicitPenalty(), dr.ImplicitNoise()], "#009E73"),  # this is all: Algorithm 2
    ):
        L.seed_everything(1, verbose=False)
        model = Classifier()
        trainer = L.Trainer(
            max_epochs=60,
            callbacks=callbacks,
            accelerator="cpu",
            fast_dev_run=2 if options.fast else False,
            logger=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, *make_loaders())
        print(f"{name}: best val_loss {min(model.curve):.3f}, last {model.curve[-1]:.3f}")
        axes.plot(range(1, len(model.curve) + 1), model.curve, color=color, label=name)
    for name, value in trainer.callback_metrics.items():
        print(f"{name:25s} {value:.4f}")
    axes.set(xlabel="epoch", ylabel="test loss", title="Test loss on digits with noisy training labels, one seed each")
    axes.legend(frameon=False)
    figure.savefig(options.figure, dpi=120)
    print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
