"""`exact` against the formula of the paper written by hand."""

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, flat_gradient, site_jacobians, variances

from lightning_dropreg.functional import explicit_penalty, find_sites


@pytest.fixture(params=NETWORKS, ids=lambda network: network.__name__)
def problem(request):
    torch.set_default_dtype(torch.float64)
    net = request.param()
    x = net.x()
    y = torch.randint(net.outputs, (net(x).shape[0],))
    return net, x, y


def by_hand(net, x, y, curvature):
    z = net(x, [torch.ones(shape) for shape in net.mask_shapes()])
    p = z.softmax(-1)
    if curvature == "loss_hessian":
        m = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    elif curvature == "identity":
        m = torch.eye(net.outputs).expand(len(z), -1, -1) / net.outputs
    else:
        slope = p - F.one_hot(y, net.outputs)
        m = slope.unsqueeze(-1) * slope.unsqueeze(-2)
    total = 0.0
    for c, j in zip(variances(net), site_jacobians(net, x)):
        # <J^T M J, diag(h^2)>, per example, then the mean that the loss takes
        total = total + 0.5 * c * torch.einsum("tcm,tcd,tdm->t", j, m, j).mean()
    return total


@pytest.mark.parametrize("curvature", ["loss_hessian", "identity", "loss_jacobian"])
def test_exact_equals_the_formula(problem, curvature):
    net, x, y = problem
    exact = explicit_penalty(lambda: F.cross_entropy(net(x), y), curvature=curvature, estimator="exact")
    expected = by_hand(net, x, y, curvature)
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(flat_gradient(exact, net), flat_gradient(expected, net), rtol=1e-9, atol=1e-13)


def test_the_sites_are_those_of_the_network(problem):
    net, x, y = problem
    sites = find_sites(lambda: F.cross_entropy(net(x), y))
    assert [site.p for site in sites] == list(net.ps)
    assert [site.mask_shape for site in sites] == net.mask_shapes()


def test_elementwise_noise_on_a_shared_mask_is_another_penalty():
    torch.set_default_dtype(torch.float64)
    x = torch.ones(1, 1, 2, 2)
    w = torch.ones((), requires_grad=True)
    closure = lambda: F.mse_loss(F.dropout2d(x * w, 0.5).sum((2, 3)), torch.zeros(1, 1))
    # z = 4 w f with one factor f, or the sum of four: R = c (dz/df)^2, summed over factors
    assert explicit_penalty(closure, estimator="exact").item() == pytest.approx(16.0)
    assert explicit_penalty(closure, estimator="exact", mask="elementwise").item() == pytest.approx(4.0)


def test_the_second_order_value_of_the_true_effect():
    """In a linear model with squared error the expansion ends at the second order: R is the true explicit effect."""
    torch.set_default_dtype(torch.float64)
    w, h, y, q = torch.randn(3, requires_grad=True), torch.randn(1, 3), torch.randn(1), 0.3
    closure = lambda: F.mse_loss(F.dropout(h, q) @ w, y)
    clean = F.mse_loss(h @ w, y)
    true = sum(
        (q ** (3 - sum(bits))) * ((1 - q) ** sum(bits)) * F.mse_loss((h * torch.tensor(bits) / (1 - q)) @ w, y)
        for bits in [(a, b, c) for a in (0.0, 1.0) for b in (0.0, 1.0) for c in (0.0, 1.0)]
    )
    torch.testing.assert_close(explicit_penalty(closure, estimator="exact"), true - clean)
