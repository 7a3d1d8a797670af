"""Dropout inside checkpointed parts of a model: the same numbers as without checkpointing."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from agreement import gradients, run
from fits import Classifier, train
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint as checkpoint_by_another_door
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lightning_dropreg as dr
from lightning_dropreg.errors import (
    InconsistentPassesError,
    LossNotRecognizedError,
    UnsupportedOperationError,
    UnsupportedSiteError,
)
from lightning_dropreg.functional import dropout_loss, find_sites, implicit_noise, plain_loss

X, Y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3


class Net(nn.Module):
    """Dropout outside, inside, and in a checkpoint within the checkpoint."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(4))

    def inner(self, h):
        return torch.tanh(F.dropout(self.c(h), 0.2))

    def block(self, h, call):
        h = torch.tanh(self.b(F.dropout(h, 0.3)))
        return F.dropout(call(self.inner, h), 0.25)

    def forward(self, x, mode=None, nested=True):
        call = lambda f, h: f(h) if mode is None else checkpoint(f, h, use_reentrant=mode == "reentrant")
        h = F.dropout(torch.tanh(self.a(x)), 0.4)
        h = call(lambda h: self.block(h, call if nested else lambda f, *a: f(*a)), h)
        return self.d(F.dropout(h, 0.1))


def closures(mode, nested=True):
    net = Net()
    return net, lambda: F.cross_entropy(net(X, mode, nested), Y), lambda: F.cross_entropy(net(X), Y)


def parameter_gradients(value, net):
    net.zero_grad()
    value.backward()
    return torch.cat([p.grad.reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("mode", ["reentrant", "other"])
@pytest.mark.parametrize("nested", [False, True])
def test_antithetic(mode, nested):
    net, closure, plain = closures(mode, nested)
    for part in ("loss", "penalty", "noise"):
        ours, theirs = getattr(run("antithetic", closure), part), getattr(run("antithetic", plain), part)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(parameter_gradients(ours, net), parameter_gradients(theirs, net))


@pytest.mark.parametrize("mode", ["reentrant", "other"])
def test_dropout_and_plain_loss(mode):
    net, closure, plain = closures(mode)
    for k in (1, 3):
        ours, theirs = (dropout_loss(c, k=k, generator=torch.Generator().manual_seed(1)) for c in (closure, plain))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(parameter_gradients(ours, net), parameter_gradients(theirs, net))
    ours, theirs = plain_loss(closure), plain_loss(plain)
    torch.testing.assert_close(parameter_gradients(ours, net), parameter_gradients(theirs, net))
    assert [s.p for s in find_sites(closure)] == [0.4, 0.3, 0.2, 0.25, 0.1]


@pytest.mark.parametrize("estimator", ["double_backward", "exact"])
def test_differentiated_twice(estimator):
    net, closure, plain = closures("other")
    ours, theirs = run(estimator, closure), run(estimator, plain)
    for part in ("loss", "penalty", "noise"):
        torch.testing.assert_close(getattr(ours, part), getattr(theirs, part))
        gradient = [gradients(getattr(one, part), list(net.parameters())) for one in (ours, theirs)]
        torch.testing.assert_close(*gradient)


def test_refusals_of_estimators():
    _, closure, _ = closures("other")
    with pytest.raises(UnsupportedOperationError, match=r"checkpointed.*antithetic"):
        run("forward", closure)
    _, closure, _ = closures("reentrant")
    for estimator in ("double_backward", "exact"):
        with pytest.raises(UnsupportedOperationError, match="use_reentrant=False"):
            run(estimator, closure)


@pytest.mark.parametrize("mode", ["reentrant", "other"])
def test_torch_is_left_as_it_was(mode):
    before = torch_checkpoint._checkpoint_without_reentrant_generator, torch_checkpoint.CheckpointFunction
    _, closure, _ = closures(mode)
    noise = implicit_noise(closure)
    assert (torch_checkpoint._checkpoint_without_reentrant_generator, torch_checkpoint.CheckpointFunction) == before
    noise.backward()
    with pytest.raises(ZeroDivisionError):
        plain_loss(lambda: checkpoint(lambda x: 1 / 0, X, use_reentrant=mode == "reentrant"))
    assert (torch_checkpoint._checkpoint_without_reentrant_generator, torch_checkpoint.CheckpointFunction) == before


def test_fused_sites_in_a_checkpoint():
    torch.set_default_dtype(torch.float64)
    layer = nn.TransformerEncoderLayer(4, 2, 5, 0.1, batch_first=True)
    rnn = nn.LSTM(4, 4, 2, dropout=0.3)
    x = torch.randn(2, 3, 4)

    def closure(wrapped=True):
        call = (lambda f, x: checkpoint(f, x, use_reentrant=False)) if wrapped else (lambda f, x: f(x))
        return F.mse_loss(call(lambda x: rnn(layer(x))[0], x), x)

    parameters = [*layer.parameters(), *rnn.parameters()]
    for estimator in ("antithetic", "double_backward"):
        ours, theirs = run(estimator, closure).penalty, run(estimator, lambda: closure(False)).penalty
        torch.testing.assert_close(gradients(ours, parameters), gradients(theirs, parameters))


def test_checkpoint_sequential():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.3)) for _ in range(4))).double()
    ours = run("antithetic", lambda: F.cross_entropy(checkpoint_sequential(net, 2, X, use_reentrant=False), Y)).penalty
    theirs = run("antithetic", lambda: F.cross_entropy(net(X), Y)).penalty
    torch.testing.assert_close(parameter_gradients(ours, net), parameter_gradients(theirs, net))


def test_an_unknown_loss_on_a_reentrant_checkpoint_is_seen():
    net = Net()

    def closure():
        h = checkpoint(lambda x: F.dropout(net.a(x), 0.5), net.d(X), use_reentrant=True)
        return F.cross_entropy(net.b(h), Y) + h.abs().mean()

    with pytest.raises(LossNotRecognizedError, match="depends on the dropout site"):
        run("antithetic", closure)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * F.dropout(x, 0.5)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_unknown_recomputation_is_refused():
    net = nn.Linear(3, 3).double()
    with pytest.raises(UnsupportedSiteError, match=r"custom torch\.autograd\.Function"):
        find_sites(lambda: F.cross_entropy(Doubled.apply(net(X)), Y))
    inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    checkpoint_by_another_door(inner)
    with pytest.raises(UnsupportedSiteError, match=r"not made by torch\.utils"):
        find_sites(lambda: F.cross_entropy(inner(net(X)), Y))


def test_a_part_that_changes_is_refused():
    net, calls = nn.Linear(3, 3).double(), []

    def part(x):
        calls.append(0)
        return F.dropout(net(x), 0.5 if len(calls) % 2 else 0.4)

    x = X.clone().requires_grad_()
    loss = plain_loss(lambda: F.cross_entropy(checkpoint(part, x, use_reentrant=True), Y))
    with pytest.raises(InconsistentPassesError, match="computed again for the backward"):
        loss.backward()


def test_a_teacher_without_gradient_is_no_recomputation():
    teacher, net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double(), nn.Linear(3, 3).double()

    def closure():
        with torch.no_grad():
            target = teacher(X)
        return F.mse_loss(F.dropout(net(X), 0.5), target)

    assert len(find_sites(closure)) == 2


class Reentrant(Classifier):
    def training_step(self, batch, batch_idx):
        h = checkpoint(self.net[:4], batch[0].requires_grad_(), use_reentrant=True)
        return F.cross_entropy(self.net[4](h), batch[1])


def test_noise_with_a_reentrant_checkpoint():
    with pytest.raises(UnsupportedOperationError, match=r"injection='loss'.*use_reentrant=False"):
        train([dr.ImplicitNoise(injection="after_backward")], make=Reentrant)
    ours = train([dr.ImplicitNoise()], make=Reentrant, log_every_n_steps=1)
    torch.testing.assert_close(ours.gradients, train([dr.ImplicitNoise()]).gradients)
