"""A small convolutional network on handwritten digits, and how certain it is of what it sees.

pip install scikit-learn matplotlib;  python examples/vision.py [--fast] [--figure uncertainty.png]

Mixup and weight decay are the user's own; they compose. The predictions of Monte Carlo dropout are
compared with those without dropout (calibration), and their variance with its first-order value. Mixup has made this
network underconfident already, and averaging draws does not help it: look at the picture before you pay for them.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr
from lightning_dropreg.uncertainty.figures import uncertainty_figure


class ConvNet(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(128, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        x, y = batch
        share, order = torch.distributions.Beta(0.2, 0.2).sample(), torch.randperm(len(y))  # mixup
        z = self.net(share * x + (1 - share) * x[order])
        return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[order])

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)


def make_images():
    """Handwritten digits, 400 to train with and 1,397 to test."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(x[rows], y[rows]) for rows in (order[:400], order[400:])]


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    parser.add_argument("--figure", default="uncertainty.png", help="where to write the picture")
    options = parser.parse_args(args)
    train, test = make_images()
    common = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    common["fast_dev_run"] = 2 if options.fast else False
    loader = DataLoader(test, batch_size=100)
    for name, regularizers in (
        ("dropout", []),
        ("penalty and noise", [dr.ExplicitPenalty(), dr.ImplicitNoise(), dr.MaxNorm(4.0)]),
    ):
        L.seed_everything(1, verbose=False)
        model = ConvNet()
        L.Trainer(max_epochs=30, callbacks=regularizers, **common).fit(model, DataLoader(train, 32, shuffle=True))
        outputs = torch.cat(L.Trainer(**common).predict(model, loader))
        target = test.tensors[1][: len(outputs)]
        print(f"{name}: accuracy {(outputs.argmax(1) == target).float().mean():.3f} without draws")

    draws = dr.MonteCarloDropout(passes=32, first_order=32)
    found = L.Trainer(callbacks=[draws], **common).predict(model, loader)
    mean, variance, first_order = (
        torch.cat([getattr(p, name) for p in found]) for name in ("mean", "output_variance", "first_order_variance")
    )
    print(f"penalty and noise: accuracy {(mean.argmax(1) == target).float().mean():.3f} of the mean of 32 draws")
    predictions = {"without dropout": outputs.softmax(1), "mean of 32 draws": mean}
    uncertainty_figure(predictions, target, variance, first_order).savefig(options.figure, dpi=120)
    print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
