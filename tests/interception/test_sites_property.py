"""Random small networks out of every construct that drops: identities between the estimators, and the exact mean.

Nothing here is statistical. For one key the antithetic form with a small step is the form of forward mode, and the
noise is the same from all; the mean of the antithetic form over all directions of the masks is the exact penalty; and
the mean of the double-backward form over all its sign vectors is the exact penalty as well.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from agreement import gradients, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dropreg import drop
from lightning_dropreg.estimators.curvature import element_weights, quadratic_form
from lightning_dropreg.functional import explicit_penalty, find_sites
from lightning_dropreg.passes import Directions, Perturb, Tap, run_pass

N, L, D, C = 2, 3, 4, 3  # examples, length, width, classes

probabilities = st.sampled_from([0.1, 0.35, 0.6])


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class First(nn.Module):
    """Takes the first of a module's results; attention gets its input three times."""

    def __init__(self, inner, times=1, **options):
        super().__init__()
        self.inner, self.times, self.options = inner, times, options

    def forward(self, x):
        return self.inner(*[x] * self.times, **self.options)[0]


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def fused_attention(p):
    def attend(x):
        heads = x.reshape(N, L, 2, D // 2).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads.tanh(), heads.square(), dropout_p=p, is_causal=True)
        return out.transpose(1, 2).reshape(N, L, D)

    return Apply(attend)


def locked(p):
    """Dropout whose mask is shared over time."""
    return Apply(lambda x: F.dropout1d(x.transpose(1, 2), p).transpose(1, 2))


def drop_path(x, drop_prob):
    """As timm has it."""
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
    random_tensor.div_(keep_prob)
    return x * random_tensor


@st.composite
def layers(draw):
    """One block ``(N, L, D) -> (N, L, D)``."""
    p = draw(probabilities)
    kind = draw(st.sampled_from(sorted(BLOCKS)))
    return BLOCKS[kind](p)


BLOCKS = {
    "dropout": lambda p: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(p)),
    "inplace": lambda p: nn.Sequential(nn.Linear(D, D), nn.Dropout(p, inplace=True), nn.GELU()),
    "locked": lambda p: nn.Sequential(nn.Linear(D, D), locked(p), nn.Tanh()),
    "alpha": lambda p: nn.Sequential(nn.Linear(D, D), nn.SELU(), nn.AlphaDropout(p)),
    "feature_alpha": lambda p: nn.Sequential(nn.Linear(D, D), nn.FeatureAlphaDropout(p), nn.SELU()),
    "norm": lambda p: nn.Sequential(nn.Dropout(p), nn.LayerNorm(D)),
    "lstm": lambda p: First(nn.LSTM(D, D, 2, dropout=p, batch_first=True)),
    "lstm_bidirectional": lambda p: First(nn.LSTM(D, D // 2, 2, dropout=p, batch_first=True, bidirectional=True)),
    "lstm_projected": lambda p: nn.Sequential(First(nn.LSTM(D, 5, 2, dropout=p, proj_size=D))),
    "gru": lambda p: First(nn.GRU(D, D, 2, dropout=p, batch_first=True)),
    "rnn": lambda p: First(nn.RNN(D, D, 3, dropout=p)),
    "attention": lambda p: First(nn.MultiheadAttention(D, 2, dropout=p, batch_first=True), 3, need_weights=False),
    "attention_weights": lambda p: First(nn.MultiheadAttention(D, 2, dropout=p, batch_first=True), 3),
    "fused_attention": lambda p: nn.Sequential(nn.Linear(D, D), fused_attention(p)),
    "encoder": lambda p: nn.TransformerEncoderLayer(D, 2, 5, p, batch_first=True),
    "twice": lambda p: nn.Sequential(*[nn.Sequential(nn.Linear(D, D), nn.Dropout(p))] * 2),
    "own": lambda p: nn.Sequential(nn.Linear(D, D), Apply(lambda x: drop(x, p, (N, 1, D))), nn.Tanh()),
    "drop_path": lambda p: nn.Sequential(nn.Linear(D, D), Apply(lambda x: x + drop_path(x.tanh(), p))),
}

TARGETS = torch.arange(N * L) % C
STEP_LOSSES = {
    "cross_entropy": lambda z: F.cross_entropy(z, TARGETS, label_smoothing=0.1),
    "masked": lambda z: (F.cross_entropy(z, TARGETS, reduction="none") * (TARGETS > 0)).sum() / 3,
    "ignored": lambda z: F.cross_entropy(z, TARGETS, ignore_index=1, reduction="sum"),
    "mse": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "poisson_and_bce": lambda z: (
        F.poisson_nll_loss(z[:, :1], TARGETS[:, None].double())
        + 0.5 * F.binary_cross_entropy_with_logits(z[:, 1:], torch.ones(N * L, C - 1))
    ),
}


@st.composite
def problems(draw):
    """A network of up to three blocks, some of them checkpointed, a loss on it, and whether a block is checkpointed."""
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    blocks = draw(st.lists(layers(), min_size=1, max_size=3))
    checkpointed = draw(st.booleans())
    if checkpointed:
        blocks[-1] = Checkpointed(blocks[-1])
    net = nn.Sequential(nn.Linear(2, D), *blocks, nn.Linear(D, C))
    loss = STEP_LOSSES[draw(st.sampled_from(sorted(STEP_LOSSES)))]
    x = torch.randn(N, L, 2)
    return list(net.parameters()), lambda: loss(net(x).flatten(0, 1)), checkpointed


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(problems(), st.integers(0, 2**40), st.sampled_from(["loss_hessian", "identity", "loss_jacobian"]))
def test_same_directions_same_numbers(problem, key, curvature):
    parameters, closure, checkpointed = problem
    a = run("antithetic", closure, key, curvature=curvature)
    d = run("double_backward", closure, key, curvature=curvature)
    others = [d] if checkpointed else [d, run("forward", closure, key, curvature=curvature)]
    for other in others:
        torch.testing.assert_close(a.loss, other.loss, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(a.noise, other.noise, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            gradients(a.noise, parameters), gradients(other.noise, parameters), rtol=1e-3, atol=1e-5
        )
    for other in others[1:]:
        torch.testing.assert_close(a.penalty, other.penalty, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            gradients(a.penalty, parameters), gradients(other.penalty, parameters), rtol=1e-3, atol=1e-5
        )


class Signs(Directions):
    """Directions that are given instead of drawn."""

    def __init__(self, directions):
        super().__init__(0)
        self.given = iter(directions)

    def draw(self, site, like):
        return next(self.given)


def basis(closure):
    """For each mask entry of each site, the direction that is its noise's standard deviation there and 0 elsewhere."""
    sites = find_sites(closure)
    for i, site in enumerate(sites):
        count = torch.Size(site.mask_shape).numel()
        for entry in range(count):
            yield [
                (torch.eye(count)[entry] * site.variance**0.5).reshape(s.mask_shape)
                if j == i
                else torch.zeros(s.mask_shape)
                for j, s in enumerate(sites)
            ]


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(problems(), st.sampled_from(["loss_hessian", "identity", "loss_jacobian"]))
def test_mean_over_all_directions_is_exact(problem, curvature):
    """``E[u u^T]`` of independent signs is the sum over their entries, one at a time: a finite sum, no statistics."""
    _, closure, _ = problem
    total = 0.0
    for direction in basis(closure):
        plus, minus = (run_pass(closure, Perturb(Signs(direction), e), record_losses=True) for e in (1e-4, -1e-4))
        for a, b, w in zip(plus.losses, minus.losses, element_weights(plus.loss, plus.losses)):
            z, u = (a.outputs + b.outputs) / 2, (a.outputs - b.outputs) / 2e-4
            slope = a.per_element(a.elements - b.elements) / 2e-4
            total = total + quadratic_form(curvature, a, z, u, slope, w).detach() / 2
    expected = explicit_penalty(closure, estimator="exact", curvature=curvature)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-7)


def test_mean_over_all_signs_of_double_backward_is_exact():
    """The vectors ``v`` of the double backward, over all sign vectors of two examples with three outputs."""
    torch.set_default_dtype(torch.float64)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 3))
    x, y = torch.randn(2, 2), torch.tensor([0, 2])
    closure = lambda: F.cross_entropy(net(x), y)
    tap = Tap(Directions(0))
    done = run_pass(closure, tap, record_losses=True)
    (loss,), (weights,) = done.losses, element_weights(done.loss, done.losses)
    total = torch.zeros(())
    for signs in itertools.product([-1.0, 1.0], repeat=6):
        v = loss.hessian_factor(loss.outputs, weights, torch.tensor(signs).reshape(2, 3))
        (gradient,) = torch.autograd.grad(loss.outputs, tap.taps, v, retain_graph=True)
        total = total + tap.sites[0].variance / 2 * gradient.square().sum() / 2**6
    torch.testing.assert_close(total, explicit_penalty(closure, estimator="exact"))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_has_a_site(name):
    torch.set_default_dtype(torch.float64)
    block, x = BLOCKS[name](0.35), torch.randn(N, L, D, requires_grad=True)
    sites = find_sites(lambda: block(x).sum())
    assert sites
    assert all(abs(site.p - 0.35) < 1e-9 for site in sites)
