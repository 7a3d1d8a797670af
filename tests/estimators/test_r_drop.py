"""R-Drop: the mean loss of two draws, and their symmetric divergence with the loss's own weights."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from agreement import gradients
from torch import nn

from examples.benchmarks import r_drop_ratio
from lightning_dropreg.errors import InvalidArgumentError, LossNotRecognizedError, NoDropoutSiteError
from lightning_dropreg.estimators import two_draws
from lightning_dropreg.functional import r_drop
from lightning_dropreg.passes import draws_of_dropout, run_pass


def _weights(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5


def kl(one, two):
    """``KL(softmax(one) || softmax(two))`` of every row, by torch."""
    log_p, log_q = one.log_softmax(-1), two.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def bernoulli(one, two):
    return sum(kl(torch.stack([z1, 0 * z1], -1), torch.stack([z2, 0 * z2], -1)) for z1, z2 in ((one, two),))


Y = torch.tensor([0, 1, -7, 3, 2, 1])
CLASSES = _weights(4)
SOFT = _weights(6, 4).softmax(-1)
MASK = torch.tensor([1.0, 0, 2, 1, 0, 1], dtype=torch.float64)
COUNTED = (Y != -7).double()

# a loss, and what each example's divergence counts in it
PAIR_LOSSES = {
    "mean": (lambda z: F.cross_entropy(z, Y, ignore_index=-7), COUNTED / 5),
    "sum": (lambda z: F.cross_entropy(z, Y.clamp_min(0), reduction="sum"), torch.ones(6, dtype=torch.float64)),
    "masked": (lambda z: (F.cross_entropy(z, Y.clamp_min(0), reduction="none") * MASK).sum() / 4, MASK / 4),
    "class weights": (
        lambda z: F.cross_entropy(z, Y, weight=CLASSES, ignore_index=-7),
        CLASSES[Y.clamp_min(0)] * COUNTED / (CLASSES[Y.clamp_min(0)] * COUNTED).sum(),
    ),
    "smoothed": (lambda z: F.cross_entropy(z, Y, ignore_index=-7, label_smoothing=0.3), COUNTED / 5),
    "soft": (lambda z: F.cross_entropy(z, SOFT), torch.full((6,), 1 / 6, dtype=torch.float64)),
    "nll": (lambda z: F.nll_loss(z.log_softmax(-1), Y, ignore_index=-7), COUNTED / 5),
    "kl": (
        lambda z: F.kl_div(z.log_softmax(-1), SOFT, reduction="batchmean"),
        torch.full((6,), 1 / 6, dtype=torch.float64),
    ),
    "half of it": (lambda z: 0.5 * F.cross_entropy(z, Y, ignore_index=-7) + 3, COUNTED / 10),
}


def problem():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4))
    return net, torch.randn(6, 3)


def logits_of_draws(net, x, key):
    seen = []

    def closure():
        seen.append(net(x))
        return seen[-1].sum()

    for rule in draws_of_dropout(key, 2, antithetic=False):
        run_pass(closure, rule)
    return seen


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_it_is_the_published_divergence_weighted_as_the_loss_is(loss):
    net, x = problem()
    compute, weights = PAIR_LOSSES[loss]
    draws = two_draws(lambda: compute(net(x)), key=5)
    one, two = logits_of_draws(net, x, 5)
    truth = (weights * (kl(one, two) + kl(two, one)) / 2).sum()
    torch.testing.assert_close(draws.divergence, truth)
    torch.testing.assert_close(draws.first, compute(one))
    torch.testing.assert_close(draws.second, compute(two))
    parameters = list(net.parameters())
    torch.testing.assert_close(gradients(draws.divergence, parameters), gradients(truth, parameters))


@pytest.mark.parametrize("spelling", ["logits", "probabilities"])
def test_binary_cross_entropy_has_one_distribution_for_every_output(spelling):
    net, x = problem()
    y, weight = (SOFT > 0.25).double(), _weights(6, 1)
    if spelling == "logits":
        compute = lambda z: F.binary_cross_entropy_with_logits(z, y, weight=weight, pos_weight=CLASSES)
        each = weight * torch.where(y > 0, CLASSES, 1.0)
    else:
        compute = lambda z: F.binary_cross_entropy(z.sigmoid(), y, weight=weight)
        each = weight.expand(6, 4)
    draws = two_draws(lambda: compute(net(x)), key=5)
    one, two = logits_of_draws(net, x, 5)
    truth = (each / 24 * (bernoulli(one, two) + bernoulli(two, one)) / 2).sum()
    torch.testing.assert_close(draws.divergence, truth)


def test_two_losses_add_up():
    net, x = problem()
    part = lambda z: F.cross_entropy(z[:, :2], Y.clamp_min(0) % 2)

    def both():
        z = net(x)
        return part(z) + 0.5 * part(z)

    one = two_draws(lambda: part(net(x)), key=5).divergence
    torch.testing.assert_close(two_draws(both, key=5).divergence, 1.5 * one)


MEASURED = json.loads(Path(r_drop_ratio.__file__).with_suffix(".json").read_text())


@pytest.mark.parametrize("row", MEASURED["ratios"], ids=lambda row: str(row["q"]))
def test_to_second_order_it_is_twice_the_explicit_penalty(row):
    """So R-Drop has the explicit effect ``1 + 2 alpha`` times. (Five standard errors: wrongly failing in 6e-7.)"""
    ratio, error = r_drop_ratio.measure(row["q"], draws=12)
    assert abs(ratio - row["ratio"]) < 5 * (error**2 + row["error"] ** 2) ** 0.5
    assert abs(row["ratio"] - 2) < 0.15


def test_the_page_says_what_was_measured():
    page = (Path(__file__).parents[2] / "docs" / "rdrop.md").read_text()
    assert "| q | " + " | ".join(str(row["q"]) for row in MEASURED["ratios"]) + " |" in page
    told = (f"{row['ratio']:.3f} ± {row['error']:.3f}" for row in MEASURED["ratios"])
    assert "| ratio | " + " | ".join(told) + " |" in page


def test_two_passes_and_their_total():
    net, x = problem()
    net.insert(1, nn.BatchNorm1d(8))
    calls = []

    def closure():
        calls.append(1)
        return F.cross_entropy(net(x), Y.clamp_min(0))

    found = r_drop(closure, alpha=0.7, module=net)
    assert len(calls) == 2
    assert net[1].num_batches_tracked == 1
    torch.testing.assert_close(found.total, found.loss + 0.7 * found.divergence)
    found.total.backward()


def test_what_is_refused():
    net, x = problem()
    with pytest.raises(LossNotRecognizedError, match="distributions over classes"):
        r_drop(lambda: F.mse_loss(net(x), 0 * net(x).detach()))
    with pytest.raises(LossNotRecognizedError):
        r_drop(lambda: net(x).square().mean())
    with pytest.raises(NoDropoutSiteError):
        r_drop(lambda: F.cross_entropy(net.eval()(x), Y.clamp_min(0)))
    for options in ({"alpha": -1.0}, {"alpha": None}, {"module": 1}):
        with pytest.raises(InvalidArgumentError):
            r_drop(lambda: F.cross_entropy(net(x), Y), **options)
