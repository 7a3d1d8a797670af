"""Algorithm 2 under Lightning Fabric: `fabric.backward` takes the total.

pip install scikit-learn;  python examples/fabric.py [--fast]

Two processes on one CPU; `regularize` draws different noise in each from equal seeds.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dropreg.functional import regularize


def make_loader():
    """Handwritten digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return DataLoader(TensorDataset(x[:512], y[:512]), batch_size=32)


def accuracy(net):
    """Share of the other 1,285 digits that are read right."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[512:], dtype=torch.float32) / 16, torch.tensor(digits.target[512:])
    with torch.no_grad():
        return (net.eval()(x).argmax(1) == y).float().mean().item()


def train(fabric, epochs=5, batches=None, accumulate=2):
    fabric.seed_everything(1, verbose=False)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.4), nn.Linear(64, 10))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(make_loader())
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader):
            if number == batches:
                break
            waits = (number + 1) % accumulate != 0
            with fabric.no_backward_sync(model, enabled=waits):  # the passes of a batch too
                found = regularize(lambda x=x, y=y: F.cross_entropy(model(x), y), module=net)
                fabric.backward(found.total / accumulate)
            if not waits:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)  # after the noise
                optimizer.step()
                optimizer.zero_grad()
    replicas = fabric.all_gather(nn.utils.parameters_to_vector(net.parameters()).detach())
    noises = fabric.all_gather(found.noise.detach()).flatten()
    if fabric.is_global_zero:
        equal = all(torch.equal(replica, replicas[0]) for replica in replicas) if fabric.world_size > 1 else True
        print(f"{fabric.world_size} replicas, {'equal' if equal else 'DIFFERENT'}; noise {noises.tolist()}")
        print(f"test accuracy {accuracy(net):.3f}", flush=True)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", precision="bf16-mixed")
    fabric.launch(train, *((1, 2) if fast else ()))


if __name__ == "__main__":
    main()
