"""Takes dropout apart: which of its two effects helps here? Six methods, three seeds, one picture at the end.

pip install scikit-learn matplotlib;  python examples/disentangle.py [--fast] [--figure disentangle.png]

200 handwritten digits as one batch, two labels in five random.
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

METHODS = {  # callbacks, colour and line: those of all figures of this repository
    "dropout": (lambda: [], "#000000", "-"),
    "DROPOUT_8: an eighth of the noise": (lambda: [dr.MiniBatchDropout(8)], "#E69F00", "--"),
    "penalty and noise": (lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()], "#009E73", "-"),
    "explicit effect: penalty alone": (lambda: [dr.ExplicitPenalty()], "#0072B2", "--"),
    "implicit effect: noise alone": (lambda: [dr.ImplicitNoise()], "#D55E00", ":"),
    "neither": (lambda: [dr.ExplicitPenalty(strength=0.0)], "#7F7F7F", ":"),  # dropout is off, nothing in its place
}


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Dropout(0.5), nn.Linear(128, 10))
        self.curve = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.curve.append(F.cross_entropy(self.net(batch[0]), batch[1]).item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def make_loaders(seed):
    """An epoch is ten steps on the same 200 digits."""
    digits, g = load_digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    rows = torch.randperm(600, generator=g)[:200]
    noisy = torch.where(torch.rand(200, generator=g) < 0.4, torch.randint(10, (200,), generator=g), y[rows])
    ten = TensorDataset(x[rows].repeat(10, 1), noisy.repeat(10))
    return DataLoader(ten, 200), DataLoader(TensorDataset(x[600:], y[600:]), 1200)


def train(callbacks, seed, **options):
    L.seed_everything(seed, verbose=False)
    net = Net()
    L.Trainer(callbacks=callbacks, accelerator="cpu", logger=False, **options).fit(net, *make_loaders(seed))
    return torch.tensor(net.curve)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    parser.add_argument("--figure", default="disentangle.png", help="where to write the picture")
    options = parser.parse_args(args)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    length = {"fast_dev_run": 2} if options.fast else {"max_epochs": 25, "num_sanity_val_steps": 0}
    seeds = 1 if options.fast else 3
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, (make, color, line) in METHODS.items():
        curves = torch.stack([train(make(), seed, **length, **quiet) for seed in range(seeds)])
        best = curves.min(1).values
        print(f"{method:34s} best test loss {best.mean():.3f}, by seed {' '.join(f'{value:.3f}' for value in best)}")
        steps = range(10, 10 * curves.shape[1] + 1, 10)
        axes.plot(steps, curves.mean(0), color=color, linestyle=line, label=f"{method} ({best.mean():.3f})")
        axes.fill_between(steps, curves.min(0).values, curves.max(0).values, color=color, alpha=0.1, linewidth=0)
    axes.set(xlabel="step", ylabel="test loss")
    axes.set_title(
        f"Test loss: mean over {seeds} seeds, shaded from lowest to highest\n(in brackets: mean of the best)"
    )
    axes.legend(fontsize=9, frameon=False)
    figure.savefig(options.figure, dpi=120)


if __name__ == "__main__":
    main()
