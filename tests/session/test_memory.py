"""One autograd graph at a time gives the gradients of all at once."""

import functools
import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, train
from lightning import Callback

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedOperationError


def pairs_of_callbacks():
    def draws(*more):
        return lambda low: [dr.MiniBatchDropout(k=4, low_memory=low), *(make(low) for make in more)]

    def penalty(**options):
        return lambda low: dr.ExplicitPenalty(low_memory=low, **options)

    def noise(**options):
        return lambda low: dr.ImplicitNoise(low_memory=low, **options)

    yield "draws", draws()
    yield "draws and their noise", draws(noise(source="dropout", injection="loss"))
    yield "Algorithm 4", draws(noise(injection="loss"))
    yield "Algorithm 4, after", draws(noise(injection="after_backward"))
    for curvature in ("loss_hessian", "identity", "loss_jacobian"):
        yield f"Algorithm 2, {curvature}", lambda low, c=curvature: [penalty(curvature=c)(low), noise()(low)]
    yield "penalty", lambda low: [penalty(strength=2.0, every_n_steps=2)(low)]
    yield "noise", lambda low: [noise(strength=0.5)(low)]
    yield "after", lambda low: [penalty()(low), noise(injection="after_backward")(low)]
    yield "rows", lambda low: [penalty(batch_fraction=0.5)(low), noise(batch_fraction=0.5)(low)]
    yield "different rows", lambda low: [penalty()(low), noise(batch_fraction=0.5, injection="loss")(low)]


class Weighted(Classifier):
    """Two losses with a trained weight, and a layer of normalization: state, and curvature in the weight."""

    def __init__(self, norm=True):
        super().__init__(norm=norm)
        self.log_weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        loss = self.log_weight.exp() * F.cross_entropy(z, y) + F.mse_loss(z[:, 0], x[:, 0])
        self.log("train_loss", loss)
        return {"loss": loss, "logits": z}


@pytest.mark.parametrize(("name", "make"), list(pairs_of_callbacks()))
def test_gradients_are_the_same(name, make):
    options = dict(make=Weighted, model_options={"norm": "rows" not in name}, log_every_n_steps=1)
    one_by_one, together = (train(make(low), **options) for low in (True, False))
    torch.testing.assert_close(one_by_one.gradients, together.gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one_by_one.losses, together.losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(one_by_one.named_buffers()), dict(together.named_buffers()))


@pytest.mark.parametrize(
    "make",
    [
        lambda low: [dr.MiniBatchDropout(k=3, low_memory=low), dr.ImplicitNoise(source="dropout", injection="loss")],
        lambda low: [dr.ExplicitPenalty(low_memory=low), dr.ImplicitNoise(low_memory=low)],
    ],
)
def test_logged_noise_norm_is_the_same(make):
    norms = []
    for low in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(make(low), log_every_n_steps=1, max_steps=1)
        trainer.fit(Classifier(), make_loader())
        norms.append(trainer.logged_metrics["dropreg/noise_norm"])
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


class Counting(Classifier):
    """Counts the tensors that autograd keeps for a backward."""

    def __init__(self, from_step=3):
        super().__init__()
        self.from_step = from_step
        self.kept = SimpleNamespace(alive=0, most=0)  # an object of its own, which no repetition puts back

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == self.from_step:  # steps 0, 1 and 2 are looked at before they are taken
            self.kept.most = 0

    def training_step(self, batch, batch_idx):
        count = self.kept

        class Kept:
            def __init__(kept, value):
                kept.value = value.detach()  # an output with its node would hold itself
                count.alive += 1
                count.most = max(count.most, count.alive)

            def __del__(kept):
                count.alive -= 1

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
            return super().training_step(batch, batch_idx)


def most_alive(callbacks, from_step=3):
    gc.collect()
    options = dict(make=Counting, model_options={"from_step": from_step})
    return train(callbacks, log_every_n_steps=100, max_steps=4, **options).kept.most


def test_graphs_alive_at_a_time():
    one = most_alive([])
    assert most_alive([dr.MiniBatchDropout(k=16)]) == most_alive([dr.MiniBatchDropout(k=2)]) < 2 * one
    assert most_alive([dr.MiniBatchDropout(k=16, low_memory=False)]) > 10 * one
    pair, in_turn = (
        most_alive([dr.ExplicitPenalty(low_memory=low), dr.ImplicitNoise(low_memory=low)]) for low in (False, True)
    )
    assert in_turn <= 0.6 * pair


@pytest.mark.parametrize("from_step", [0, 1])
@pytest.mark.parametrize("kind", ["in turn", "draws"])
def test_looks_hold_one_graph_at_a_time_too(kind, from_step):
    one = most_alive([])
    low = [dr.ExplicitPenalty(low_memory=True), dr.ImplicitNoise(low_memory=True)]
    callbacks = low if kind == "in turn" else [dr.MiniBatchDropout(k=4)]
    assert most_alive(callbacks, from_step) < 2 * one


class Hooked(Classifier):
    """A hook on a parameter doubles its gradient; it must do so once."""

    def __init__(self):
        super().__init__()
        self.net[0].weight.register_hook(lambda grad: 2 * grad)


def test_hooks_on_parameters_act_once():
    held, asked = (train([dr.MiniBatchDropout(k=3, low_memory=low)], make=Hooked) for low in (False, True))
    torch.testing.assert_close(asked.gradients, held.gradients)
    with pytest.raises(UnsupportedOperationError, match="low_memory=False"):
        train([dr.ExplicitPenalty(low_memory=True)], make=Hooked)


class Shared(Classifier):
    """Computes a part of its graph before the step."""

    def on_train_batch_start(self, batch, batch_idx):
        self.scale = self.net[0].bias.square().mean()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale


def test_shared_graph_is_refused_with_a_remedy():
    with pytest.raises(UnsupportedOperationError, match="low_memory=False"):
        train([dr.MiniBatchDropout(k=2)], make=Shared)
    train([dr.MiniBatchDropout(k=2, low_memory=False)], make=Shared, max_steps=1)


def test_bad_arguments():
    for make in (dr.ExplicitPenalty, dr.ImplicitNoise):
        with pytest.raises(InvalidArgumentError, match="low_memory"):
            make(estimator="forward", low_memory=True)
    for make in (dr.ExplicitPenalty, dr.ImplicitNoise, dr.MiniBatchDropout):
        with pytest.raises(InvalidArgumentError, match="low_memory"):
            make(low_memory=2)


def test_noise_after_the_backward_takes_no_passes_of_its_own():
    """Beside a penalty with the same settings it is one more backward of the pair's graph."""

    passes = []
    note = passes.append  # a list of the step's own would be put back

    class Passes(Classifier):
        def training_step(self, batch, batch_idx):
            note(batch_idx)
            return super().training_step(batch, batch_idx)

    model = train([dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")], make=Passes)
    assert len(model.losses) == 4
    assert passes.count(3) == 2  # the others are looked at as well


class Gradients(Classifier):
    """Notes in every run of the step whether the gradients of the step before are still there."""

    look = None
    seen = None

    def training_step(self, batch, batch_idx):
        first = next(self.parameters())
        with torch._C.DisableTorchFunction():  # unnoticed
            type(self).seen(first.grad is not None)
        if self.look is not None:
            self.look(first)
        return super().training_step(batch, batch_idx)


class Clears(Gradients):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad()


class Clearing(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)


class Optimizes(Gradients):
    def configure_optimizers(self):
        return Clearing(self.parameters(), lr=0.1)


class Reads(Gradients):
    def look(self, parameter):
        return parameter.grad


class Watching(Callback):
    def on_before_zero_grad(self, trainer, module, optimizer):
        assert trainer.global_step == 0 or next(module.parameters()).grad is not None


def gradients_seen(callbacks, monkeypatch, make=Gradients, **options):
    seen = []
    monkeypatch.setattr("lightning_dropreg.session.looking.is_due", lambda step: False)  # no looks in between
    monkeypatch.setattr(Gradients, "seen", seen.append)  # a list of the module's own would be put back
    make_trainer(callbacks, max_steps=2, **options).fit(make(), make_loader())
    return seen


@pytest.mark.parametrize(
    ("make", "callbacks", "kept"),
    [
        (Gradients, [], False),
        (Gradients, [Watching], True),
        (Clears, [], True),
        (Optimizes, [], True),
        (Reads, [], True),
    ],
)
def test_stale_gradients_go_unless_somebody_may_look(make, callbacks, kept, monkeypatch):
    seen = gradients_seen([dr.MiniBatchDropout(k=3), *(new() for new in callbacks)], monkeypatch, make)
    assert seen[-6:-3] == [False] * 3
    assert seen[-3:] == ([True] * 3 if kept else [True, False, False])


def test_gradients_that_accumulate_stay(monkeypatch):
    """The second micro-batch adds to the gradients of the first."""
    seen = gradients_seen([dr.MiniBatchDropout(k=2)], monkeypatch, accumulate_grad_batches=2)
    assert seen[-8:] == [False, False, True, True, True, False, True, True]


class Rehearsing(Gradients):
    """Adds the gradient of a loss that another call of the step makes, after the backward of the first."""

    def on_after_backward(self):
        before = [p.grad.clone() for p in self.parameters()]
        loss = self.training_step(next(iter(make_loader())), 0)
        with torch._C.DisableTorchFunction():
            assert all(torch.equal(p.grad, g) for p, g in zip(self.parameters(), before, strict=True))
        loss.backward()


class Stepping(Callback):
    """Calls the step between two batches of an accumulation."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        module.training_step(batch, batch_idx)
        assert all(p.grad is not None for p in module.parameters())


class Wrapping(Callback):
    """Is there in ``on_before_zero_grad`` by a wrapper, which `functools.wraps` makes look like the original."""

    @functools.wraps(Callback.on_before_zero_grad)
    def on_before_zero_grad(self, trainer, module, optimizer):
        assert trainer.global_step == 0 or next(module.parameters()).grad is not None


def test_gradients_are_there_when_somebody_else_calls_the_step(monkeypatch):
    gradients_seen([dr.MiniBatchDropout(k=3)], monkeypatch, Rehearsing)
    gradients_seen([dr.MiniBatchDropout(k=3), Stepping()], monkeypatch, accumulate_grad_batches=2)
    gradients_seen([dr.MiniBatchDropout(k=3), Wrapping()], monkeypatch)


def test_low_memory_pairs_let_go_of_stale_gradients_too(monkeypatch):
    seen = gradients_seen([dr.ExplicitPenalty(low_memory=True)], monkeypatch)
    assert seen[-3:] == [True, True, False]
