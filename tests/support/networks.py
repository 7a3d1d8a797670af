"""Small float64 networks whose dropout sites can also be driven by hand.

``net(x)`` uses dropout as anybody would; ``net(x, factors)`` multiplies the sites' activations by given factors.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    outputs = 4

    def drop(self, h, factors, p, kind=F.dropout):
        return kind(h, p, self.training) if factors is None else h * factors.pop(0)


class MLP(Net):
    ps = (0.3, 0.4)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, self.outputs)

    def mask_shapes(self):
        return [(5, 4), (5, 3)]

    def forward(self, x, factors=None):
        h = self.drop(torch.tanh(self.a(x)), factors, self.ps[0])
        h = self.drop(torch.tanh(self.b(h)), factors, self.ps[1])
        return self.c(h)

    @staticmethod
    def x():
        return torch.randn(5, 3)


class CNN(Net):
    ps = (0.25, 0.4)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 2), nn.Linear(8, self.outputs)

    def mask_shapes(self):
        return [(3, 3, 1, 1), (3, 8)]

    def forward(self, x, factors=None):
        h = self.drop(torch.tanh(self.a(x)), factors, self.ps[0], F.dropout2d)
        h = torch.tanh(self.b(h)).flatten(1)
        return self.c(self.drop(h, factors, self.ps[1]))

    @staticmethod
    def x():
        return torch.randn(3, 1, 5, 5)


class LSTM(Net):
    ps = (0.2, 0.3, 0.4)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.LSTM(2, 3, batch_first=True),
            nn.LSTM(3, 2, batch_first=True),
            nn.Linear(2, self.outputs),
        )

    def mask_shapes(self):
        return [(2, 3, 2), (2, 3, 3), (2, 3, 2)]

    def forward(self, x, factors=None):
        h = self.a(self.drop(x, factors, self.ps[0]))[0]
        h = self.b(self.drop(h, factors, self.ps[1]))[0]
        return self.c(self.drop(h, factors, self.ps[2])).flatten(0, 1)

    @staticmethod
    def x():
        return torch.randn(2, 3, 2)


class Transformer(Net):
    ps = (0.1, 0.2, 0.3)

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, self.outputs)
        self.norm = nn.LayerNorm(4)

    def mask_shapes(self):
        return [(2, 3, 4), (2, 3, 4), (2, 3, 5)]

    def forward(self, x, factors=None):
        h = self.drop(x, factors, self.ps[0])
        q, k, v = self.qkv(h).chunk(3, -1)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
        h = self.norm(h + self.drop(self.o(weights @ v), factors, self.ps[1]))
        h = h + self.down(self.drop(F.gelu(self.up(h)), factors, self.ps[2]))
        return self.head(h).flatten(0, 1)

    @staticmethod
    def x():
        return torch.randn(2, 3, 4)


NETWORKS = [MLP, CNN, LSTM, Transformer]


def flat_gradient(value, module):
    """Gradient of a scalar in all parameters, zeros where it does not depend on them."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, gradients)])


def variances(net):
    return [p / (1 - p) for p in net.ps]


def site_jacobians(net, x):
    """``J_i diag(h_i)``: outputs in relative changes at the sites, flattened to (T, C, entries)."""
    ones = tuple(torch.ones(shape) for shape in net.mask_shapes())
    jacobians = torch.autograd.functional.jacobian(lambda *fs: net(x, list(fs)), ones, create_graph=True)
    return [j.reshape(*j.shape[:2], -1) for j in jacobians]
