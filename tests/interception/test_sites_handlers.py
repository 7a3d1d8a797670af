"""Constructs that drop inside one operation, against models that do the same with plain dropout, written by hand.

The pairs share their parameters; sites, loss, exact penalty and its gradient must agree to rounding, and the estimators
must agree among each other and with the exact value over all patterns of signs.
"""

import inspect
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from agreement import check_agreement, check_pair, gradients, run
from torch import nn

from lightning_dropreg import drop
from lightning_dropreg.diagnostics import measure_effect
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedOperationError, UnsupportedSiteError
from lightning_dropreg.functional import dropout_loss, explicit_penalty, find_sites, implicit_noise
from lightning_dropreg.inspection.first_step import inspect_step
from lightning_dropreg.interception.handlers import HANDLERS
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.numerics.dual import REPLACEMENTS


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def test_every_composite_function_of_torch_is_opened():
    """Python functions that offer themselves to modes as a whole hide what they call; none may hide a dropout."""
    drops = re.compile(r"(feature_)?(alpha_)?dropout[123]?d?_?|scaled_dot_product_attention|softmax")
    for name, function in vars(F).items():
        if inspect.isfunction(function) and function.__module__ == F.__name__:
            called = function.__code__.co_names
            if any(map(re.compile("has_torch_function").match, called)) and any(map(drops.fullmatch, called)):
                assert function in HANDLERS or function in REPLACEMENTS, name


@pytest.mark.parametrize(("function", "shape"), [(F.alpha_dropout, (2, 2)), (F.feature_alpha_dropout, (2, 2, 2))])
def test_alpha_dropout_takes_the_values_of_torch(function, shape):
    """Over all masks: the values that torch's operation takes, and their mean where there is no noise."""
    p, x = 0.3, torch.randn(shape)
    alpha = -1.7580993408473766
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    kept, dropped = a * x - a * alpha * p, torch.full(shape, a * alpha - a * alpha * p)
    found = torch.stack([function(x, p, True) for _ in range(60)])
    torch.testing.assert_close(torch.minimum((found - kept).abs(), (found - dropped).abs()), torch.zeros_like(found))
    with Interception(lambda site, h: h):
        mean = function(x, p, True)
    torch.testing.assert_close(mean, (1 - p) * kept + p * dropped)
    for keep in itertools.product([0.0, 1.0], repeat=4):
        mask = torch.tensor(keep).reshape((2, 2) + (1,) * (len(shape) - 2))
        with Interception(lambda site, h: h * mask / (1 - site.p)) as mode:
            ours = function(x, p, True)
        torch.testing.assert_close(ours, torch.where(mask > 0, kept, dropped))
        assert mode.sites[0].mask_shape == mask.shape


@pytest.mark.parametrize("module", [nn.AlphaDropout, nn.FeatureAlphaDropout])
@pytest.mark.parametrize("inplace", [False, True])
def test_alpha_dropout_in_every_estimator(module, inplace):
    net = nn.Sequential(nn.Linear(2, 2), nn.SELU(), module(0.2, inplace), nn.Linear(2, 3))
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    closure = lambda: F.cross_entropy(net(x), y)
    check_agreement(closure, list(net.parameters()))
    assert net[2].eval()(x) is x


def of_timm(x, p):
    def drop_path(x, drop_prob=0.0, training=False, scale_by_keep=True):
        keep_prob = 1 - drop_prob
        random_tensor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and scale_by_keep:
            random_tensor.div_(keep_prob)
        return x * random_tensor

    return drop_path(x, p)


def of_torchvision(x, p):
    def stochastic_depth(input, p, mode):
        survival_rate = 1.0 - p
        size = [input.shape[0]] + [1] * (input.ndim - 1)
        noise = torch.empty(size, dtype=input.dtype, device=input.device)
        noise = noise.bernoulli_(survival_rate)
        if survival_rate > 0.0:
            noise.div_(survival_rate)
        return input * noise

    return stochastic_depth(x, p, "row")


def of_transformers(x, p):
    def drop_path(input, drop_prob=0.0, training=False):
        keep_prob = 1 - drop_prob
        shape = (input.shape[0],) + (1,) * (input.ndim - 1)
        random_tensor = keep_prob + torch.rand(shape, dtype=input.dtype, device=input.device)
        random_tensor.floor_()  # binarize
        return input.div(keep_prob) * random_tensor

    return drop_path(x, p)


def of_efficientnet(x, p):
    def drop_connect(inputs, p, training):
        keep_prob = 1 - p
        random_tensor = keep_prob
        random_tensor += torch.rand([inputs.shape[0], 1], dtype=inputs.dtype, device=inputs.device)
        binary_tensor = torch.floor(random_tensor)
        return inputs / keep_prob * binary_tensor

    return drop_connect(x, p, True)


@pytest.mark.parametrize("function", [of_timm, of_torchvision, of_transformers, of_efficientnet])
def test_stochastic_depth(function):
    a, b = nn.Linear(2, 3), nn.Linear(3, 3)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])

    def closure(function=function):
        h = torch.tanh(a(x))
        return F.cross_entropy(b(h + function(h * 2, 0.3)), y)

    def by_hand():
        return closure(lambda h, p: drop(h, p, (4, 1)))

    parameters = [*a.parameters(), *b.parameters()]
    ours, theirs = run("exact", closure), run("exact", by_hand)
    for one, other in ((ours.penalty, theirs.penalty), (ours.noise, theirs.noise)):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(gradients(one, parameters), gradients(other, parameters))
    check_agreement(closure, parameters)
    draws = [dropout_loss(c, k=2, generator=torch.Generator().manual_seed(4)) for c in (closure, by_hand)]
    torch.testing.assert_close(*draws)
    (site,) = find_sites(closure)
    assert (site.kind, site.mask_shape) == ("stochastic_depth", (4, 1))


def test_other_drawings_are_left_alone():
    net, x = nn.Linear(3, 3), torch.randn(4, 3)

    def closure():
        augmented = x * torch.empty(4, 3).bernoulli_(0.5) + torch.floor(x) + torch.floor(x.clone()).floor_()
        return F.mse_loss(net(augmented), x)

    assert find_sites(closure) == []

    def drop_path(x):
        return x * torch.floor(0.3 + torch.rand(4, 1))

    with pytest.raises(UnsupportedSiteError, match="keep probability is not where"):
        find_sites(lambda: F.mse_loss(net(drop_path(x)), x))


def test_dropout_of_ones_own():
    net = nn.Linear(3, 2)
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    mine = lambda: F.mse_loss(net(drop(x, 0.3, (4, 1, 3))), y)
    torchs = lambda: F.mse_loss(net(F.dropout1d(x.transpose(1, 2), 0.3).transpose(1, 2)), y)
    parameters = list(net.parameters())
    a, b = run("exact", mine), run("exact", torchs)
    torch.testing.assert_close(a.penalty, b.penalty)
    torch.testing.assert_close(gradients(a.penalty, parameters), gradients(b.penalty, parameters))
    check_agreement(mine, parameters)
    dropped = drop(torch.ones(1000, 3), 0.3, (1000, 1))
    assert {round(v, 6) for v in dropped.unique().tolist()} == {0.0, round(1 / 0.7, 6)}
    assert ((dropped == 0).all(1) | (dropped > 0).all(1)).all()
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        drop(x, 0.3, (4, 2, 3))
    # DropConnect: weights are dropped from
    assert len(find_sites(lambda: F.mse_loss(F.linear(x, drop(net.weight, 0.2), net.bias), y))) == 1


def by_hand(x):
    return x * (torch.rand(4, 3) > 0.5) * 2


def by_an_operation_that_modes_do_not_see(x):
    return torch.ops.aten.native_dropout.default(x, 0.5, True)[0]


@pytest.mark.parametrize("function", [by_hand, by_an_operation_that_modes_do_not_see])
def test_randomness_that_is_not_understood_is_told(function):
    net, x = nn.Linear(3, 3), torch.randn(4, 3)
    closure = lambda: F.mse_loss(F.dropout(net(function(x)), 0.3), x)
    with pytest.warns(UserWarning, match=r"draws random numbers.*test_sites_handlers\.py.*lightning_dropreg\.drop"):
        inspect_step(closure, need_losses=True)


@pytest.mark.parametrize("function", [of_timm, of_torchvision, of_transformers, of_efficientnet])
def test_stochastic_depth_is_not_told(function, recwarn):
    net, x = nn.Linear(3, 3), torch.randn(4, 3)
    inspect_step(lambda: F.mse_loss(function(net(x), 0.3), x), need_losses=True)
    assert [w for w in recwarn if "random" in str(w.message)] == []


def test_understood_randomness_is_not_told(recwarn):
    net = nn.Sequential(nn.LSTM(3, 3, 2, dropout=0.3))
    attention, x = nn.TransformerEncoderLayer(3, 1, 3, 0.2), torch.randn(4, 2, 3)
    inspect_step(lambda: F.mse_loss(F.alpha_dropout(net(attention(drop(x, 0.1)))[0], 0.3, True), x), need_losses=True)
    assert [w for w in recwarn if "random" in str(w.message)] == []


@pytest.mark.parametrize("inplace", [False, True])
def test_one_module_called_several_times(inplace):
    drop, a, b = nn.Dropout(0.3, inplace), nn.Linear(2, 3), nn.Linear(3, 3)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])

    def closure():
        return F.cross_entropy(b(drop(torch.sigmoid(b(drop(a(x)))) * 1.0)), y)

    def by_hand():
        return F.cross_entropy(b(F.dropout(torch.sigmoid(b(F.dropout(a(x), 0.3))), 0.3)), y)

    parameters = [*a.parameters(), *b.parameters()]
    check_pair(closure, by_hand, parameters)
    check_agreement(closure, parameters)
    noise = implicit_noise(closure)
    assert noise.isfinite()


def test_every_site_has_masks_of_its_own():
    x = torch.ones(1000, requires_grad=True)
    masks = []

    def closure():
        masks.extend((F.dropout(x, 0.5) > 0).double() for _ in range(2))
        return x.sum()

    dropout_loss(closure, k=2)
    agreements = [(a == b).double().mean() for a, b in itertools.combinations(masks, 2)]
    assert all(0.4 < agreement < 0.6 for agreement in agreements)


def test_sign_patterns_give_the_exact_penalty():
    """The mean over all directions of a site with 4 entries, no statistics."""
    net = nn.Sequential(nn.Linear(2, 2), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(2, 3))
    x, y = torch.randn(2, 2), torch.tensor([0, 2])
    closure = lambda: F.cross_entropy(net(x), y)
    total = torch.zeros(())
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        r = 0.5 * torch.tensor(signs).reshape(2, 2)  # sqrt(0.2 / 0.8)
        outputs = []
        for step in (1e-4, -1e-4):
            with Interception(lambda site, h: h * (1 + step * r)):
                outputs.append(net(x))
        z, u = (outputs[0] + outputs[1]) / 2, (outputs[0] - outputs[1]) / 2e-4
        p = z.softmax(-1)
        total = total + ((p * u**2).sum() - ((p * u).sum(-1) ** 2).sum()) / 2 / 2 / 16
    torch.testing.assert_close(total, explicit_penalty(closure, estimator="exact"), rtol=1e-6, atol=1e-9)


def test_dropout_in_vmap():
    """The same mask for all slices is a site with that mask; masks that no other pass could repeat are refused."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    step = lambda how: F.cross_entropy(torch.vmap(net, randomness=how)(x), y)
    shared = lambda: F.cross_entropy(net[3](drop(net[:2](x), 0.4, mask_shape=(1, 4))), y)
    for estimate in (explicit_penalty, implicit_noise):
        of = lambda closure, estimate=estimate: estimate(
            closure, estimator="antithetic", generator=torch.Generator().manual_seed(1)
        )
        torch.testing.assert_close(of(lambda: step("same")), of(shared))
        with pytest.raises(UnsupportedSiteError, match="vmap"):
            of(lambda: step("different"))
    assert dropout_loss(lambda: step("different"), k=2).isfinite()
    with pytest.raises(UnsupportedSiteError, match="vmap"):
        measure_effect(lambda: step("different"), draws=4)
    inside = lambda: torch.vmap(lambda one: F.cross_entropy(net(one[None]), y[:1]), randomness="same")(x).mean()
    with pytest.raises(UnsupportedOperationError, match="Batching rule"):
        explicit_penalty(inside, curvature="full", estimator="forward")
