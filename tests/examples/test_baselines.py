"""Each baseline against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.baselines.generalized_cross_entropy import generalized_cross_entropy
from examples.baselines.l2 import l2
from examples.baselines.label_smoothing import label_smoothing_loss
from examples.baselines.mixup import mixup_loss
from examples.baselines.noise_stability import NoiseStability
from examples.baselines.r_drop import r_drop_loss
from examples.baselines.sam import SAM

X, Y = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 1, 2, 0, 1, 2, 1])


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def gradient_at(net, offsets):
    parameters = [(p + offset).detach().requires_grad_() for p, offset in zip(net.parameters(), offsets, strict=True)]
    z = torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), parameters, strict=True)), X)
    return torch.autograd.grad(F.cross_entropy(z, Y), parameters)


def step(net, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(closure)
    return [(old - p) / 0.1 for old, p in zip(before, net.parameters(), strict=True)]


def test_label_smoothing_mixes_the_label_with_all_classes():
    z, amount = torch.randn(7, 3, dtype=torch.float64), 0.3
    target = (1 - amount) * F.one_hot(Y, 3) + amount / 3
    torch.testing.assert_close(label_smoothing_loss(z, Y, amount), -(target * z.log_softmax(-1)).sum(-1))


def test_weight_decay_is_the_gradient_of_l2():
    net, decayed = network(), network()
    (F.cross_entropy(net(X), Y) + l2(net.parameters(), 0.2)).backward()
    taken = step(decayed, torch.optim.SGD(decayed.parameters(), lr=0.1, weight_decay=0.2))
    for p, ours in zip(net.parameters(), taken, strict=True):
        torch.testing.assert_close(ours, p.grad)


def test_r_drop_is_symmetric_divergence_and_mean_cross_entropy():
    a, b = torch.randn(2, 7, 3, dtype=torch.float64)
    p, q = a.softmax(-1), b.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)
    cross_entropy = -(p.log() + q.log())[torch.arange(7), Y] / 2
    torch.testing.assert_close(r_drop_loss(a, b, Y, 0.7), cross_entropy + 0.7 * divergence / 2)
    torch.testing.assert_close(r_drop_loss(a, a, Y, 0.7), F.cross_entropy(a, Y, reduction="none"))


def test_sam_steps_with_the_gradient_at_the_worst_point_nearby():
    net = network()
    first = gradient_at(net, [0] * 4)
    norm = torch.cat([g.flatten() for g in first]).norm()
    expected = gradient_at(net, [0.3 * g / norm for g in first])
    taken = step(net, SAM(net.parameters(), rho=0.3, lr=0.1))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(expected, first, strict=True))
    for ours, theirs in zip(taken, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sam_of_many_networks_has_a_worst_point_for_each():
    start = torch.tensor([[1.0, 2.0], [30.0, -40.0]], dtype=torch.float64)

    def updated(rows, networks):
        w = nn.Parameter(start[rows].clone())
        optimizer = SAM([w], rho=0.5, networks=networks, lr=0.1)

        def closure():
            optimizer.zero_grad()
            (w**3).sum().backward()

        optimizer.step(closure)
        return w.detach()

    alone = torch.cat([updated([row], networks=False) for row in range(2)])
    torch.testing.assert_close(updated([0, 1], networks=True), alone)
    assert not torch.allclose(updated([0, 1], networks=False), alone)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_noise_stability_averages_two_opposite_points(sigma):
    net = network()
    torch.manual_seed(5)
    noise = [sigma * torch.randn_like(p) for p in net.parameters()]
    plus, minus = gradient_at(net, noise), gradient_at(net, [-u for u in noise])
    torch.manual_seed(5)
    taken = step(net, NoiseStability(net.parameters(), sigma=sigma, lr=0.1))
    for ours, a, b in zip(taken, plus, minus, strict=True):
        torch.testing.assert_close(ours, (a + b) / 2)


def test_generalized_cross_entropy_lies_between_cross_entropy_and_absolute_error():
    z = torch.randn(7, 3, dtype=torch.float64)
    p = z.softmax(-1)[torch.arange(7), Y]
    torch.testing.assert_close(generalized_cross_entropy(z, Y, 0.7), (1 - p**0.7) / 0.7)
    torch.testing.assert_close(generalized_cross_entropy(z, Y, 1.0), 1 - p)
    torch.testing.assert_close(generalized_cross_entropy(z, Y, 1e-7), -p.log(), rtol=1e-6, atol=1e-6)


def test_mixup_mixes_rows_and_labels_alike(monkeypatch):
    shares = torch.tensor([0.8, 0.3], dtype=torch.float64)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: shares.reshape(shape))
    torch.manual_seed(1)
    order = torch.rand(2, 7).argsort(-1)  # the same draw as the function's, of two batches at once
    x, y, w = torch.stack([X, X + 1]), torch.stack([Y, Y]), torch.randn(4, 3, dtype=torch.float64)
    torch.manual_seed(1)
    found = mixup_loss(lambda inputs: inputs @ w, x, y, 0.5)
    for batch in range(2):
        share, partner = shares[batch], order[batch]
        z = (share * x[batch] + (1 - share) * x[batch][partner]) @ w
        target = share * F.one_hot(Y, 3) + (1 - share) * F.one_hot(Y[partner], 3)
        torch.testing.assert_close(found[7 * batch : 7 * batch + 7], -(target * z.log_softmax(-1)).sum(-1))
