"""Draws that differ at the last dropout site only: right, and with one pass through the body."""

import pytest
import torch
import torch.nn.functional as F
from agreement import gradients
from networks import LSTM, MLP, Transformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dropreg.errors import InconsistentPassesError, InvalidArgumentError
from lightning_dropreg.functional import dropout_loss
from lightning_dropreg.numerics.noise import draw_key, fold_key
from lightning_dropreg.passes.last_site import draws_at_last_site, follow, shares_body


def following(step):
    """What runs `step` as a batch does: asking every time whether it is to be watched."""

    def closure():
        return follow(step)()

    return closure


class Unseen(torch.autograd.Function):
    """Doubles, in a way that torch shows no mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        h = F.dropout(torch.tanh(self.norm(self.a(x))), 0.3)
        h = h + 0.1 * torch.rand_like(h)  # its own randomness, the same in all draws
        h = F.dropout(torch.tanh(self.b(Unseen.apply(h))), 0.4)
        return self.c(h + 0.1 * torch.rand_like(h))


class Carrying(MLP):
    """Carries state on, and stops with a site behind which nothing is left but the loss."""

    def __init__(self):
        super().__init__()
        self.before = torch.zeros(5, 4)

    def forward(self, x, factors=None):
        h = torch.tanh(self.a(x)) + self.before
        self.before = h.detach() / 2
        h = F.dropout(h, 0.3)
        h[:, 0] = 0.5  # in place, before the last site
        parts = list(torch.tanh(self.b(h)).split(1, -1))
        return F.dropout(self.c(torch.cat(parts, -1)), 0.4)


class InPlace(MLP):
    """Writes behind the last site into what was computed before it."""

    def forward(self, x, factors=None):
        h = torch.tanh(self.a(x))
        kept = h * 1
        out = F.dropout(self.b(h), 0.4)
        kept += 1
        return self.c(out + kept[:, :3])


class DropsInPlace(MLP):
    def forward(self, x, factors=None):
        return self.c(F.dropout(self.b(torch.tanh(self.a(x))), 0.4, inplace=True))


class Checkpointed(MLP):
    def forward(self, x, factors=None):
        h = checkpoint(lambda x: F.dropout(torch.tanh(self.a(x)), 0.3), x, use_reentrant=False)
        return self.c(F.dropout(torch.tanh(self.b(h)), 0.4))


class Reentrant(MLP):
    def forward(self, x, factors=None):
        region = lambda x: F.dropout(torch.tanh(self.a(x)), 0.3)
        h = checkpoint(region, x.requires_grad_(), use_reentrant=True)
        return self.c(F.dropout(torch.tanh(self.b(h)), 0.4))


class LastInCheckpoint(MLP):
    def forward(self, x, factors=None):
        h = F.dropout(torch.tanh(self.a(x)), 0.3)
        return checkpoint(lambda h: self.c(F.dropout(torch.tanh(self.b(h)), 0.4)), h, use_reentrant=False)


class Attention(nn.Module):
    """The last site is inside a function of torch's."""

    def __init__(self):
        super().__init__()
        self.a, self.attention = nn.Linear(2, 4), nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        h = F.dropout(torch.tanh(self.a(x)), 0.2)
        return self.attention(h, h, h)[0].flatten(0, 1)


NETWORKS = {
    "norm": (Body, lambda: torch.randn(5, 3)),
    "carrying": (Carrying, lambda: torch.randn(5, 3)),
    "in place": (InPlace, lambda: torch.randn(5, 3)),
    "drops in place": (DropsInPlace, lambda: torch.randn(5, 3)),
    "checkpointed": (Checkpointed, lambda: torch.randn(5, 3)),
    "last in checkpoint": (LastInCheckpoint, lambda: torch.randn(5, 3)),
    "recurrent": (LSTM, LSTM.x),
    "transformer": (Transformer, Transformer.x),
    "attention": (Attention, lambda: torch.randn(2, 3, 2)),
}


def problem(name):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    net, x = make(), x()
    state = {k: v.clone() for k, v in net.__dict__.items() if isinstance(v, torch.Tensor)}

    def closure():
        torch.manual_seed(7)
        net.__dict__.update(state)

        def step():
            z = net(x)
            return F.cross_entropy(z, torch.arange(len(z)) % 4)

        return follow(step)()

    return net, closure


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_whole_passes_with_the_earlier_masks_repeated(name, antithetic):
    net, closure = problem(name)
    parameters = list(net.parameters())
    results = []
    for share in (True, False):
        passes = list(draws_at_last_site(closure, key=3, k=4, antithetic=antithetic, share=share))
        losses = torch.stack([done.loss for done in passes])
        results.append((losses, gradients(losses.mean(), parameters)))
    torch.testing.assert_close(results[0], results[1])
    assert len(set(results[0][0].tolist())) == 4


def test_reentrant_checkpoints():
    """torch's ``autograd.grad`` passes by the parameters in them, so by a backward."""
    NETWORKS["reentrant"] = (Reentrant, lambda: torch.randn(5, 3))
    results = []
    for share in (True, False):
        net, closure = problem("reentrant")
        sum(done.loss for done in draws_at_last_site(closure, key=3, k=3, share=share)).backward()
        results.append([p.grad for p in net.parameters()])
    del NETWORKS["reentrant"]
    torch.testing.assert_close(results[0], results[1])


def test_by_hand():
    """The mean over masks of the last site that were drawn with the keys of the draws, all else equal."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = MLP()
    x = net.x()

    def drop(site, j):
        generator = torch.Generator().manual_seed(fold_key(fold_key(9, j), site))
        return (torch.rand(net.mask_shapes()[site], generator=generator, dtype=torch.float32) >= net.ps[site]) / (
            1 - net.ps[site]
        )

    loss = lambda z: F.cross_entropy(z, torch.arange(5) % 4)
    truth = sum(loss(net(x, [drop(0, 0), drop(1, j)])) for j in range(3)) / 3
    draws = draws_at_last_site(following(lambda: loss(net(x))), key=9, k=3)
    ours = sum(done.loss for done in draws) / 3
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(gradients(ours, list(net.parameters())), gradients(truth, list(net.parameters())))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_body_runs_once_forward_and_backward(k, monkeypatch):
    """Counted where it counts: calls of the kernels behind torch.tanh and the nodes of the backward."""
    net, _ = problem("norm")
    x = torch.randn(5, 3)
    seen = {"addmm": 0}

    class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.name()] = seen.get(func.name(), 0) + 1
            return func(*args, **(kwargs or {}))

    with Kernels():
        dropout_loss(lambda: F.cross_entropy(net(x), torch.arange(5) % 4), k=k, sites="last", module=net).backward()
    assert seen["aten::addmm"] == 2 + k  # two layers before the last site, one behind it
    assert seen["aten::tanh"] == seen["aten::tanh_backward"] == 2
    assert net.norm.num_batches_tracked == 1


def test_the_functional_form():
    net, _ = problem("transformer")
    x = Transformer.x()
    closure = lambda: F.cross_entropy(net(x), torch.arange(6) % 4)
    generator = lambda: torch.Generator().manual_seed(1)
    ours = dropout_loss(closure, k=3, sites="last", generator=generator())
    whole = [p.loss for p in draws_at_last_site(closure, key=draw_key(generator()), k=3, share=False)]
    torch.testing.assert_close(ours, torch.stack(whole).mean())
    one = dropout_loss(closure, k=1, sites="last", generator=generator())
    torch.testing.assert_close(one, dropout_loss(closure, k=1, generator=generator()))
    with pytest.raises(InvalidArgumentError, match="sites"):
        dropout_loss(closure, k=2, sites="first")


def test_a_step_that_goes_another_way_is_noticed():
    net, _ = problem("norm")
    calls = []

    def step():
        calls.append(1)
        h = net(torch.ones(5, 3)) if len(calls) == 1 else net(torch.ones(5, 3).neg().neg())
        return F.cross_entropy(h, torch.arange(5) % 4)

    with pytest.raises(InconsistentPassesError, match="called"):
        list(draws_at_last_site(following(step), key=0, k=2))
    calls.clear()
    assert not shares_body(following(step))


def test_what_can_be_shared_is_found_by_trying():
    for name in NETWORKS:
        assert shares_body(problem(name)[1])  # right either way: in whole passes where it must be


def test_a_wrong_value_is_found():
    """State that nobody puts back between passes: the loss of the second draw is another one."""
    torch.set_default_dtype(torch.float64)
    net, x = MLP(), MLP.x()
    state = [0.0]

    def step():
        state[0] += 1
        return F.cross_entropy(net(x) * state[0], torch.arange(5) % 4)

    assert not shares_body(following(step))
