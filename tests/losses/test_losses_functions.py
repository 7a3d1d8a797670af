"""Every recognized loss: torch's value, and the penalty of the whole loss's Hessian by automatic differentiation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from agreement import check_agreement, gradients, run
from loss_table import LOSS_TABLE, NO_ROOT, OUTPUTS, SIGNS, SOFT, C, T, fixed
from torch import nn

from lightning_dropreg import recognize
from lightning_dropreg.errors import InvalidArgumentError, LossNotRecognizedError, UnsupportedOperationError
from lightning_dropreg.estimators.curvature import element_weights, matrix
from lightning_dropreg.functional import explicit_penalty, plain_loss
from lightning_dropreg.inspection.first_step import all_at_once, inspect_step
from lightning_dropreg.interception.mode import Interception

Q = 0.3


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


class Model:
    def __init__(self, name, reduction):
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, C)
        self.x = torch.randn(T, 3)
        self.loss = LOSS_TABLE[name]
        self.reduction = reduction
        self.parameters = [*self.a.parameters(), *self.b.parameters()]

    def scalar(self, loss, z):
        value = loss(z, self.reduction)
        if self.reduction != "none":
            return value
        # the user's own mask and weights
        return (value * torch.linspace(0, 1, value.numel()).reshape(value.shape)).sum() / 3

    def outputs(self, factor=None):
        h = torch.tanh(self.a(self.x))
        return self.b(F.dropout(h, Q) if factor is None else h * factor)

    def closure(self):
        return self.scalar(self.loss, self.outputs())


def by_brute_force(model, name):
    to_outputs, of_outputs = OUTPUTS.get(name, (lambda z: z, model.loss))
    ones = torch.ones(T, 2)
    hidden = to_outputs(model.outputs(ones))
    j = torch.autograd.functional.jacobian(lambda f: to_outputs(model.outputs(f)), ones, create_graph=True)
    j = j.reshape(hidden.numel(), -1)
    h = torch.autograd.functional.hessian(lambda o: model.scalar(of_outputs, o), hidden, create_graph=True)
    return Q / (1 - Q) / 2 * torch.einsum("am,ab,bm->", j, h.reshape(hidden.numel(), -1), j)


@pytest.mark.parametrize("name", LOSS_TABLE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_the_hessian_of_the_whole_loss(name, reduction):
    model = Model(name, reduction)
    exact, expected = explicit_penalty(model.closure, estimator="exact"), by_brute_force(model, name)
    torch.testing.assert_close(exact, expected)
    torch.testing.assert_close(gradients(exact, model.parameters), gradients(expected, model.parameters))
    torch.testing.assert_close(plain_loss(model.closure), model.scalar(model.loss, model.outputs(1.0)))
    assert exact > 0 or name == "gaussian_trained_variance"


@pytest.mark.parametrize("name", LOSS_TABLE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_a_loss_returned_as_it_is(name, reduction):
    """They are known without a backward, unless somebody has hung something on the loss."""
    z = torch.randn(T, C, requires_grad=True)
    with Interception(lambda site, h: h, record_losses=True) as mode:
        total = LOSS_TABLE[name](z, reduction)
    (known,) = element_weights(total, mode.losses)
    (asked,) = element_weights(total * 1, mode.losses)
    torch.testing.assert_close(known, asked)
    total.register_hook(lambda gradient: 3 * gradient)
    torch.testing.assert_close(element_weights(total, mode.losses)[0], 3 * asked)


@pytest.mark.parametrize("name", LOSS_TABLE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_is_torchs(name, reduction):
    z = torch.randn(T, C, requires_grad=True)
    with Interception(lambda site, h: h, record_losses=True) as mode:
        ours = LOSS_TABLE[name](z, reduction)
    assert len(mode.losses) == 1
    theirs = LOSS_TABLE[name](z, reduction)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), z), torch.autograd.grad(theirs.sum(), z))
    with Interception(lambda site, h: h):
        torch.testing.assert_close(LOSS_TABLE[name](z, reduction), theirs)


def assert_pair_form_and_its_gradient(loss, weights, hessians):
    """For an antithetic pair too; the gradient in both outputs is that of the Hessian, differentiated."""
    step, z = 0.25, loss.outputs.detach()
    u = torch.randn_like(z)
    pair = [(z + sign * step * u).requires_grad_() for sign in (1, -1)]
    value = loss.pair_hessian_form(*pair, weights, step)
    torch.testing.assert_close(value, torch.einsum("tc,tcd,td->", u, hessians, u))

    def by_definition(plus, minus):
        z, u = (plus + minus) / 2, (plus - minus) / (2 * step)
        with torch.enable_grad():
            total = (weights.detach() * loss.per_element(loss.function(z))).sum()
            (slope,) = torch.autograd.grad(total, z, create_graph=True)
            if not slope.requires_grad:
                return (0 * slope * u * u).sum() + 0 * z.sum()
            (product,) = torch.autograd.grad((slope * u).sum(), z, create_graph=True)
            return (product * u).sum() if product.requires_grad or u.requires_grad else 0 * z.sum()

    # `u` inside product is differentiated through as well: twice u^T H, once each side
    expected = torch.autograd.grad(by_definition(*pair), pair)
    torch.testing.assert_close(torch.autograd.grad(value, pair), expected)


@pytest.mark.parametrize("name", LOSS_TABLE)
def test_forms_and_factors_are_those_of_the_hessian(name):
    """Written in closed form they are what differentiating the loss twice gives; over all signs, no statistics."""
    z, weights = torch.randn(T, C, requires_grad=True), None
    with Interception(lambda site, h: h, record_losses=True) as mode:
        LOSS_TABLE[name](z, "sum")
    (loss,) = mode.losses
    weights = loss.per_element(fixed(*loss.elements.shape))
    hessians, u = matrix("loss_hessian", loss, weights), torch.randn_like(loss.outputs)
    expected = torch.einsum("tc,tcd,td->", u, hessians, u)
    torch.testing.assert_close(loss.hessian_form(loss.outputs, u, weights), expected)
    # a direction that depends on the outputs is no part of what is differentiated
    bent = loss.outputs * u.sin()
    torch.testing.assert_close(
        loss.hessian_form(loss.outputs, bent, weights), torch.einsum("tc,tcd,td->", bent, hessians, bent)
    )
    assert_pair_form_and_its_gradient(loss, weights, hessians.detach())
    if name in NO_ROOT:
        return
    patterns = list(itertools.product([-1.0, 1.0], repeat=loss.outputs.shape[-1]))
    vectors = [loss.hessian_factor(loss.outputs, weights, torch.tensor(p).expand_as(loss.outputs)) for p in patterns]
    covariance = sum(torch.einsum("tc,td->tcd", v, v) for v in vectors) / len(patterns)
    torch.testing.assert_close(covariance, hessians)


@pytest.mark.parametrize("name", ["huber", "kl_div", "bce_with_logits"])
def test_identity_counts_an_example_as_the_loss_does(name):
    """``1/2 sum_t w_t |u_t|^2 / C`` with ``w_t = 1/T`` for the mean over examples and 1 for the sum."""
    model, values = Model(name, "mean"), []
    for model.reduction in ("mean", "sum"):
        values.append(explicit_penalty(model.closure, estimator="exact", curvature="identity"))
    ratio = values[1] / values[0]
    torch.testing.assert_close(ratio, torch.tensor(float(T)))


@pytest.mark.parametrize("name", LOSS_TABLE)
def test_estimators_agree(name):
    model = Model(name, "none")
    if name in NO_ROOT:
        with pytest.raises(UnsupportedOperationError, match="double_backward"):
            run("double_backward", model.closure)
        a, f = run("antithetic", model.closure), run("forward", model.closure)
        torch.testing.assert_close(a.penalty, f.penalty, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(
            gradients(a.penalty, model.parameters), gradients(f.penalty, model.parameters), rtol=1e-4, atol=1e-6
        )
    else:
        check_agreement(model.closure, model.parameters)


@pytest.mark.parametrize("curvature", ["identity", "loss_jacobian"])
@pytest.mark.parametrize("name", [*LOSS_TABLE, "l1"])
def test_other_curvatures(name, curvature):
    model = Model("huber", "mean")
    model.loss = LOSS_TABLE.get(name, lambda z, r: F.l1_loss(z, fixed(T, C), reduction=r))
    values = [run(e, model.closure, curvature=curvature).penalty for e in ("antithetic", "forward")]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-8)
    assert explicit_penalty(model.closure, estimator="exact", curvature=curvature) > 0


def test_bce_has_the_penalty_of_its_logits():
    model = Model("bce", "mean")
    probabilities = explicit_penalty(model.closure, estimator="exact")
    model.loss = lambda z, r: F.binary_cross_entropy_with_logits(z, SIGNS, fixed(T, 1), reduction=r)
    torch.testing.assert_close(probabilities, explicit_penalty(model.closure, estimator="exact"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bce_of_saturated_probabilities(dtype):
    p = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-30, 1e-8, 0.5], dtype=dtype, requires_grad=True)
    y = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0], dtype=dtype)
    with Interception(lambda site, h: h, record_losses=True) as mode:
        ours = F.binary_cross_entropy(p, y, reduction="none")
    torch.testing.assert_close(ours, F.binary_cross_entropy(p, y, reduction="none"))
    (gradient,) = torch.autograd.grad(ours.sum(), p)
    assert gradient.isfinite().all()
    assert mode.losses[0].hessian_form(mode.losses[0].outputs, torch.ones(7, 1), torch.ones(7, 1)).isfinite()


# --- refusals ---------------------------------------------------------------------------------------------------


def refused(error, match, loss, estimator="antithetic", **options):
    net = nn.Linear(3, C)
    x = torch.randn(T, 3)
    with pytest.raises(error, match=match):
        explicit_penalty(lambda: loss(net(F.dropout(x, Q))), estimator=estimator, **options)


@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
def test_l1_has_no_hessian(estimator):
    refused(LossNotRecognizedError, "l1_loss has the second derivative 0", lambda z: F.l1_loss(z, SOFT), estimator)
    refused(LossNotRecognizedError, "l1_loss", lambda z: F.smooth_l1_loss(z, SOFT, beta=0.0), estimator)


def test_losses_without_a_known_curvature_are_named():
    y = torch.arange(T) % C
    multi_margin = lambda z: F.multi_margin_loss(z, y)
    refused(LossNotRecognizedError, "multi_margin_loss was called, but it is piecewise", multi_margin)
    refused(
        LossNotRecognizedError,
        r"triplet_margin_loss was called, but it compares.*Compute that part",
        lambda z: F.cross_entropy(z, y) + F.triplet_margin_loss(z, z * 2, z * 3),
        estimator="exact",  # which sees the site on the input, that needs no gradient; so does a callback's inspection
    )
    refused(LossNotRecognizedError, r"lightning_dropreg\.recognize", lambda z: z.square().mean())


def test_targets_that_are_trained():
    for loss in (F.kl_div, F.poisson_nll_loss, F.cross_entropy, F.binary_cross_entropy_with_logits, F.soft_margin_loss):
        both = lambda z: loss(z.log_softmax(-1), z.softmax(-1))
        refused(LossNotRecognizedError, "target of .* needs a gradient", both)
    refused(LossNotRecognizedError, "needs a gradient", lambda z: F.gaussian_nll_loss(z, z * 2, 1.0))
    for loss in (F.huber_loss, F.smooth_l1_loss, F.mse_loss):  # the difference is the output
        net, x = nn.Linear(3, 2), torch.randn(T, 3)
        closure = lambda: loss(*net(F.dropout(x, Q)).unbind(-1))
        plain = lambda: loss((net(F.dropout(x, Q)) * torch.tensor([1.0, -1.0])).sum(-1), torch.zeros(T))
        torch.testing.assert_close(*(explicit_penalty(c, estimator="exact") for c in (closure, plain)))


def test_log_probabilities_are_checked():
    refused(LossNotRecognizedError, "not made of log-probabilities", lambda z: F.kl_div(z, SOFT))
    net, x, y = nn.Linear(3, C), torch.randn(T, 3), torch.arange(T) % C
    with pytest.raises(LossNotRecognizedError, match="not made of log-probabilities"):
        raise all_at_once(inspect_step(lambda: F.nll_loss(net(F.dropout(x, Q)), y), need_losses=True)[1], "net")


@pytest.mark.parametrize("name", ["huber", "nll"])
def test_a_loss_that_is_subtracted(name):
    model = Model(name, "sum")
    positive = explicit_penalty(model.closure, estimator="exact")
    negative = lambda: -model.closure()
    torch.testing.assert_close(explicit_penalty(negative, estimator="exact"), -positive)
    a, f = run("antithetic", negative).penalty, run("forward", negative).penalty
    torch.testing.assert_close(a, f, rtol=1e-5, atol=1e-8)
    with pytest.raises(UnsupportedOperationError, match="is negative"):
        run("double_backward", negative)


# --- losses of one's own ----------------------------------------------------------------------------------------


def test_recognize_refuses():
    with pytest.raises(InvalidArgumentError, match="takes a function"):
        recognize(3)
    refused(InvalidArgumentError, "one element per example", recognize(lambda z: z.square().mean()))
    refused(InvalidArgumentError, "one element per example", lambda z: recognize(lambda z: z.square().sum(0))(z).sum())
    contrast = recognize(lambda a, b: (a - b).square().sum(-1))
    refused(LossNotRecognizedError, "another tensor", lambda z: contrast(z, z * 2).mean())
    mixed = recognize(lambda z: (z - z.mean(0)).square().sum(-1))
    net, x = nn.Linear(3, C), torch.randn(T, 3)
    with pytest.raises(LossNotRecognizedError, match="outputs of other examples"):
        raise all_at_once(inspect_step(lambda: mixed(net(F.dropout(x, Q))).mean(), need_losses=True)[1], "net")


def test_recognize_a_module_outside_of_passes():
    class Focal(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z, y):
            return self.scale * F.cross_entropy(z, y, reduction="none")

    loss, z, y = recognize(Focal()), torch.randn(2, 3, C).requires_grad_(), torch.zeros(2, 3, dtype=torch.long)
    flat = lambda z: loss(z.flatten(0, 1), y.flatten())
    assert flat(z).shape == (6,)
    with Interception(lambda site, h: h, record_losses=True) as mode:
        flat(z)
    (found,) = mode.losses
    assert (found.name, found.outputs.shape) == ("Focal", (6, C))


def test_recognize_can_have_a_softmax_in_forward_mode():
    """The loss runs with the operations for dual numbers, in every pass."""
    model = Model("recognized", "mean")
    noise = run("forward", model.closure)
    other = run("antithetic", model.closure)
    torch.testing.assert_close(noise.noise, other.noise, rtol=1e-5, atol=1e-8)


# --- several losses, dicts, half precision ----------------------------------------------------------------------


def test_masked_token_losses():
    """``reduction="none"`` and a mask: the same as leaving the masked tokens out."""
    net, x = nn.Linear(3, C), torch.randn(2, T, 3)
    y, mask = torch.arange(2 * T).reshape(2, T) % C, (fixed(2, T) > 0.9).double()

    def masked():
        tokens = F.cross_entropy(net(F.dropout(x, Q)).transpose(1, 2), y, reduction="none")
        return (tokens * mask).sum() / mask.sum()

    def left_out():
        return F.cross_entropy(net(F.dropout(x, Q))[mask > 0], y[mask > 0])

    a, b = (explicit_penalty(c, estimator="exact") for c in (masked, left_out))
    torch.testing.assert_close(a, b)
    check_agreement(masked, list(net.parameters()))


def test_several_weighted_losses_of_a_dict():
    a, heads, x = nn.Linear(3, 3), nn.ModuleDict({"y": nn.Linear(3, C), "r": nn.Linear(3, 2)}), torch.randn(T, 3)
    y, r = torch.arange(T) % C, torch.randn(T, 2)

    def parts():
        h = F.dropout(torch.tanh(a(x)), Q)
        out = {name: head(h) for name, head in heads.items()}
        return {"y": F.cross_entropy(out["y"], y), "r": F.huber_loss(out["r"], r)}

    def closure():
        losses = parts()
        return 0.7 * losses["y"] + 0.2 * losses["r"]

    singles = [explicit_penalty(lambda: parts()[name], estimator="exact") for name in ("y", "r")]
    torch.testing.assert_close(explicit_penalty(closure, estimator="exact"), 0.7 * singles[0] + 0.2 * singles[1])
    check_agreement(closure, [*a.parameters(), *heads.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["huber", "poisson", "soft_margin", "nll", "bce_with_logits"])
def test_half_precision(name, dtype):
    """The outputs are rounded, the forms are not: within the rounding of the outputs of what float64 has."""
    model = Model(name, "mean")
    expected = [run("antithetic", model.closure, key=k, step_size=0.2).penalty for k in range(20)]
    net = model.outputs
    model.outputs = lambda *args: net(*args).to(dtype)
    found = [run("antithetic", model.closure, key=k, step_size=0.2).penalty for k in range(20)]
    assert all(value.isfinite() for value in found)
    assert abs(sum(found).float() / sum(expected).float() - 1) < 0.1
    torch.testing.assert_close(plain_loss(model.closure), model.scalar(model.loss, model.outputs(1.0)))
