"""The three estimators against `exact`: values, gradients, error in the step size.

The statistical tests draw with fixed seeds and ask the mean to lie within three standard errors; if a first sample does
not, a second, independent one of four times the size must. A right implementation fails a comparison with probability
0.0027 ** 2, and any of the 220 in this file with probability 0.002. That forward mode is right to the last digit is
shown by the test over all directions, which is not statistical.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_table import LOSS_OPTIONS
from networks import MLP, NETWORKS, flat_gradient

from lightning_dropreg.functional import explicit_penalty
from lightning_dropreg.passes import Directions

DRAWS = 100
CURVATURES = ["loss_hessian", "identity", "loss_jacobian"]


def problem(network=MLP, loss="cross_entropy"):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = network()
    x = net.x()
    return net, lambda: LOSS_OPTIONS[loss](net(x))


def assert_unbiased(net, closure, curvature="loss_hessian", **options):
    """Compare the mean over draws of value and gradient (along a fixed direction) with `exact`."""
    direction = torch.randn(sum(p.numel() for p in net.parameters()), generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(1)

    def value_and_gradient(**options):
        value = explicit_penalty(closure, curvature=curvature, **options)
        return torch.stack([value.detach(), flat_gradient(value, net) @ direction])

    expected = value_and_gradient(estimator="exact")
    for n in (DRAWS, 4 * DRAWS):
        sample = torch.stack([value_and_gradient(generator=generator, step_size=1e-3, **options) for _ in range(n)])
        error = (sample.mean(0) - expected).abs()
        standard_error = sample.std(0) / math.sqrt(n)
        if (error <= 3 * standard_error + 1e-6 * expected.abs()).all():
            return
    raise AssertionError(f"off by {error / standard_error} standard errors")


@pytest.mark.parametrize("loss", LOSS_OPTIONS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward"])
def test_unbiased(loss, curvature, estimator):
    assert_unbiased(*problem(loss=loss), curvature, estimator=estimator)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("loss", LOSS_OPTIONS)
def test_the_mean_over_all_directions_is_exact(loss, curvature, monkeypatch):
    """With 6 mask entries the expectation is a sum of 2^6 terms; forward mode must give `exact` to rounding."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    features, weight = torch.randn(5, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    module = torch.nn.Module()
    module.features, module.weight = torch.nn.Parameter(features), torch.nn.Parameter(weight)

    class Shared(torch.nn.Module):  # one mask for all examples
        def forward(self, h):
            return F.dropout1d(h.T[None], 0.3)[0].T

    closure = lambda: LOSS_OPTIONS[loss](torch.tanh(Shared()(module.features) @ module.weight))
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6) * (0.3 / 0.7) ** 0.5
    total = 0.0
    for pattern in patterns:
        monkeypatch.setattr(Directions, "draw", lambda self, site, like, pattern=pattern: pattern.view(site.mask_shape))
        total = total + explicit_penalty(closure, curvature=curvature, estimator="forward") / len(patterns)
    exact = explicit_penalty(closure, curvature=curvature, estimator="exact")
    torch.testing.assert_close(total, exact, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(flat_gradient(total, module), flat_gradient(exact, module), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("network", NETWORKS[1:], ids=lambda network: network.__name__)
@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward"])
def test_unbiased_in_every_architecture(network, estimator):
    torch.set_default_dtype(torch.float64)
    net = network()
    x = net.x()
    y = torch.arange(net(x).shape[0]) % 4
    closure = lambda: F.cross_entropy(net(x), y)
    assert_unbiased(net, closure, estimator=estimator)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("loss", LOSS_OPTIONS)
def test_antithetic_error_falls_as_the_square_of_the_step(loss, curvature):
    """In the same directions the error against forward mode has slope 2 in a log-log fit."""
    net, closure = problem(loss=loss)
    steps = torch.tensor([0.2, 0.1, 0.05, 0.025])

    def penalty(estimator, step=0.1):
        generator = torch.Generator().manual_seed(3)
        value = explicit_penalty(closure, estimator=estimator, curvature=curvature, step_size=step, generator=generator)
        return torch.cat([value.detach()[None], flat_gradient(value, net)])

    truth = penalty("forward")
    for part in (slice(0, 1), slice(1, None)):
        errors = torch.stack([(penalty("antithetic", s.item()) - truth)[part].norm() for s in steps])
        x, y = steps.log(), errors.log()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        assert 1.9 < slope < 2.1


def test_default_step_is_accurate_to_a_percent():
    _, closure = problem()
    generator = lambda: torch.Generator().manual_seed(3)
    antithetic = explicit_penalty(closure, generator=generator())
    forward = explicit_penalty(closure, generator=generator(), estimator="forward")
    assert antithetic.item() == pytest.approx(forward.item(), rel=0.01)


@pytest.mark.parametrize("loss", LOSS_OPTIONS)
def test_recognized_losses_keep_their_value(loss):
    """Taking a loss apart must not change it."""
    from lightning_dropreg.passes import Off, run_pass

    _, closure = problem(loss=loss)
    plain = run_pass(closure, Off(), need_sites=False).loss
    recorded = run_pass(closure, Off(), record_losses=True)
    torch.testing.assert_close(recorded.loss, plain, rtol=1e-12, atol=1e-14)
    assert recorded.losses
