"""Algorithm 2 in a loop of your own: dropout replaced by penalty and noise, from two passes a batch.

pip install scikit-learn;  python examples/plain_pytorch.py [--fast]
"""

import argparse
import copy
import itertools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dropreg.functional import regularize


def make_loader(size=512, train=True):
    """Handwritten digits: the first ones to train with, the last ones to test."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    rows = slice(size) if train else slice(-size, None)
    return DataLoader(TensorDataset(x[rows], y[rows]), batch_size=32)


def train(net, loader, epochs=10, batches=None, accumulate=2, batch_fraction=None, autocast=False):
    """Train with gradient accumulation; the noise of a micro-batch is divided like its loss."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    net.train()
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader):
            if number == batches:
                break

            def on_rows(rows, x=x, y=y):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    return F.cross_entropy(net(x[rows]), y[rows])

            found = regularize(
                lambda on_rows=on_rows: on_rows(slice(None)),
                strength=1.0,  # of the penalty; noise_strength is that of the noise
                batch_fraction=batch_fraction,
                rows=on_rows,
                batch_size=len(x),
                module=net,  # its batch norm and the like advance once
            )
            (found.total / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return found


def accuracy(net):
    """Share of 1,000 test digits that are read right."""
    x, y = next(iter(DataLoader(make_loader(1000, train=False).dataset, 1000)))
    return (net.eval()(x).argmax(1) == y).float().mean().item()


def train_with_dropout(net, loader, epochs=10, batches=None):
    """What to compare with: the same loop with dropout as it is."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(epochs):
        for x, y in itertools.islice(loader, batches):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x), y).backward()
            optimizer.step()


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 10))
    other = copy.deepcopy(net)
    found = train(net, make_loader(), *((1, 2) if fast else ()))
    print(f"loss {found.loss.item():.4f}, penalty {found.penalty.item():.4f}, noise {found.noise.item():+.4f}")
    print(f"test accuracy {accuracy(net):.3f} with penalty and noise")
    train_with_dropout(other, make_loader(), *((1, 2) if fast else ()))
    print(f"test accuracy {accuracy(other):.3f} with dropout")


if __name__ == "__main__":
    main()
