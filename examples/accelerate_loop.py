"""Algorithm 2 in a loop of Hugging Face Accelerate: `accelerator.backward` takes the total.

pip install accelerate scikit-learn;  python examples/accelerate_loop.py [--fast]   (or by accelerate launch)
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
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


def train(accelerator, net, epochs=5, batches=None):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    model, optimizer, loader = accelerator.prepare(net, optimizer, make_loader())
    model.train()
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader):
            if number == batches:
                break
            with accelerator.accumulate(model):  # divides in backward, and lets the optimizer step when it is time
                found = regularize(
                    lambda x=x, y=y: F.cross_entropy(model(x), y), module=accelerator.unwrap_model(model)
                )
                accelerator.backward(found.total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)  # after the noise
                optimizer.step()
                optimizer.zero_grad()
    return found


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    set_seed(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.4), nn.Linear(64, 10))
    found = train(accelerator, net, *((1, 2) if fast else ()))
    accelerator.print(
        f"loss {found.loss.item():.4f}, penalty {found.penalty.item():.4f}, noise {found.noise.item():+.4f}, "
        f"test accuracy {accuracy(net):.3f}"
    )


if __name__ == "__main__":
    main()
