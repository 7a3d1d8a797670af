"""Takes dropout apart: which of its two effects helps here? Six methods, three seeds, one picture at the end.

pip install matplotlib;  python examples/disentangle.py [--fast] [--figure disentangle.png]
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr

METHODS = {  # callbacks, colour and line
    "dropout": (lambda: [], "#000000", "-"),
    "DROPOUT_8: hardly any noise": (lambda: [dr.MiniBatchDropout(8)], "#E69F00", "--"),
    "penalty and noise": (lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()], "#009E73", "-"),
    "explicit effect: penalty alone": (lambda: [dr.ExplicitPenalty()], "#0072B2", "-."),
    "implicit effect: noise alone": (lambda: [dr.ImplicitNoise()], "#D55E00", ":"),
    "neither": (lambda: [dr.ExplicitPenalty(strength=0.0)], "#999999", "--"),  # dropout is off, nothing in its place
}


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 5))
        self.curve = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.curve.append(F.cross_entropy(self.net(batch[0]), batch[1]).item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def data(size, batch_size, seed):  # a linear teacher whose labels are noisy, so that a wide network overfits
    L.seed_everything(seed, verbose=False)
    x, teacher = torch.randn(size, 20), torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x @ teacher + 3 * torch.randn(size, 5)).argmax(1)), batch_size)


def train(callbacks, seed, **options):
    train_data, validation_data = data(400, 40, seed=100 + seed), data(2000, 2000, seed=1)
    L.seed_everything(seed, verbose=False)
    net = Net()
    L.Trainer(callbacks=callbacks, accelerator="cpu", logger=False, **options).fit(net, train_data, validation_data)
    return torch.tensor(net.curve)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    parser.add_argument("--figure", default="disentangle.png", help="where to write the picture")
    options = parser.parse_args(args)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    length = {"fast_dev_run": 2} if options.fast else {"max_epochs": 25, "num_sanity_val_steps": 0}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, (make, color, line) in METHODS.items():
        curves = torch.stack([train(make(), seed, **length, **quiet) for seed in range(1 if options.fast else 3)])
        epochs, mean = range(1, curves.shape[1] + 1), curves.mean(0)
        axes.plot(epochs, mean, color=color, linestyle=line, label=f"{method} ({mean.min():.3f})")
        axes.fill_between(epochs, curves.min(0).values, curves.max(0).values, color=color, alpha=0.1, linewidth=0)
    axes.set(xlabel="epoch", ylabel="validation loss", title="Mean and range over seeds (best epoch of the mean)")
    axes.legend(fontsize=9)
    figure.savefig(options.figure, dpi=120)


if __name__ == "__main__":
    main()
