"""Monte Carlo dropout and its first-order variance, against enumeration of all masks."""

import itertools
import math
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import make_loader, make_trainer
from own_modules import Predicting
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassCalibrationError

import lightning_dropreg as dr
from lightning_dropreg import errors
from lightning_dropreg.functional import find_sites
from lightning_dropreg.nn import WeightDrop
from lightning_dropreg.uncertainty import draw_predictions, first_order_variance, moments
from lightning_dropreg.uncertainty.figures import reliability, uncertainty_figure
from lightning_dropreg.uncertainty.mode import dropout_mode


class Head(nn.Module):
    """Dropout before a linear last layer, six entries for each example, so that all masks can be enumerated."""

    p = 0.4

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(3, 6), nn.Dropout(self.p), nn.Linear(6, 2)
        self.double()

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        return self.head(self.drop(self.features(x)))

    def enumerated(self, x):
        """Outputs under each of the 64 masks, with its probability: ``(64, N, 2)`` and ``(64,)``."""
        masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
        probability = (masks * (1 - self.p) + (1 - masks) * self.p).prod(1)
        return self.head(self.features(x) * masks[:, None] / (1 - self.p)).detach(), probability


def predict_example():
    torch.manual_seed(3)
    return Head().eval(), torch.randn(4, 3, dtype=torch.float64)


def test_first_order_variance_is_exact_for_a_linear_last_layer():
    net, x = predict_example()
    outputs, probability = net.enumerated(x)
    mean = torch.einsum("m,mnc->nc", probability, outputs)
    true = torch.einsum("m,mnc->nc", probability, (outputs - mean) ** 2)
    formula = 0.4 / 0.6 * net.features(x).square() @ net.head.weight.square().T
    torch.testing.assert_close(formula, true)
    for estimator in ("forward", "antithetic"):
        m = 20_000  # relative standard deviation below sqrt(2/m) = 1 %; 4.5 of them: 8 values, error below 1e-4
        found = first_order_variance(net, x, module=net, directions=m, chunk=2000, estimator=estimator)
        assert (found / true - 1).abs().max() < 4.5 * math.sqrt(2 / m)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(3, 4),
            nn.LSTM(4, 4, num_layers=2, dropout=0.2, batch_first=True),
            nn.Linear(4, 2),
        )
        self.drop = nn.Dropout(0.3)
        self.double()

    def forward(self, x, factors=None):
        h = torch.tanh(self.a(x))
        h = self.drop(h) if factors is None else h * factors[0]
        return torch.tanh(self.c(self.b(h)[0][:, -1]))


def test_first_order_variance_is_the_jacobians():
    """One row, one site: ``sum c J diag(h^2) J^T`` from the full Jacobian; forward mode and pair agree."""
    net = Deep().eval()
    net.b.dropout = 0.0
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda f: net(x, [f]), torch.ones(1, 2, 4, dtype=torch.float64))
    exact = 0.3 / 0.7 * jacobian.flatten(2).square().sum(-1)
    found = first_order_variance(net, x, module=net, directions=20_000, chunk=2000)
    assert (found / exact - 1).abs().max() < 4.5 * math.sqrt(2 / 20_000)
    net.b.dropout = 0.2
    pair = first_order_variance(net, x, module=net, estimator="antithetic", step_size=1e-4)
    torch.testing.assert_close(first_order_variance(net, x, module=net), pair, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk", [1, 500])
def test_draws_have_the_distribution_of_the_masks(chunk):
    net, x = predict_example()
    outputs, probability = net.enumerated(x)
    mean = torch.einsum("m,mnc->nc", probability, outputs)
    second = torch.einsum("m,mnc->nc", probability, (outputs - mean) ** 2)
    fourth = torch.einsum("m,mnc->nc", probability, (outputs - mean) ** 4)
    count = 2000
    calls = []
    draws = draw_predictions(lambda b: (calls.append(0), net(b))[1], x, module=net, passes=count, chunk=chunk)
    # 8 means and 8 variances within 4.5 standard deviations: error below 2e-4
    assert ((draws.mean(0) - mean).abs() < 4.5 * (second / count).sqrt()).all()
    assert ((draws.var(0) - second).abs() < 4.5 * ((fourth - second**2) / count).sqrt()).all()
    assert len(calls) == (count if chunk == 1 else 4 + 2)  # the two that tell whether rows may be repeated
    # every draw and every example has masks of its own
    centred = (draws - mean) / second.sqrt()
    lag = (centred[1:] * centred[:-1]).mean(0)
    across = (centred[:, 1:] * centred[:, :-1]).mean(0)
    assert torch.cat([lag, across]).abs().max() < 4.5 / math.sqrt(count)


def test_batch_norm_stays_in_evaluation():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.0)).eval()
    x = 5 + torch.randn(4, 3)
    assert torch.equal(draw_predictions(net, x, module=net, passes=2, chunk=1), torch.stack([net(x)] * 2))


class Branching(nn.Module):
    """Two dropout layers, a functional dropout, and a branch of the user's own for training."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5))
        self.rnn = WeightDrop(nn.GRU(5, 4, batch_first=True), "weight_hh_l0", 0.5)
        self.double()

    def forward(self, x):
        h = F.dropout(self.body(x), 0.5, self.training)
        return self.rnn(h)[0] + (100 if self.training else 0)


@pytest.mark.parametrize(
    ("training", "sites", "branch"),
    [("all", [0.5, 0.5, 0.5], True), ("dropout", [0.5, 0.5], False), (["body.1"], [0.5], False), ([""], [0.5], True)],
)
def test_branches_for_training_run_where_that_is_asked_for(training, sites, branch):
    net, x = Branching().eval(), torch.randn(4, 2, 3, dtype=torch.float64)
    modes = [module.training for module in net.modules()]
    with dropout_mode(net, training):
        assert [site.p for site in find_sites(lambda: net(x).sum())] == sites
    assert [module.training for module in net.modules()] == modes
    draws = draw_predictions(net, x, module=net, passes=3, training=training)
    assert (draws.mean() > 50) == branch
    assert len({float(draw.sum()) for draw in draws}) == 3
    first_order_variance(net, x, module=net, directions=2, training=training, estimator="antithetic")
    with pytest.raises(errors.UnsupportedModuleError, match="path like 'head'"):
        draw_predictions(net, x, module=net, training=["head"])


class Shared(nn.Module):
    """DropConnect: one mask of the weight for all rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return x @ dr.drop(self.weight, 0.5, training=self.training).T


class Mixing(Shared):
    """Rows that depend on each other."""

    def forward(self, x):
        return F.dropout(x - x.std(0), 0.5, self.training)


class Carrying(Shared):
    """A state with rows of its own."""

    def __init__(self):
        super().__init__()
        self.state = torch.zeros(4, 3)

    def forward(self, x):
        self.state = self.state + F.dropout(x, 0.5, self.training)
        return self.state


@pytest.mark.parametrize("make", [Shared, Mixing, Carrying])
def test_rows_are_repeated_only_where_that_is_right(make):
    net = make().eval()
    state = {k: v for k, v in net.__dict__.items() if isinstance(v, torch.Tensor)}
    x = torch.randn(4, 3)
    draws = draw_predictions(net, x, module=net, passes=6, chunk=3)
    assert torch.equal(draws, draw_predictions(net, x, module=net, passes=6, chunk=1))
    assert len({float(draw.sum()) for draw in draws}) == 6
    assert all(net.__dict__[k] is v for k, v in state.items())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_less_at_once_where_memory_runs_out(error):
    class Large(Head):
        def forward(self, x):
            if len(x) > 12:
                raise error
            return super().forward(x)

    net, x = Large().eval(), torch.randn(4, 3, dtype=torch.float64)
    assert draw_predictions(net, x, module=net, passes=11, chunk=9).shape == (11, 4, 2)
    with pytest.raises(type(error)):
        draw_predictions(net, torch.randn(13, 3, dtype=torch.float64), module=net, passes=2)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "none"])
def test_moments(likelihood):
    draws = torch.randn(7, 5, 3, dtype=torch.float64)
    found = moments(draws, likelihood)
    if likelihood == "none":
        assert found.entropy is found.mutual_information is None
        torch.testing.assert_close(found.mean, draws.mean(0))
        return
    make = torch.distributions.Categorical if likelihood == "categorical" else torch.distributions.Bernoulli
    each = make(logits=draws)
    mixture = make(probs=each.probs.mean(0))
    torch.testing.assert_close(found.mean, mixture.probs)
    torch.testing.assert_close(found.variance, each.probs.var(0))
    torch.testing.assert_close(found.entropy, mixture.entropy())
    # the mean divergence of the draws from their mixture
    divergence = torch.distributions.kl_divergence(each, make(probs=mixture.probs.expand_as(each.probs))).mean(0)
    torch.testing.assert_close(found.mutual_information, divergence)


def test_moments_of_images():
    draws = torch.randn(3, 2, 4, 5, 5)
    found, moved = moments(draws, class_dim=1), moments(draws.movedim(2, -1))
    torch.testing.assert_close(found.mean, moved.mean.movedim(-1, 1))
    torch.testing.assert_close(found.mutual_information, moved.mutual_information)


def traces(model):
    return [*model.state_dict().values(), model.seen, model.calibration.compute(), torch.get_rng_state()]


def predict(model, *callbacks, seed=1):
    L.seed_everything(seed, verbose=False)
    return make_trainer(callbacks).predict(model, [make_loader(), make_loader(6, 3, seed=2)])


@pytest.mark.parametrize("make", [dict, lambda: {"first_order": 4}, lambda: {"chunk": 1}])
def test_predict_leaves_the_traces_of_one_call(make):
    plain, model = Predicting(), Predicting()
    model.load_state_dict(plain.state_dict())
    expected = predict(plain)
    before = traces(plain)
    modes = [m.training for m in model.modules()]
    found = predict(model, dr.MonteCarloDropout(4, **make()))
    torch.testing.assert_close([[p.outputs for p in loader] for loader in found], expected, rtol=0, atol=0)
    torch.testing.assert_close(traces(model), before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert "predict_step" not in model.__dict__


def test_predictions_come_from_the_seed():
    model = Predicting()
    one, again, other = (predict(model, dr.MonteCarloDropout(4), seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one[0][0].mean, other[0][0].mean)
    named = predict(model, dr.MonteCarloDropout(4, seed=1), seed=5)
    torch.testing.assert_close(one, named, rtol=0, atol=0)
    assert one[0][0].mean.shape == (6, 3)
    torch.testing.assert_close(one[0][0].mean.sum(1), torch.ones(6, dtype=torch.float64))
    assert all((p.variance.sum() > 0) & (p.mutual_information <= p.entropy).all() for loader in one for p in loader)


def test_fields_of_a_prediction():
    found = predict(Predicting(lambda z: {"logits": z, "x": 1}), dr.MonteCarloDropout(4))
    named = predict(Predicting(lambda z: {"z": z}), dr.MonteCarloDropout(4, output="z"))
    numbered = predict(Predicting(lambda z: (z.argmax(1), z)), dr.MonteCarloDropout(4, output=1))
    attribute = predict(Predicting(lambda z: SimpleNamespace(logits=z)), dr.MonteCarloDropout(4))
    assert {p[0][0].mean.shape for p in (found, named, numbered, attribute)} == {(6, 3)}
    with pytest.raises(errors.InvalidArgumentError, match="output='z', but predict_step returned a dict .* fields w"):
        predict(Predicting(lambda z: {"w": z}), dr.MonteCarloDropout(4, output="z"))
    model = Predicting(lambda z: z.argmax(1))
    with pytest.raises(errors.InvalidArgumentError, match="Tensor of shape"):
        predict(model, dr.MonteCarloDropout(4))
    assert "predict_step" not in model.__dict__


def test_nothing_to_draw():
    class Plain(Predicting):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Identity()

    with pytest.raises(errors.NoDropoutSiteError, match="nothing to draw"):
        predict(Plain(), dr.MonteCarloDropout())


def test_arguments():
    for wrong in (
        {"passes": 1},
        {"chunk": 0},
        {"likelihood": "normal"},
        {"first_order": -1},
        {"estimator": "exact"},
        {"training": "some"},
        {"output": 1.5},
    ):
        with pytest.raises(errors.InvalidArgumentError, match=next(iter(wrong))):
            dr.MonteCarloDropout(**wrong)


def test_transformer_encoder_drops_in_evaluation():
    """Its fast path in evaluation mode would run past all dropout."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True).eval()

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.net(x).mean(1)

    loader = DataLoader(torch.randn(6, 5, 8), batch_size=3)
    found = make_trainer([dr.MonteCarloDropout(64, likelihood="none", first_order=64)]).predict(Model(), loader)
    ratio = (
        torch.cat([p.first_order_variance for p in found]).mean() / torch.cat([p.output_variance for p in found]).mean()
    )
    assert 0.5 < ratio < 1.5  # q is not small; to first order they agree


def test_figure_shows_what_was_found(tmp_path, monkeypatch):
    target = torch.randint(3, (500,))
    p = (torch.randn(500, 3) + 2 * F.one_hot(target, 3)).softmax(1)
    error = MulticlassCalibrationError(3, n_bins=10)(p, target)
    confidence, accuracy, count = reliability(p, target, 10)
    torch.testing.assert_close((count / 500 * (confidence - accuracy).abs()).sum(), error)
    variance = torch.rand(500, 3) + 0.1
    figure = uncertainty_figure({"plain": p, "mean": p.sqrt()}, target, variance, 2 * variance)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0] == f"plain (ECE {error:.3f})"
    assert "outputs: 0.50 of" in figure.axes[1].get_title()
    figure.savefig(tmp_path / "figure.svg")
    with pytest.raises(errors.InvalidArgumentError, match="shapes"):
        uncertainty_figure({"plain": p}, target, variance, variance[:3])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingDependencyError, match=r"lightning-dropreg\[plot\]"):
        uncertainty_figure({"plain": p}, target)


def test_a_prediction_is_short_to_read_and_a_dictionary():
    from lightning_dropreg.callbacks.monte_carlo import MonteCarloPrediction

    found = MonteCarloPrediction(torch.ones(5, 3), torch.ones(5, 3), torch.ones(5, 3), None, None, torch.ones(5), None)
    assert repr(found) == "MonteCarloPrediction(outputs 5 × 3, mean 5 × 3, variance 5 × 3, output_variance 5)"
    assert found.to_dict().keys() == {"outputs", "mean", "variance", "output_variance"}
