"""The implicit noise: the same from every estimator, mean zero, and the covariance of dropout's own gradient noise."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, flat_gradient, variances

from lightning_dropreg.functional import dropout_loss, implicit_noise


@pytest.fixture(params=NETWORKS, ids=lambda network: network.__name__)
def problem(request):
    torch.set_default_dtype(torch.float64)
    net = request.param()
    x = net.x()
    y = torch.arange(net(x).shape[0]) % net.outputs
    return net, x, y


def test_same_gradient_from_every_estimator(problem):
    net, x, y = problem

    def gradient(**options):
        generator = torch.Generator().manual_seed(4)
        closure = lambda: F.cross_entropy(net(x), y)
        return flat_gradient(implicit_noise(closure, generator=generator, **options), net)

    expected = gradient(estimator="double_backward")
    torch.testing.assert_close(gradient(estimator="forward"), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(estimator="exact"), expected, rtol=1e-9, atol=1e-12)
    errors = [(gradient(step_size=step) - expected).norm() for step in (0.1, 0.05)]
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.3)
    assert errors[0] < 0.05 * expected.norm()


def noise_trace(net, x, y):
    """Trace of the covariance of xi_approx, exactly: ``sum_m c_m || grad_W dL/df_m ||^2`` over mask entries m."""
    ones = [torch.ones(shape, requires_grad=True) for shape in net.mask_shapes()]
    slopes = torch.autograd.grad(F.cross_entropy(net(x, list(ones)), y), ones, create_graph=True)
    return sum(
        c * flat_gradient_keeping(entry, net).square().sum()
        for c, slope in zip(variances(net), slopes)
        for entry in slope.reshape(-1)
    )


def flat_gradient_keeping(value, net):
    gradients = torch.autograd.grad(value, list(net.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.reshape(-1) for g in gradients if g is not None])


def test_mean_zero_with_the_right_covariance(problem):
    """Of 400 draws, the mean along a direction and the mean squared norm lie within three standard errors."""
    net, x, y = problem
    generator = torch.Generator().manual_seed(1)
    closure = lambda: F.cross_entropy(net(x), y)
    draws = torch.stack(
        [flat_gradient(implicit_noise(closure, generator=generator, step_size=1e-3), net) for _ in range(400)]
    )
    along = draws @ torch.randn(draws.shape[1])
    assert along.mean().abs() < 3 * along.std() / math.sqrt(400)
    squared = draws.square().sum(1)
    assert (squared.mean() - noise_trace(net, x, y)).abs() < 3 * squared.std() / math.sqrt(400)


class Tiny(torch.nn.Module):
    """One site with eight mask entries, so that all of dropout's outcomes can be enumerated."""

    outputs = 3

    def __init__(self, q):
        super().__init__()
        self.ps = (q,)
        self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)

    def mask_shapes(self):
        return [(2, 4)]

    def forward(self, x, factors=None):
        h = torch.tanh(self.a(x))
        return self.b(F.dropout(h, self.ps[0]) if factors is None else h * factors.pop(0))


def dropout_trace(net, x, y):
    """Trace of the covariance of the gradient of the dropout loss, by enumeration."""
    q = net.ps[0]
    gradients, probabilities = [], []
    for bits in itertools.product((0.0, 1.0), repeat=8):
        keep = torch.tensor(bits).view(2, 4)
        gradients.append(flat_gradient(F.cross_entropy(net(x, [keep / (1 - q)]), y), net))
        probabilities.append(q ** (8 - sum(bits)) * (1 - q) ** sum(bits))
    g, p = torch.stack(gradients), torch.tensor(probabilities)
    return (p[:, None] * (g - p @ g).square()).sum()


def test_covariance_tends_to_that_of_dropout():
    """The ratio of traces tends to 1 as q tends to 0; both are computed exactly."""
    torch.set_default_dtype(torch.float64)
    distances = []
    for q in (0.4, 0.2, 0.1, 0.05):
        torch.manual_seed(3)
        net, x, y = Tiny(q), torch.randn(2, 3), torch.tensor([0, 2])
        ratio = (noise_trace(net, x, y) / dropout_trace(net, x, y)).item()
        print(f"q = {q}: trace cov(xi_approx) / trace cov(xi_drop) = {ratio:.4f}")
        distances.append(abs(ratio - 1))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradient_covariance_of_dropout_k_falls_as_one_over_k(k):
    """Mean squared deviation over 600 draws within three standard errors of the enumerated trace over k."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    net, x, y = Tiny(0.4), torch.randn(2, 3), torch.tensor([0, 2])
    generator = torch.Generator().manual_seed(1)
    closure = lambda: F.cross_entropy(net(x), y)
    draws = torch.stack([flat_gradient(dropout_loss(closure, k=k, generator=generator), net) for _ in range(600)])
    squared = (draws - draws.mean(0)).square().sum(1) * 600 / 599
    assert (squared.mean() - dropout_trace(net, x, y) / k).abs() < 3 * squared.std() / math.sqrt(600)


def test_k_draws_with_noise_have_the_covariance_of_one():
    """Section 3.1: the noise of two of the k draws restores the trace; the mean is left alone."""
    from lightning_dropreg.step.plan import Estimation, NoiseSettings, Plan

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    net, x, y = Tiny(0.4), torch.randn(2, 3), torch.tensor([0, 2])

    class Runner:
        releases, scaler = False, None

        def whole(self):
            return F.cross_entropy(net(x), y)

        run_without_trace = whole

    estimation = Estimation("antithetic", 0.1, "as_model", None, 0)
    for injection in ("loss", "after_backward"):
        plan = Plan(k=4, noise=NoiseSettings(1.0, "dropout", injection, estimation))
        draws = []
        for key in range(600):
            gradient = flat_gradient(plan.run(Runner(), key, 0).total, net)
            if plan.noise_after_backward:
                gradient = gradient + flat_gradient(plan.extra(Runner(), key), net)
            draws.append(gradient)
        draws = torch.stack(draws)
        squared = (draws - draws.mean(0)).square().sum(1) * 600 / 599
        assert (squared.mean() - dropout_trace(net, x, y)).abs() < 3 * squared.std() / math.sqrt(600)
