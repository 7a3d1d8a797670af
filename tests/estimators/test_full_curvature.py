"""``curvature="full"``: half the second derivative of the loss itself, against the full Hessian in the activations.

The statistical tests draw with fixed seeds and ask the mean to lie within four standard errors, in one direction of
the gradient and in value: a right implementation fails each of its 22 comparisons with probability 6e-5.
"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from agreement import gradients
from loss_table import LOSS_OPTIONS
from networks import MLP, NETWORKS, flat_gradient, variances
from torch import nn

from lightning_dropreg.errors import KinkedNetworkWarning, LossNotRecognizedError, UnboundedPenaltyWarning
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.functional import explicit_penalty

pytestmark = pytest.mark.filterwarnings("ignore::lightning_dropreg.errors.UnboundedPenaltyWarning")

UNKNOWN = {
    "l1": lambda z: F.l1_loss(z, torch.zeros_like(z)),
    "squared hinge": lambda z: F.softplus(1 - z[:, :1] + z[:, 1:]).square().mean(),
    "cosine": lambda z: F.cosine_embedding_loss(z[:, :2], z[:, 2:], torch.ones(len(z))),
    "triplet": lambda z: F.triplet_margin_loss(z[:, :2], z[:, 1:3], z[:, 2:], margin=9.0),
    "contrastive": lambda z: F.cross_entropy(F.normalize(z) @ F.normalize(z).T / 0.3, torch.arange(len(z))),
    "focal": lambda z: (1 - z.softmax(-1)[:, 0]).square().mul(-z.log_softmax(-1)[:, 0]).mean(),
    "ratio": lambda z: z.square().sum() / (1 + z.abs().sum()),
    "power of a loss": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4) ** 2,
    "cross entropy and a penalty on activations": lambda z: (
        F.cross_entropy(z, torch.arange(len(z)) % 4) + 0.1 * z.square().mean()
    ),
}
ANY_LOSS = LOSS_OPTIONS | UNKNOWN


def half_trace(net, x, loss):
    """``1/2 sum_i c_i <d2 L/dh_i2, diag(h_i^2)>``, entry by entry, with nothing of the package in it."""
    ones = [torch.ones(shape, requires_grad=True) for shape in net.mask_shapes()]
    slopes = torch.autograd.grad(loss(net(x, list(ones))), ones, create_graph=True)
    return sum(
        c / 2 * torch.autograd.grad(entry, factor, create_graph=True)[0].reshape(-1)[number]
        for c, factor, slope in zip(variances(net), ones, slopes)
        for number, entry in enumerate(slope.reshape(-1))
    )


def problem(network=MLP):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = network()
    return net, net.x()


@pytest.mark.parametrize("loss", ANY_LOSS)
def test_exact_is_the_trace_of_the_full_hessian(loss):
    net, x = problem()
    truth = half_trace(net, x, ANY_LOSS[loss])
    ours = explicit_penalty(lambda: ANY_LOSS[loss](net(x)), curvature="full", estimator="exact")
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat_gradient(ours, net), flat_gradient(truth, net), rtol=1e-8, atol=1e-11)


class Normed(MLP):
    """With norms behind its sites, whose third derivatives torch has wrong."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(3), nn.BatchNorm1d(4, track_running_stats=False)])

    def forward(self, x, factors=None):
        h = self.drop(torch.tanh(self.a(x)), factors, self.ps[0])
        h = self.drop(self.norms[0](self.b(h)), factors, self.ps[1])
        return self.norms[1](self.c(h))


@pytest.mark.parametrize("network", [*NETWORKS[1:], Normed], ids=lambda network: network.__name__)
def test_exact_in_every_architecture(network):
    """Value against the Hessian, gradient against finite differences of the value."""
    net, x = problem(network)
    loss = lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4)
    value = lambda: explicit_penalty(lambda: loss(net(x)), curvature="full", estimator="exact")
    torch.testing.assert_close(value(), half_trace(net, x, loss), rtol=1e-9, atol=1e-12)
    gradient = flat_gradient(value(), net)
    direction, step = torch.randn(len(gradient)), 1e-5
    ends = []
    for sign in (1, -1):
        vector = nn.utils.parameters_to_vector(net.parameters()).detach()
        nn.utils.vector_to_parameters(vector + sign * step * direction, net.parameters())
        ends.append(value().item())
        nn.utils.vector_to_parameters(vector, net.parameters())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient @ direction).item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss", ANY_LOSS)
def test_all_estimators_see_the_same_directions(loss):
    net, x = problem()
    seen = [
        ESTIMATORS[name](
            lambda: ANY_LOSS[loss](net(x)), curvature="full", noise=True, step_size=1e-3, mask="as_model", key=4
        )
        for name in ("double_backward", "forward", "antithetic")
    ]
    for other, rtol in zip(seen[1:], (1e-9, 1e-3)):
        for part in ("loss", "penalty", "noise"):
            a, b = getattr(seen[0], part), getattr(other, part)
            torch.testing.assert_close(b, a, rtol=rtol, atol=1e-3 * rtol)
            torch.testing.assert_close(*(gradients(v, list(net.parameters())) for v in (b, a)), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("network", [*NETWORKS, Normed], ids=lambda network: network.__name__)
def test_the_mean_over_directions_is_exact(network):
    net, x = problem(network)
    closure = lambda: F.cross_entropy(net(x), torch.arange(len(net(x))) % 4)
    exact = explicit_penalty(closure, curvature="full", estimator="exact")
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(sum(p.numel() for p in net.parameters()))
    draws = []
    for _ in range(200):
        value = explicit_penalty(closure, curvature="full", step_size=1e-2, generator=generator)
        draws.append(torch.stack([value.detach(), flat_gradient(value, net) @ direction]))
    sample = torch.stack(draws)
    expected = torch.stack([exact.detach(), flat_gradient(exact, net) @ direction])
    error = (sample.mean(0) - expected).abs() - 1e-3 * expected.abs()
    assert (error <= 4 * sample.std(0) / math.sqrt(len(sample))).all()


def test_the_error_falls_as_the_square_of_the_step():
    net, x = problem()

    def penalty(step, estimator="antithetic"):
        generator = torch.Generator().manual_seed(3)
        closure = lambda: F.cross_entropy(net(x), torch.arange(5) % 4)
        return explicit_penalty(
            closure, curvature="full", estimator=estimator, step_size=step, generator=generator
        ).item()

    truth = penalty(0.1, "double_backward")
    errors = [abs(penalty(step) - truth) for step in (0.1, 0.05)]
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.3)
    assert errors[0] < 0.02 * abs(truth)


def test_it_is_gauss_newton_where_the_network_behind_the_site_is_linear():
    """Then the term that (4.3) drops is zero."""
    torch.set_default_dtype(torch.float64)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 4))
    closure = lambda: F.cross_entropy(net(torch.ones(5, 3)), torch.arange(5) % 4)
    full, gauss_newton = (
        explicit_penalty(closure, curvature=curvature, estimator="exact") for curvature in ("full", "loss_hessian")
    )
    torch.testing.assert_close(full, gauss_newton)


def test_three_passes_and_no_recognized_loss():
    net, x = problem()
    calls = []

    def closure():
        calls.append(1)
        return UNKNOWN["ratio"](net(x))

    explicit_penalty(closure, curvature="full")
    calls.clear()  # the first time, kinks are looked for
    explicit_penalty(closure, curvature="full")
    assert len(calls) == 3
    with pytest.raises(LossNotRecognizedError):
        explicit_penalty(closure)


def test_it_can_be_negative_and_says_so():
    w = torch.tensor([1.0], requires_grad=True)
    x = torch.ones(1, 1)
    closure = lambda: -(F.dropout(x, 0.5) * w).square().sum()
    with pytest.warns(UnboundedPenaltyWarning, match="DivergenceDetector"):
        assert explicit_penalty(closure, curvature="full", estimator="exact").item() == -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explicit_penalty(lambda: F.mse_loss(F.dropout(x, 0.5) * w, x))


@pytest.mark.parametrize("name", ["ctc", "multi margin"])
def test_the_pair_needs_no_second_derivative_of_any_operation(name):
    """Losses that torch cannot differentiate twice, against second differences of the loss entry by entry."""
    net, x = problem()
    loss = {
        "ctc": lambda z: F.ctc_loss(z.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), [len(z)], [2]),
        "multi margin": lambda z: F.multi_margin_loss(z, torch.arange(len(z)) % 4, p=2, margin=3.0),
    }[name]
    shapes, step, truth = net.mask_shapes(), 1e-3, 0.0
    clean = loss(net(x, [torch.ones(shape) for shape in shapes])).item()
    for site, (c, shape) in enumerate(zip(variances(net), shapes)):
        for entry in range(math.prod(shape)):
            for sign in (1, -1):
                factors = [torch.ones(s) for s in shapes]
                factors[site].view(-1)[entry] += sign * step
                truth += c / 2 * (loss(net(x, factors)).item() - clean) / step**2
    generator = torch.Generator().manual_seed(1)
    value = lambda: explicit_penalty(lambda: loss(net(x)), curvature="full", step_size=1e-2, generator=generator)
    sample = torch.stack([value().detach() for _ in range(400)])
    assert abs(sample.mean().item() - truth) < 4 * sample.std().item() / 20 + 1e-3 * abs(truth)


def test_kinks_are_told():
    """There a second difference counts every kink between its ends with one over the step."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    closure = lambda: F.cross_entropy(net(torch.ones(6, 3)), torch.arange(6) % 2)
    with pytest.warns(KinkedNetworkWarning, match="relu"):
        explicit_penalty(closure, curvature="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", KinkedNetworkWarning)
        explicit_penalty(closure, curvature="full")  # once is enough
        for estimator in ("forward", "double_backward", "exact"):
            explicit_penalty(closure, curvature="full", estimator=estimator)


def test_a_loss_that_is_linear_in_the_noise_has_none():
    w = torch.tensor([2.0], requires_grad=True)
    x = torch.ones(1, 1)
    for estimator in ESTIMATORS:
        value = explicit_penalty(lambda: F.dropout(x, 0.5) @ w, curvature="full", estimator=estimator)
        assert abs(value.item()) < 1e-5
        value.backward()
