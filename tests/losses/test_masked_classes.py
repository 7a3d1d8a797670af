"""Classes masked out with -inf: penalty and divergence are those of a very negative number in their place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dropreg.functional import explicit_penalty, r_drop

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)).double()
X, Y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2, 2])
MASK = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
LOSSES = {
    "filled": lambda low: F.cross_entropy(NET(X).masked_fill(MASK, low), Y),
    "added": lambda low: F.cross_entropy(NET(X) + torch.zeros(6, 3).double().masked_fill(MASK, low), Y),
    "log-probabilities": lambda low: F.nll_loss(NET(X).masked_fill(MASK, low).log_softmax(-1), Y),
}


def with_gradient(value):
    return value.detach(), *torch.autograd.grad(value, list(NET.parameters()), allow_unused=True)


def close(one, other):
    for a, b in zip(with_gradient(one), with_gradient(other), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
@pytest.mark.parametrize("curvature", ["loss_hessian", "loss_jacobian", "identity", "full"])
@pytest.mark.parametrize("loss", LOSSES)
def test_penalty(loss, curvature, estimator):
    if (loss, curvature) == ("added", "identity"):
        return  # a number that is added to a very negative one is lost in it or not, as its size goes
    settings = {"curvature": curvature, "estimator": estimator}
    one, other = (
        explicit_penalty(lambda low=low: LOSSES[loss](low), generator=torch.Generator().manual_seed(1), **settings)
        for low in (-torch.inf, -1e5)
    )
    assert other > 0
    close(one, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_divergence(loss):
    one, other = (
        r_drop(lambda low=low: LOSSES[loss](low), generator=torch.Generator().manual_seed(1)).total
        for low in (-torch.inf, -1e5)
    )
    close(one, other)


@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
def test_identity_averages_over_the_same_however_classes_are_masked(estimator):
    one, other = (
        explicit_penalty(
            lambda name=name: LOSSES[name](-torch.inf),
            generator=torch.Generator().manual_seed(1),
            curvature="identity",
            estimator=estimator,
        )
        for name in ("filled", "added")
    )
    assert other > 0
    close(one, other)
