"""The instruments against exhaustive enumeration of the dropout masks of a small network, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from networks import Net, flat_gradient
from torch import nn

from lightning_dropreg.diagnostics import measure_effect, measure_noise, measure_penalty
from lightning_dropreg.diagnostics.directions import DropoutDirections
from lightning_dropreg.diagnostics.effect import EffectProbe
from lightning_dropreg.diagnostics.noise import measure_batch_noise
from lightning_dropreg.diagnostics.sketch import sketch
from lightning_dropreg.diagnostics.statistics import jackknife_interval, mean_interval, student_quantile
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.estimators.curvature import OF_OUTPUTS
from lightning_dropreg.functional import explicit_penalty
from lightning_dropreg.passes import Directions

SIGMAS = 5  # a fixed seed, and by the normal law one failure in a million if the seed is changed


class Tiny(Net):
    """Two sites of four mask entries: 256 pairs of masks."""

    ps = (0.3, 0.4)
    outputs = 3
    shape = (2, 2)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, self.outputs)

    def forward(self, x, factors=None):
        h = self.drop(torch.tanh(2 * self.a(x)), factors, self.ps[0])
        h = self.drop(torch.tanh(2 * self.b(h)), factors, self.ps[1])
        return 2 * self.c(h)


class Enumerated(DropoutDirections):
    """Given masks instead of drawn ones."""

    def __init__(self, noises):
        super().__init__(0)
        self.noises = list(noises)

    def _sample(self, site, dtype, generator):
        return self.noises.pop(0)


@pytest.fixture
def problem():
    torch.set_default_dtype(torch.float64)
    net, x, y = Tiny(), torch.randn(2, 3), torch.tensor([0, 2])
    return net, x, y, lambda: F.cross_entropy(net(x), y)


def masks(q):
    """All noises of one site with their probabilities."""
    for kept in itertools.product((0.0, 1.0), repeat=4):
        m = torch.tensor(kept, dtype=torch.float64).reshape(Tiny.shape)
        yield m / (1 - q) - 1, q ** (4 - sum(kept)) * (1 - q) ** sum(kept)


def both_sites(ps=Tiny.ps):
    for (a, pa), (b, pb) in itertools.product(masks(ps[0]), masks(ps[1])):
        yield (a, b), pa * pb


def loss_at(net, x, y, *noises):
    return F.cross_entropy(net(x, [1 + noise for noise in noises]), y)


def true_effects(net, x, y, ps=Tiny.ps):
    """``R_drop`` of both sites, of the first and of the second alone."""
    zero = torch.zeros(Tiny.shape)
    with torch.no_grad():
        clean = loss_at(net, x, y, zero, zero)
        together = sum(p * loss_at(net, x, y, *noises) for noises, p in both_sites(ps)) - clean
        first = sum(p * loss_at(net, x, y, a, zero) for a, p in masks(ps[0])) - clean
        second = sum(p * loss_at(net, x, y, zero, b) for b, p in masks(ps[1])) - clean
    return torch.stack([together, first, second])


def test_the_mean_over_all_masks_is_truth_and_approximation(problem):
    net, x, y, closure = problem
    probe = EffectProbe(closure)
    mean = sum(p * probe.measure(Enumerated(noises)) for noises, p in both_sites())
    torch.testing.assert_close(mean[:, 0], true_effects(net, x, y))
    for column, curvature in enumerate(OF_OUTPUTS, start=2):
        exact = explicit_penalty(closure, curvature=curvature, estimator="exact").item()
        assert mean[0, column].item() == pytest.approx(exact, rel=1e-4)
        assert mean[1:, column].sum().item() == pytest.approx(exact, rel=1e-4)  # additive over sites
    zero = (torch.zeros(Tiny.shape), torch.zeros(Tiny.shape))
    hessian = torch.autograd.functional.hessian(lambda *noises: loss_at(net, x, y, *noises), zero)
    bends = [hessian[i][i].reshape(4, 4).trace() / 2 * q / (1 - q) for i, q in enumerate(Tiny.ps)]
    torch.testing.assert_close(mean[:, 1], torch.stack([sum(bends), *bends]), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("drop_prob", [None, 0.15])
def test_measured_effects_cover_the_truth(problem, drop_prob):
    net, x, y, closure = problem
    ps = Tiny.ps if drop_prob is None else (drop_prob, drop_prob)
    report = measure_effect(closure, draws=300, drop_prob=drop_prob, generator=torch.Generator().manual_seed(1))
    truth = true_effects(net, x, y, ps)
    factor = SIGMAS / student_quantile(0.95, 299)
    for site, value in zip((None, 0, 1), truth):
        assert abs(report.truth(site).value - value) < factor * report.truth(site).margin
        parts = report.left_out(site).value + report.higher_orders(site).value
        assert parts == pytest.approx(report.remainder(site).value)
        assert report.truth(site).value - report.approximation(site=site).value == pytest.approx(parts)
    interaction = truth[0] - truth[1:].sum()
    assert abs(report.interaction().value - interaction) < factor * report.interaction().margin
    assert abs(report.share(0).value - truth[1] / truth[1:].sum()) < factor * report.share(0).margin
    assert sum(report.share(site).value for site in (0, 1)) == pytest.approx(1)


def test_the_first_order_term_cuts_the_spread(problem):
    net, x, y, closure = problem
    report = measure_effect(closure, draws=100, per_site=False)
    raw = [loss_at(net, x, y, *noises).item() for noises, p in both_sites()]
    weights = [p for _, p in both_sites()]
    mean = sum(w * v for w, v in zip(weights, raw))
    spread = math.sqrt(sum(w * (v - mean) ** 2 for w, v in zip(weights, raw)))
    assert report.samples[:, 0, 0].std() < spread / 2
    assert report.sites == ()


def test_measured_noise_covers_the_covariances(problem):
    net, x, y, closure = problem
    gradients = torch.stack([flat_gradient(loss_at(net, x, y, *noises), net) for noises, _ in both_sites()])
    p = torch.tensor([p for _, p in both_sites()])
    signal = p @ gradients
    drop = (gradients - signal).T @ (p[:, None] * (gradients - signal))
    zero = [torch.zeros(Tiny.shape, requires_grad=True) for _ in Tiny.ps]
    slopes = torch.autograd.grad(loss_at(net, x, y, *zero), zero, create_graph=True)
    rows = [math.sqrt(q / (1 - q)) * flat_gradient_kept(v, net) for s, q in zip(slopes, Tiny.ps) for v in s.reshape(-1)]
    approx = torch.stack(rows).T @ torch.stack(rows)

    # (the alignment is a ratio near its largest value, 1: of six seeds one was beyond what the normal law says)
    report = measure_noise(closure, net, draws=300, generator=torch.Generator().manual_seed(3))
    factor = SIGMAS / student_quantile(0.95, 299)

    def check(found, true, precise=0.5):
        assert abs(found.value - true) < factor * found.margin
        assert found.margin < precise * abs(true)

    assert report.layers == ("a", "b", "c")
    ends = [0, 8, 14, 23]
    for layer, (i, j) in zip((None, 0, 1, 2), ((0, 23), *itertools.pairwise(ends))):
        check(report.trace_drop(layer), drop[i:j, i:j].trace())
        check(report.trace_approx(layer), approx[i:j, i:j].trace())
        check(report.signal_to_noise(layer), signal[i:j].square().sum() / drop[i:j, i:j].trace(), precise=3)
        ours, theirs = drop[i:j, i:j], approx[i:j, i:j]
        check(report.alignment(layer), (ours * theirs).sum() / (ours.norm() * theirs.norm()))
    check(report.trace_ratio(), approx.trace() / drop.trace())
    assert not report.sketched
    assert all(parameter.grad is None for parameter in net.parameters())


def test_noise_of_drawing_batches_covers_that_of_the_rows(problem):
    """Batches of one row each, of a linear loss in which the gradient is the row: the trace of the rows' covariance."""
    x = torch.randn(4000, 3) * torch.tensor([1.0, 2.0, 3.0])
    layer = nn.Linear(3, 1, bias=False)
    closures = [lambda row=row: layer(F.dropout(row, 0.5, layer.training)).sum() for row in x]
    found = measure_batch_noise(closures, layer, confidence=0.999)
    assert abs(found.value - 14) < found.margin < 2
    assert layer.weight.grad is None


def flat_gradient_kept(value, net):
    found = torch.autograd.grad(value, list(net.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(net.parameters(), found)])


def test_a_sketch_keeps_inner_products():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 20_000, generator=g, dtype=torch.float64)
    x, y = 1 + x, 1 + x + y  # one sign: entries that fall on one another do not cancel by themselves
    width = 2003
    a, b = (sketch([v[:7000].reshape(70, 100), v[7000:]], width) for v in (x, y))
    error = (a @ b - x @ y) / (x.norm() * y.norm())
    assert 0 < abs(error) < SIGMAS / math.sqrt(width)


def test_what_sketches_add_to_the_alignment_is_taken_off(monkeypatch):
    """Noise ±1 in 40 of 5,000 entries: what short sketches make of ``tr(Sigma^2) = 40``, and what is made of that."""
    monkeypatch.setattr("lightning_dropreg.diagnostics.noise.SKETCH_WIDTH", 61)
    monkeypatch.setattr("lightning_dropreg.diagnostics.noise.sketch", lambda g, seed: sketch(g, 61, seed))
    torch.manual_seed(4)
    layer = nn.Linear(5000, 1, bias=False).double()
    x = torch.zeros(5000, dtype=torch.float64)
    x[:40] = 1

    report = measure_noise(lambda: layer(F.dropout(x, 0.5)).sum(), layer, draws=64)
    assert report.sketched
    found = report.alignment()
    assert abs(found.value - 1) < SIGMAS / 1.96 * found.margin
    assert found.margin < 0.5
    raw = report.products[0].square()
    own = (raw[0].sum() - raw[0].diagonal().sum()) / (64 * 63)
    squares = report._squared_products(0)[0]
    corrected = (squares.sum() - squares.diagonal().sum()) / (64 * 63)
    assert own > 50  # 1600 / 61 too much
    assert abs(corrected - 40) < 10


@pytest.mark.parametrize("options", [{}, {"estimator": "forward", "mask": "elementwise"}, {"step_size": 0.5}])
def test_what_is_trained_with_is_measured(problem, options):
    """Penalty and noise of a configuration: means over draws of what its estimator gives."""
    net, _, _, closure = problem
    name, step_size, mask = {"estimator": "antithetic", "step_size": 0.1, "mask": "as_model", **options}.values()
    estimate = ESTIMATORS[name]
    penalty = measure_penalty(closure, draws=200, strength=3.0, curvature="identity", module=net, **options)
    noise = measure_noise(closure, net, draws=200, **options)
    estimates = [
        estimate(closure, curvature="identity", noise=True, key=key, step_size=step_size, mask=mask)
        for key in range(200)
    ]
    penalties = torch.stack([found.penalty.detach() for found in estimates])
    traces = torch.stack([flat_gradient(found.noise, net).square().sum() for found in estimates])
    for found, samples in ((penalty.value(), penalties), (noise.trace_approx(), traces)):
        other = mean_interval(samples)
        assert abs(found.value - other.value) < SIGMAS / 1.96 * math.hypot(found.margin, other.margin)
    assert (noise.estimator, noise.step_size, noise.mask) == (name, step_size, mask)
    assert (penalty.strength, penalty.curvature) == (3.0, "identity")


def test_without_a_known_loss_the_truth_is_still_measured(problem):
    net, x, _, _ = problem
    report = measure_effect(lambda: net(x).cosh().sum(), draws=4)
    assert "loss functions" in report.problem
    assert math.isfinite(report.truth().value)
    assert math.isnan(report.remainder().value)


def test_the_module_and_the_random_state_are_left_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    closure = lambda: F.mse_loss(net(x), torch.zeros(6, 2))
    generator = torch.Generator().manual_seed(1)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    measure_effect(closure, draws=4, generator=generator, module=net)
    measure_noise(closure, net, draws=4, generator=generator)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "options", [{"draws": 3}, {"draws": 8.0}, {"confidence": 95}, {"drop_prob": 1.0}, {"step_size": 0}]
)
def test_arguments_out_of_range(problem, options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        measure_effect(problem[3], **options)


@pytest.mark.parametrize(
    ("degrees", "tabulated"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (30, 2.042), (10**6, 1.960)]
)
def test_student_quantiles_are_those_of_the_tables(degrees, tabulated):
    assert student_quantile(0.95, degrees) == pytest.approx(tabulated, rel=0.01)


def test_intervals_cover_as_often_as_they_say():
    g = torch.Generator().manual_seed(4)
    samples = 3 + torch.randn(1000, 6, generator=g, dtype=torch.float64)
    covered = sum(abs(found.value - 3) <= found.margin for found in map(mean_interval, samples))
    assert abs(covered - 950) < SIGMAS * math.sqrt(1000 * 0.95 * 0.05)
    # the jackknife of a mean is the interval of the mean
    mean, jackknifed = mean_interval(samples[0]), jackknife_interval(lambda j: samples[0][j].mean(), 6)
    assert jackknifed.margin == pytest.approx(mean.margin)


def test_directions_are_dropout():
    from lightning_dropreg.interception.sites import Site

    site = Site("", 0.25, (40, 500), (40, 500), "dropout")
    eta = DropoutDirections(1).draw(site, torch.zeros(1, dtype=torch.float64))
    assert eta.unique().tolist() == pytest.approx([-1, 1 / 3])
    assert abs(eta.mean()) < SIGMAS * math.sqrt(site.variance / eta.numel())
    assert isinstance(DropoutDirections(1), Directions)
