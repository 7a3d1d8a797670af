"""`functional.regularize`: loss, penalty, noise and their total from one set of passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dropreg.errors import (
    InvalidArgumentError,
    LossNotRecognizedError,
    NoDropoutSiteError,
    UnsupportedRowsError,
    UnsupportedSiteError,
)
from lightning_dropreg.estimators import ESTIMATORS, antithetic
from lightning_dropreg.functional import explicit_penalty, implicit_noise, plain_loss, regularize
from lightning_dropreg.numerics.noise import draw_key, fold_key, of_this_rank


class Problem:
    def __init__(self, norm=False):
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        layers = [nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(0.4)]
        self.net = nn.Sequential(*layers, nn.Linear(8, 2))
        self.x, self.y = torch.randn(12, 3), torch.arange(12) % 2
        self.calls = []

    def closure(self):
        self.calls.append(len(self.x))
        return F.cross_entropy(self.net(self.x), self.y)

    def rows(self, index):
        self.calls.append(len(index))
        return F.cross_entropy(self.net(self.x[index]), self.y[index])

    def gradient(self, value):
        return torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(value, list(self.net.parameters()), retain_graph=True)]
        )


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("curvature", ["loss_hessian", "identity", "loss_jacobian", "full"])
@pytest.mark.filterwarnings("ignore::lightning_dropreg.errors.UnboundedPenaltyWarning")
def test_it_is_the_sum_of_its_parts(estimator, curvature):
    p = Problem()
    options = dict(estimator=estimator, generator=seeded(), step_size=0.05)
    found = regularize(p.closure, curvature=curvature, strength=2.0, noise_strength=0.5, **options)
    penalty = explicit_penalty(p.closure, curvature=curvature, **{**options, "generator": seeded()})
    noise = implicit_noise(p.closure, **{**options, "generator": seeded()})
    torch.testing.assert_close(found.penalty, penalty)
    torch.testing.assert_close(found.noise, 0.5 * noise)
    torch.testing.assert_close(found.loss, plain_loss(p.closure), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.total, found.loss + 2 * penalty + 0.5 * noise)
    torch.testing.assert_close(p.gradient(found.total), p.gradient(found.loss + 2 * penalty + 0.5 * noise))


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, [12, 12]),
        ({"noise": False}, [12, 12]),
        ({"penalty": False}, [12, 12]),
        ({"penalty": False, "noise": False}, [12]),
        ({"strength": 0.0, "noise_strength": 0.0}, [12]),
        ({"curvature": "full"}, [12, 12, 12]),
        ({"estimator": "forward"}, [12]),
        ({"estimator": "double_backward"}, [12]),
        ({"batch_fraction": 0.25}, [3, 3, 12]),
        ({"batch_fraction": 0.25, "curvature": "full"}, [3, 3, 3, 12]),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::lightning_dropreg.errors.UnboundedPenaltyWarning")
def test_what_it_costs(options, passes):
    p = Problem()
    for _ in range(2):  # the first time, derivatives are compared with finite steps
        p.calls.clear()
        regularize(lambda: p.closure(), rows=p.rows, batch_size=12, **options).total.backward()  # noqa: PLW0108
    assert sorted(p.calls) == passes


@pytest.mark.parametrize(
    ("layer", "rows", "passes"),
    [
        (nn.Linear(4, 4), 32, [8, 8, 32]),
        (nn.Linear(4, 4), 31, [31, 31]),
        (nn.GRU(4, 4), 32, [32, 32]),
        (None, 32, [32, 32]),
    ],
    ids=["large enough", "few rows", "recurrent", "no module"],
)
def test_what_an_automatic_fraction_costs(layer, rows, passes, monkeypatch):
    monkeypatch.setattr("lightning_dropreg.inspection.choice.LITTLE_WORK", 0)
    x, w = torch.randn(rows, 4), torch.randn(4, 4, requires_grad=True)

    def on(numbers):
        calls.append(len(numbers))
        return nn.functional.mse_loss(nn.functional.dropout(x[numbers] @ w, 0.5), x[numbers])

    for _ in range(2):
        calls = []
        regularize(lambda: on(range(rows)), rows=on, batch_size=rows, batch_fraction="auto", module=layer)
    assert sorted(calls) == passes


def test_absent_parts_are_none():
    p = Problem()
    found = regularize(p.closure, penalty=False, noise=False)
    assert found.penalty is None
    assert found.noise is None
    assert torch.equal(found.total, plain_loss(p.closure))


def test_some_of_the_rows():
    """The loss of all rows exactly, and the estimate on the drawn ones, the noise scaled to the covariance of all."""
    p = Problem()
    seen = []

    def rows(index):
        seen.append(index)
        return p.rows(index)

    found = regularize(p.closure, batch_fraction=0.25, rows=rows, batch_size=12, generator=seeded())
    drawn = seen[-2:]  # before, halves were tried
    assert torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(found.loss, plain_loss(p.closure))
    how = dict(curvature="loss_hessian", noise=True, step_size=0.1, mask="as_model", key=draw_key(seeded()))
    alone = antithetic(lambda: p.rows(drawn[0]), **how)
    torch.testing.assert_close(found.penalty, alone.penalty)
    torch.testing.assert_close(found.noise, 0.5 * alone.noise)
    again = regularize(p.closure, batch_fraction=0.25, rows=rows, batch_size=12, generator=seeded(4))
    assert not torch.equal(drawn[0], seen[-1])
    assert again.penalty != found.penalty


def test_a_module_advances_once():
    p = Problem(norm=True)
    regularize(p.closure, module=p.net)
    assert p.net[1].num_batches_tracked == 1
    fresh = Problem(norm=True)
    fresh.closure()
    torch.testing.assert_close(p.net[1].running_mean, fresh.net[1].running_mean)


def test_the_global_random_state_moves_by_one_number():
    p = Problem()
    torch.manual_seed(5)
    draw_key(None)
    expected = torch.rand(3)
    torch.manual_seed(5)
    regularize(p.closure)
    assert torch.equal(torch.rand(3), expected)


def test_ranks_draw_different_noise_from_equal_seeds(monkeypatch):
    assert of_this_rank(7) == 7
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    assert of_this_rank(7) == fold_key(7, 2)


def test_what_is_refused():
    p = Problem()
    for options in (
        {"batch_fraction": 0.5},
        {"batch_fraction": 0.5, "batch_size": 12},
        {"batch_fraction": 0.5, "rows": p.rows},
        {"batch_fraction": 1.5, "rows": p.rows, "batch_size": 12},
        {"strength": -1.0},
        {"noise_strength": float("nan")},
        {"curvature": "none"},
        {"estimator": "none"},
        {"penalty": 1},
        {"module": 3},
    ):
        with pytest.raises(InvalidArgumentError):
            regularize(p.closure, **options)
    assert not p.calls
    with pytest.raises(LossNotRecognizedError):
        regularize(lambda: p.net(p.x).square().mean())
    negatives = lambda rows: F.cross_entropy(p.net(p.x[rows]) @ p.net(p.x[rows]).T, torch.arange(len(p.x[rows])))
    with pytest.raises(UnsupportedRowsError, match="depends on the other rows"):
        regularize(lambda: negatives(slice(None)), batch_fraction=0.5, rows=negatives, batch_size=12)
    normed = Problem(norm=True)
    with pytest.raises(UnsupportedRowsError, match="BatchNorm1d"):
        regularize(normed.closure, batch_fraction=0.5, rows=normed.rows, batch_size=12, module=normed.net)
    shared = lambda rows: F.cross_entropy(p.net(p.x[rows] @ F.dropout(torch.eye(3), 0.5)), p.y[rows])
    with pytest.raises(UnsupportedSiteError, match="All rows"):
        regularize(lambda: shared(slice(None)), batch_fraction=0.5, rows=shared, batch_size=12)
    regularize(lambda: shared(slice(None)), batch_fraction=0.5, rows=shared, batch_size=12, noise=False)
    with pytest.raises(NoDropoutSiteError):
        regularize(lambda: F.cross_entropy(p.net.eval()(p.x), p.y))
