"""Networks that are trained side by side get the gradients that each would get alone."""

from typing import ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropreg as dr
from examples.benchmarks.data import Batches, Data, digits
from examples.benchmarks.many_networks import ManyNetworks

SEEDS, ROWS = [3, 4, 5], 6
DROP_PROBS = (0.2, 0.5, 0.4)
EPS = 0.1


def data():
    found = digits(SEEDS, label_noise=0.4, rows=ROWS)
    parts = [(x.double(), y) for x, y in (found.train, found.held_out, found.test)]
    return Data(*parts, classes=10)


class Watched(ManyNetworks):
    """Notes by what factor each site multiplied each entry, in every pass, and the gradients of the first step."""

    passes: ClassVar[list] = []
    note = passes.append  # a bound method: what a step reaches otherwise is put back for every pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        drawn = []
        Watched.note(drawn)
        for layer, (weight, bias, q) in enumerate(zip(self.weights, self.biases, self.drop_probs, strict=True)):
            x = self.activation(x) if layer else x
            dropped = F.dropout(x, q)
            drawn.append((dropped / x).detach().nan_to_num(1.0))
            x = torch.baddbmm(bias, dropped, weight)
        return x

    def on_before_optimizer_step(self, optimizer):
        self.gradients = [p.grad.clone() for p in self.parameters()]


def fit(module, callbacks, batches):
    L.seed_everything(1, verbose=False)
    make_trainer(callbacks, max_steps=1, limit_val_batches=0).fit(module, batches)
    return module


class Alone(L.LightningModule):
    """An ordinary network with the weights of one of the many."""

    def __init__(self, many, number):
        super().__init__()
        layers = []
        for layer, (weight, bias, q) in enumerate(zip(many.weights, many.biases, many.drop_probs, strict=True)):
            linear = nn.Linear(*weight.shape[1:]).double()
            linear.weight.data, linear.bias.data = weight[number].detach().T.clone(), bias[number, 0].detach().clone()
            layers += [nn.Tanh()] * bool(layer) + [nn.Dropout(q), linear]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        linears = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        self.gradients = [m.weight.grad.T.clone() for m in linears] + [m.bias.grad[None].clone() for m in linears]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def many():
    module = Watched(data(), SEEDS, widths=(5, 4), drop_probs=DROP_PROBS).double()
    Watched.passes.clear()
    return module


def batches():
    return Batches(data(), ROWS, 1, SEEDS)


@pytest.mark.parametrize("curvature", ["loss_hessian", "identity", "loss_jacobian"])
def test_penalty_is_that_of_separate_fits(curvature):
    """Without noise (the exact penalty), through the callback and a Trainer each."""
    penalty = {"strength": 1.7, "curvature": curvature, "estimator": "exact"}
    together = many()
    separate = [Alone(together, number) for number in range(len(SEEDS))]
    fit(together, [dr.ExplicitPenalty(**penalty)], batches())
    x, y = data().train
    for number, alone in enumerate(separate):
        fit(alone, [dr.ExplicitPenalty(**penalty)], DataLoader(TensorDataset(x[number], y[number]), ROWS))
        for ours, theirs in zip(together.gradients, alone.gradients, strict=True):
            assert theirs.abs().max() > 1e-4
            torch.testing.assert_close(ours[number], theirs, rtol=1e-8, atol=1e-11)


def logits_alone(module, number, factors):
    """One network by hand, its sites multiplied by what they were multiplied by."""
    x = data().train[0][number]
    weights = [w[number].detach().clone().requires_grad_() for w in module.weights]
    biases = [b[number].detach().clone().requires_grad_() for b in module.biases]

    def run(factors):
        h = x
        for layer, (weight, bias, factor) in enumerate(zip(weights, biases, factors, strict=True)):
            h = (torch.tanh(h) if layer else h) * factor[number]
            h = h @ weight + bias
        return h

    return [run(one) for one in factors], [*weights, *biases]


def variance(z, u):
    p = z.softmax(-1)
    return (p * u.square()).sum(-1) - (p * u).sum(-1).square()


def algorithm_2(logits, y):
    plus, minus = logits
    slope = (plus - minus) / (2 * EPS)
    losses = [F.cross_entropy(z, y) for z in logits]
    penalty = variance((plus + minus) / 2, slope).mean() / 2
    return sum(losses) / 2 + 1.5 * penalty + 0.7 * (losses[0] - losses[1]) / (2 * EPS)


def averaged(logits, y):
    return sum(F.cross_entropy(z, y) for z in logits) / len(logits)


def with_xi(logits, y):
    *draws, plus, minus = logits
    slope = (F.cross_entropy(plus, y) - F.cross_entropy(minus, y)) / (2 * EPS)
    return averaged(draws, y) + (1 - 1 / len(draws)) ** 0.5 * slope


def with_difference(logits, y):
    # the difference of the first two draws, in the place of two further ones: the same covariance
    noise = F.cross_entropy(logits[0], y) - F.cross_entropy(logits[1], y)
    return averaged(logits, y) + (0.5 * (1 - 1 / len(logits))) ** 0.5 * noise


@pytest.mark.parametrize(
    ("callbacks", "passes", "loss"),
    [
        (lambda: [dr.MiniBatchDropout(3)], 3, averaged),
        (lambda: [dr.ExplicitPenalty(1.5, step_size=EPS), dr.ImplicitNoise(0.7, step_size=EPS)], 2, algorithm_2),
        (lambda: [dr.MiniBatchDropout(3), dr.ImplicitNoise(step_size=EPS)], 5, with_xi),
        (lambda: [dr.MiniBatchDropout(3), dr.ImplicitNoise(source="dropout")], 3, with_difference),
    ],
    ids=["DROPOUT_3", "Algorithm 2", "DROPOUT_3 + xi", "DROPOUT_3 + 3.1"],
)
def test_noise_is_that_of_separate_fits(callbacks, passes, loss):
    """With the noise that the callbacks drew, each network's gradient is that of the paper's formula for it alone."""
    module = many()
    start = [p.detach().clone() for p in module.parameters()]
    fit(module, callbacks(), batches())
    for p, old in zip(module.parameters(), start, strict=True):
        p.data = old
    drawn = module.passes[-passes:]
    assert not torch.equal(drawn[0][1][0], drawn[0][1][1])  # every network has noise of its own
    for number in range(len(SEEDS)):
        y = data().train[1][number]
        logits, parameters = logits_alone(module, number, drawn)
        expected = torch.autograd.grad(loss(logits, y), parameters)
        for ours, theirs in zip(module.gradients, expected, strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-8, atol=1e-11)
