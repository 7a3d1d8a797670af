"""A finite step that is too wide is said before training; one that is small enough is not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.errors import WideStepWarning
from lightning_dropreg.functional import explicit_penalty
from lightning_dropreg.inspection.step_width import TOLERANCE, measure_step


def network(norm=False, act=nn.Tanh, p=0.3):
    layers = [nn.Linear(4, 16), act(), nn.Dropout(p), nn.Linear(16, 16), nn.BatchNorm1d(16) if norm else nn.Identity()]
    return nn.Sequential(*layers, act(), nn.Linear(16, 3)).double()


class Behind(Classifier):
    """Batch norm behind dropout."""

    def __init__(self, p=0.3, norm=True, act=nn.Tanh):
        super().__init__(p)
        self.net = network(norm, act, p)


METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "penalty": lambda: [dr.ExplicitPenalty(estimator="antithetic")],
    "full": lambda: [dr.ExplicitPenalty(curvature="full")],
    "noise": lambda: [dr.ImplicitNoise()],
}


def wide_steps(callbacks, rows, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = make_loader(n=4 * rows, batch_size=rows)
        train(callbacks, make=Behind, loader=loader, model_options=options)
    return [str(each.message) for each in caught if each.category is WideStepWarning]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [2, 3])
def test_batch_norm_over_few_rows_is_said_once(method, rows):
    (said,) = wide_steps(METHODS[method](), rows)
    assert "step_size=0.1" in said
    assert "batch norm" in said


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU, nn.GELU])
def test_usual_networks_are_not_warned_of(method, act):
    assert not wide_steps(METHODS[method](), 6, norm=False, act=act)


def test_no_finite_step_no_warning():
    assert not wide_steps([dr.ExplicitPenalty(estimator="forward")], 2)


@pytest.mark.parametrize("p", [1e-12, 1e-6, 0.0])
def test_what_is_nothing_is_not_wrong(p):
    assert not wide_steps(METHODS["algorithm 2"](), 6, norm=False, p=p)


@pytest.mark.parametrize("rows", [2, 3, 6, 24])
@pytest.mark.parametrize("step_size", [0.1, 0.02])
def test_it_is_said_where_the_penalty_is_wrong(rows, step_size):
    """The error that is told is about that against the derivative itself (forward mode)."""
    torch.manual_seed(rows)
    net, x, y = network(norm=True), torch.randn(rows, 4).double(), torch.randint(3, (rows,))

    def step():
        return F.cross_entropy(net(x), y)

    def gradient(estimator):
        generator = torch.Generator().manual_seed(5)
        value = explicit_penalty(step, estimator=estimator, step_size=step_size, generator=generator)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()), allow_unused=True)])

    how = {"curvature": "loss_hessian", "noise": False, "mask": "as_model", "smooth": True}
    found = measure_step(step, step_size=step_size, **how)
    right = gradient("forward")
    error = float((gradient("antithetic") - right).norm() / right.norm())
    if error > 2 * TOLERANCE:
        assert found.outcome == "warning"
    if error < TOLERANCE / 10:
        assert found.outcome == "holds"


@pytest.mark.parametrize(("curvature", "step_size"), [("loss_hessian", 1e-7), ("loss_hessian", 1e-8), ("full", 1e-4)])
def test_a_step_of_which_rounding_leaves_nothing_is_said(curvature, step_size):
    """At 1e-8 both steps of single precision are no step at all, and give the same: nothing."""
    net = network(p=0.5).float()
    x, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    how = dict(curvature=curvature, noise=True, mask="as_model", smooth=True)
    found = measure_step(lambda: F.cross_entropy(net(x), y), step_size=step_size, **how)
    assert "rounding" in found.note
    assert "step_size=0.1" in found.note
    net.double()
    found = measure_step(lambda: F.cross_entropy(net(x.double()), y), step_size=step_size, **how)
    assert found.outcome == "holds"


def test_in_bfloat16_both_steps_are_widened_to_one_and_nothing_is_claimed():
    net = network(norm=True, p=0.1).bfloat16()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    how = dict(curvature="loss_hessian", noise=True, mask="as_model", smooth=True)
    found = measure_step(lambda: F.cross_entropy(net(x), torch.tensor([0, 1])), step_size=0.1, **how)
    assert "not compared" in found.note
    assert found.value is None
