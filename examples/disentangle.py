"""Takes dropout apart: which of its two effects helps here? Seven runs per seed, one picture at the end.

pip install matplotlib;  python examples/disentangle.py [--fast] [--figure disentangle.png]
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr

RUNS = {  # drop probability, callbacks
    "nothing": (0.0, lambda: []),
    "explicit effect (penalty)": (0.5, lambda: [dr.ExplicitPenalty()]),
    "implicit effect (noise)": (0.5, lambda: [dr.ImplicitNoise()]),
    "both (Algorithm 2)": (0.5, lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()]),
    "dropout": (0.5, lambda: []),
    "DROPOUT_8: less noise": (0.5, lambda: [dr.MiniBatchDropout(8)]),
    "DROPOUT_8 + noise (Algorithm 4)": (0.5, lambda: [dr.MiniBatchDropout(8), dr.ImplicitNoise()]),
}


class Net(L.LightningModule):
    def __init__(self, p):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Dropout(p), nn.Linear(128, 5))
        self.curve = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.curve.append(F.cross_entropy(self.net(batch[0]), batch[1]).item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def data(size, seed):  # a linear teacher whose labels are noisy, so that a wide network overfits
    g, teacher = torch.Generator().manual_seed(seed), torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(size, 20, generator=g)
    return DataLoader(
        TensorDataset(x, (x @ teacher + 3 * torch.randn(size, 5, generator=g)).argmax(1)), min(size, 1000)
    )


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    parser.add_argument("--figure", default="disentangle.png", help="where to write the picture")
    options = parser.parse_args(args)
    kwargs = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    ...


if __name__ == "__main__":
    main()
