"""Algorithm 2 in a loop of your own: dropout replaced by penalty and noise, from two passes a batch.

python examples/plain_pytorch.py [--fast]
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dropreg.functional import regularize


def make_loader(size=512, seed=1):
    """Noisy labels of a linear teacher."""
    teacher = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 20, generator=g)
    y = (x @ teacher + 3 * torch.randn(size, 4, generator=g)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=32)


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


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 4))
    found = train(net, make_loader(), *((1, 2) if fast else ()))
    print(f"loss {found.loss.item():.4f}, penalty {found.penalty.item():.4f}, noise {found.noise.item():+.4f}")
    x, y = next(iter(make_loader(seed=2)))
    print(f"test accuracy {(net.eval()(x).argmax(1) == y).float().mean().item():.2f}")


if __name__ == "__main__":
    main()
