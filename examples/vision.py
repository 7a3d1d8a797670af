"""A small convolutional network on generated images, and how certain it is of what it sees.

pip install matplotlib;  python examples/vision.py [--fast] [--figure uncertainty.png]

Mixup and weight decay are the user's own; they compose. The predictions of Monte Carlo dropout are
compared with those without dropout (calibration), and their variance with its first-order value. Mixup has made this
network underconfident already, and averaging draws does not help it: look at the picture before you pay for them.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
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
            nn.Dropout(0.3), nn.Linear(128, 4),
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


def make_images(size, seed):
    """Stripes in one of four directions, faint under noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (size,), generator=g)
    angle = (y * torch.pi / 4)[:, None, None]
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = 6.28 * torch.rand(size, 1, 1, generator=g)
    x = torch.sin(rows * angle.sin() + columns * angle.cos() + phase) + 3 * torch.randn(size, 16, 16, generator=g)
    return TensorDataset(x[:, None], y)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    parser.add_argument("--figure", default="uncertainty.png", help="where to write the picture")
    options = parser.parse_args(args)
    L.seed_everything(1)
    model, test = ConvNet(), make_images(500, seed=2)
    common = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    common["fast_dev_run"] = 2 if options.fast else False

    regularizers = [dr.ExplicitPenalty(), dr.ImplicitNoise(), dr.MaxNorm(4.0)]
    L.Trainer(max_epochs=15, callbacks=regularizers, **common).fit(
        model, DataLoader(make_images(600, seed=1), batch_size=32)
    )

    draws = dr.MonteCarloDropout(passes=32, first_order=32)
    found = L.Trainer(callbacks=[draws], **common).predict(model, DataLoader(test, batch_size=100))
    outputs, mean, variance, first_order = (
        torch.cat([getattr(p, name) for p in found])
        for name in ("outputs", "mean", "output_variance", "first_order_variance")
    )
    target = test.tensors[1][: len(mean)]
    print(f"accuracy {(mean.argmax(1) == target).float().mean():.3f}")
    predictions = {"without dropout": outputs.softmax(1), "mean of 32 draws": mean}
    uncertainty_figure(predictions, target, variance, first_order).savefig(options.figure, dpi=120)
    print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
