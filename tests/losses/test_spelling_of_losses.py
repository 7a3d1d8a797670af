"""A loss is what it is, not how it is spelled: all curvatures agree between spellings, by Jacobians of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.functional import explicit_penalty

N, C, Q = 4, 12, 0.5
CURVATURES = ["loss_hessian", "identity", "loss_jacobian"]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


class Model:
    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(Q), nn.Linear(8, C))
        self.x, self.t, self.y = torch.randn(N, 3), torch.rand(N, C), torch.arange(N)
        self.signs = (self.t > 0.5).double()
        self.tokens = torch.arange(N * 3).view(N, 3) % 4

    def z(self):
        return self.net(self.x)


def expected(model, curvature, loss, weight, outputs=C):
    """``1/2 c sum_n w <J^T H J, diag(h^2)>`` with one example's loss of its outputs, every example by itself."""
    hidden, total = model.net[:2](model.x).detach(), torch.zeros(())
    for n, h in enumerate(hidden):
        for part in range(C // outputs):
            rest = lambda h, part=part: model.net[3](h).view(-1, outputs)[part]
            of_one = lambda z, n=n, part=part: loss(z, n, part)
            z, j = rest(h), torch.autograd.functional.jacobian(rest, h)
            if curvature == "identity":
                m = torch.eye(outputs) / outputs
            elif curvature == "loss_jacobian":
                g = torch.autograd.functional.jacobian(of_one, z)
                m = torch.outer(g, g)
            else:
                m = torch.autograd.functional.hessian(of_one, z)
            total = total + Q / (1 - Q) / 2 * weight * ((j * (m @ j)).sum(0) * h.square()).sum()
    return total


def summed(model, loss, target):
    """Sum over outputs, mean over rows."""
    return {
        "sum / N": lambda: loss(model.z(), target, reduction="sum") / N,
        "none": lambda: loss(model.z(), target, reduction="none").sum(1).mean(),
        "none, over rows first": lambda: loss(model.z(), target, reduction="none").mean(0).sum(),
        "mean * C": lambda: loss(model.z(), target) * C,
        "(N, 3, 2, 2)": lambda: loss(model.z().view(N, 3, 2, 2), target.view(N, 3, 2, 2), reduction="sum") / N,
        "row by row": lambda: sum(loss(z[None], t[None], reduction="sum") for z, t in zip(model.z(), target)) / N,
    }


def averaged(model, loss, target):
    """Mean over everything."""
    return {
        "mean": lambda: loss(model.z(), target),
        "none": lambda: loss(model.z(), target, reduction="none").mean(),
        "sum / N C": lambda: loss(model.z(), target, reduction="sum") / (N * C),
        "(N, 3, 2, 2)": lambda: loss(model.z().view(N, 3, 2, 2), target.view(N, 3, 2, 2)),
        "masked with ones": lambda: (loss(model.z(), target, reduction="none") * torch.ones(N, C)).sum() / (N * C),
    }


ELEMENTWISE = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "probabilities": lambda z, t, reduction="mean": F.binary_cross_entropy(z.sigmoid(), t, reduction=reduction),
    "poisson": F.poisson_nll_loss,
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_one_element_per_output(name, curvature):
    model, loss = Model(), ELEMENTWISE[name]
    target = model.t if name in {"mse", "huber", "smooth_l1"} else model.signs
    for reduction, spellings in (("sum", summed), ("mean", averaged)):
        own = lambda z, n, _, reduction=reduction: loss(z, target[n], reduction=reduction)
        right = expected(model, curvature, own, 1 / N)
        for spelling, closure in spellings(model, loss, target).items():
            found = explicit_penalty(closure, curvature=curvature, estimator="exact")
            torch.testing.assert_close(found, right, msg=lambda text, s=spelling: f"{s}: {text}")


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_factor_of_ones_own_stays_a_factor(curvature, scale):
    model = Model()
    for spellings in (summed, averaged):
        for spelling, closure in spellings(model, F.mse_loss, model.t).items():
            plain, scaled = (
                explicit_penalty(lambda f=f: f * closure(), curvature=curvature, estimator="exact") for f in (1, scale)
            )
            # with a factor that says neither, what the loss function was asked for decides
            if spelling not in {"mean * C", "row by row", "sum / N C"}:
                torch.testing.assert_close(scaled, scale * plain)


def test_a_mask_leaves_outputs_out():
    """Rows with different numbers of valid outputs, mean over the valid ones of all rows."""
    model = Model()
    mask = (torch.rand(N, C, generator=torch.Generator().manual_seed(1)) > 0.4).double()
    closure = lambda: (F.mse_loss(model.z(), model.t, reduction="none") * mask).sum() / mask.sum()
    right = sum(
        expected(Rows(model, n), "loss_jacobian", lambda z, _, __, n=n: ((z - model.t[n]) ** 2 * mask[n]).sum(), 1.0)
        / (mask[n].sum() * mask.sum())  # the row weighs its share of the valid outputs, its loss is their mean
        for n in range(N)
    )
    torch.testing.assert_close(explicit_penalty(closure, curvature="loss_jacobian", estimator="exact"), right)


class Rows:
    """One row of a model."""

    def __init__(self, model, n):
        self.net, self.x = model.net, model.x[n : n + 1]


def classification(model):
    v = model.net[3]
    log_softmax = lambda z: F.log_softmax(z, -1)
    return {
        "cross_entropy": lambda: F.cross_entropy(model.z(), model.y),
        "nll_loss": lambda: F.nll_loss(log_softmax(model.z()), model.y),
        "module": lambda: nn.NLLLoss()(nn.LogSoftmax(1)(model.z()), model.y),
        "of log-probabilities": lambda: F.cross_entropy(log_softmax(model.z()), model.y),
        "twice": lambda: F.nll_loss(log_softmax(log_softmax(model.z())), model.y),
        "stacked": lambda: F.nll_loss(torch.stack([log_softmax(row) for row in model.z()]), model.y),
        "sliced": lambda: F.nll_loss(torch.cat([log_softmax(model.z())] * 2)[N:].clone(), model.y),
        "by hand": lambda: F.cross_entropy(model.z(), model.y, reduction="none").mean(),
        "soft": lambda: F.cross_entropy(model.z(), F.one_hot(model.y, C).double()),
        "kl_div": lambda: F.kl_div(log_softmax(model.z()), F.one_hot(model.y, C).double(), reduction="batchmean"),
        "linear_cross_entropy": lambda: F.linear_cross_entropy(
            model.net[:3](model.x), v.weight, model.y, linear_bias=v.bias
        ),
        "in chunks": lambda: F.linear_cross_entropy(
            model.net[:3](model.x), v.weight, model.y, linear_bias=v.bias, options=nn.LinearCrossEntropyOptions()
        ),
    }


NEEDS = {"linear_cross_entropy", "in chunks"} if not hasattr(F, "linear_cross_entropy") else set()


@pytest.mark.parametrize("estimator", ["exact", "antithetic", "forward", "double_backward"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_cross_entropy(curvature, estimator):
    model = Model()
    right = expected(model, curvature, lambda z, n, _: F.cross_entropy(z, model.y[n]), 1 / N)
    values = {}
    for spelling, closure in classification(model).items():
        if spelling not in NEEDS:
            generator = torch.Generator().manual_seed(3)
            values[spelling] = explicit_penalty(
                closure, curvature=curvature, estimator=estimator, generator=generator, step_size=1e-3
            )
    reference = right if estimator == "exact" else values["cross_entropy"]
    for spelling, value in values.items():
        # the factors of the double backward are drawn in the shape of the outputs, which is the same in all
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-9, msg=lambda t, s=spelling: f"{s}: {t}")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_token_is_an_example_where_it_has_an_element(curvature):
    model = Model()
    right = expected(model, curvature, lambda z, n, t: F.cross_entropy(z, model.tokens[n, t]), 1 / (3 * N), outputs=4)
    tokens = lambda: model.z().view(N, 3, 4)
    spellings = [
        lambda: F.cross_entropy(tokens().flatten(0, 1), model.tokens.flatten()),
        lambda: F.cross_entropy(tokens().transpose(1, 2), model.tokens),
        lambda: F.nll_loss(tokens().log_softmax(-1).transpose(1, 2), model.tokens),
        lambda: F.nll_loss(tokens().transpose(1, 2).log_softmax(1), model.tokens),
        lambda: F.kl_div(tokens().log_softmax(-1), F.one_hot(model.tokens, 4).double(), reduction="sum") / (3 * N),
    ]
    for closure in spellings:
        torch.testing.assert_close(explicit_penalty(closure, curvature=curvature, estimator="exact"), right)


def test_logits_that_are_not_known():
    """Log-probabilities made by hand: the Hessian does not care, the mean square of their changes would."""
    model = Model()
    by_hand = lambda z: z - z.logsumexp(-1, keepdim=True)
    closure = lambda: F.nll_loss(by_hand(model.z()), model.y)
    for curvature in ("loss_hessian", "loss_jacobian"):
        right = expected(model, curvature, lambda z, n, _: F.cross_entropy(z, model.y[n]), 1 / N)
        torch.testing.assert_close(explicit_penalty(closure, curvature=curvature, estimator="exact"), right)
    for estimator in ("antithetic", "forward", "double_backward", "exact"):
        with pytest.raises(LossNotRecognizedError, match="log_softmax"):
            explicit_penalty(closure, curvature="identity", estimator=estimator)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_trained_variance_belongs_to_the_row(curvature):
    """Outputs of a row are its means and its variances; shapes (N, 6) and (N, 3, 2) are one loss."""
    model = Model()

    def closure(shape):
        mean, variance = model.z().chunk(2, 1)
        variance = F.softplus(variance)
        return F.gaussian_nll_loss(mean.view(shape), model.t[:, :6].view(shape), variance.view(shape))

    flat, folded = (
        explicit_penalty(lambda s=s: closure(s), curvature=curvature, estimator="exact") for s in ((N, 6), (N, 3, 2))
    )
    torch.testing.assert_close(flat, folded)
