"""Manual optimization, with one and with two optimizers, against the same steps written out by hand."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from by_hand import drop, estimate, pair
from fits import Classifier, make_loader, make_trainer, train
from lightning.pytorch.plugins import MixedPrecision
from own_modules import GAN, Manual, bce
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import errors
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Off, run_pass


def noise_alone(c, key):
    plus, minus = pair(c, key)
    return (plus + minus) / 2 + (plus - minus) / 0.2


def algorithm_2(c, key):
    e = estimate(c, key)
    return e.loss + 2 * e.penalty + e.noise


def algorithm_4(c, key):
    plus, minus = pair(c, key)
    return sum(drop(c, key, j) for j in range(4)) / 4 + 0.75**0.5 * (plus - minus) / 0.2


def penalty_forward(c, key):
    e = estimate(c, key, "forward")
    return e.loss + e.penalty


METHODS = {
    "noise": (lambda: [dr.ImplicitNoise()], noise_alone),
    "k": (lambda: [dr.MiniBatchDropout(3)], lambda c, key: sum(drop(c, key, j) for j in range(3)) / 3),
    "dropout noise": (
        lambda: [dr.ImplicitNoise(source="dropout", injection="after_backward")],
        lambda c, key: run_pass(c, Off()).loss + (drop(c, key, 0) - drop(c, key, 1)) / 2**0.5,
    ),
    "algorithm 2": (lambda: [dr.ExplicitPenalty(2.0), dr.ImplicitNoise()], algorithm_2),
    "algorithm 4": (lambda: [dr.MiniBatchDropout(4), dr.ImplicitNoise()], algorithm_4),
    "low memory": (
        lambda: [dr.ExplicitPenalty(2.0, low_memory=True), dr.ImplicitNoise(low_memory=True)],
        algorithm_2,
    ),
    "forward": (lambda: [dr.ExplicitPenalty(estimator="forward")], penalty_forward),
}


def step(total, net, optimizer, clip=None):
    gradients = torch.autograd.grad(total, list(net.parameters()))
    for p, g in zip(net.parameters(), gradients):
        p.grad = g
    for _ in range(2 if clip else 0):
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


@pytest.mark.parametrize("toggles", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_two_optimizers(method, toggles):
    make, total = METHODS[method]
    L.seed_everything(7, verbose=False)
    model = GAN(toggles)
    g, d = copy.deepcopy(model.g), copy.deepcopy(model.d)
    trainer = make_trainer(make(), log_every_n_steps=1)
    trainer.fit(model, make_loader(12))
    opt_g, opt_d = (torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5) for net in (g, d))
    for index, (x, _) in enumerate(make_loader(12)):
        key = fold_key(7, 0, index, 0)
        before = copy.deepcopy(g)
        step(total(lambda: bce(d(g(x)), 1.0), key), g, opt_g, clip=0.1)
        opt_g.param_groups[0]["lr"] /= 2

        def second():
            fake = before(x)
            d(fake)  # the sites of the first loss come first
            again = g(x)
            return bce(d(fake.detach()), 0.0) + 0.5 * bce(d(again.detach()), 0.0) + bce(d(x[:, 1:]), 1.0)

        step(total(second, key), d, opt_d)
    for ours, by_hand in zip(model.parameters(), [*g.parameters(), *d.parameters()]):
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-11)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.3 / 4
    assert "dropreg/loss" in trainer.callback_metrics


@pytest.mark.parametrize("way", ["plain", "raw", "closure"])
@pytest.mark.parametrize("method", METHODS)
def test_one_optimizer(method, way):
    make, total = METHODS[method]
    model = train(make(), seed=7, make=Manual, model_options={"way": way})
    L.seed_everything(7, verbose=False)
    net = Classifier().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for index, (x, y) in enumerate(make_loader()):
        step(total(lambda: F.cross_entropy(net(x), y), fold_key(7, 0, index, 0)), net, optimizer)
    for ours, by_hand in zip(model.parameters(), net.parameters()):
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("injection", ["loss", "after_backward"])
def test_mixed_precision(injection):
    """bf16-mixed: penalty and noise as in float32. A scaler alone changes nothing but rounding."""
    callbacks = lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection=injection)]

    class Float(Manual):
        def __init__(self):
            super().__init__(p=0.1)
            self.net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 64), *self.net[1:])
            self.net[-1] = nn.Linear(64, 3)
            self.float()

    def fit(seed=0, **options):
        loader = make_loader(24, dtype=torch.float32)
        return train(callbacks(), seed, make=Float, loader=loader, log_every_n_steps=1, **options)

    def measured(seed, precision):
        metrics = fit(seed, precision=precision, max_steps=1).trainer.callback_metrics
        return torch.stack([metrics[f"dropreg/{name}"] for name in ("explicit_penalty", "noise_norm")])

    means = [torch.stack([measured(s, p) for s in range(3)]).mean(0) for p in ("bf16-mixed", "32-true")]
    torch.testing.assert_close(*means, rtol=0.02, atol=0)

    class OnlyScaler(MixedPrecision):
        def forward_context(self):
            return torch.autocast("cpu", enabled=False)

    scaled = fit(plugins=OnlyScaler("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12)))
    plain = fit()
    for a, b in zip(scaled.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(scaled.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    metrics = [model.trainer.callback_metrics["dropreg/noise_norm"] for model in (scaled, plain)]
    torch.testing.assert_close(*metrics, rtol=1e-4, atol=0)


@pytest.mark.parametrize("callback", [dr.ExplicitPenalty, dr.ImplicitNoise])
def test_strength_zero_is_the_model_without_dropout(callback):
    runs = [train([callback(0.0)], make=Manual), train(make=Manual, model_options={"p": 0.0})]
    assert all(torch.equal(a, b) for a, b in zip(*(run.parameters() for run in runs)))
    one = train([dr.MiniBatchDropout(1)], make=Manual)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), train(make=Manual).parameters()))


def test_penalty_every_other_batch():
    one, every = (train([dr.ExplicitPenalty(every_n_steps=n)], make=Manual, max_steps=2) for n in (1, 2))
    double = train([dr.ExplicitPenalty(2.0)], make=Manual, max_steps=2)
    torch.testing.assert_close(every.gradients[0], double.gradients[0])
    assert not torch.equal(every.gradients[1], double.gradients[1])
    assert not torch.equal(every.gradients[1], one.gradients[1])


def test_state_advances_once():
    model = train([dr.ImplicitNoise()], make=Manual, model_options={"norm": True})
    plain = train(make=Manual, model_options={"norm": True, "p": 0.0})
    assert model.net[1].num_batches_tracked == plain.net[1].num_batches_tracked == 4
    trainer = make_trainer([dr.MiniBatchDropout(3)])
    model = GAN()
    trainer.fit(model, make_loader(12))
    assert trainer.global_step == 4  # two optimizers, two batches
    assert trainer.callback_metrics["g"] < 2 * 1.5  # a sum over two batches, not over the passes too


def test_nothing_stays_patched_when_the_step_raises():
    L.seed_everything(0, verbose=False)
    model, trainer = Manual(way="raises"), make_trainer([dr.ImplicitNoise()])
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer.fit(model, make_loader())
    for name in ("training_step", "manual_backward", "clip_gradients", "log"):
        assert name not in model.__dict__
    for optimizer in (trainer.optimizers[0], *trainer.strategy._lightning_optimizers):
        assert not {"step", "zero_grad"} & optimizer.__dict__.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_a_backward_past_lightning_is_refused():
    with pytest.raises(errors.UnsupportedModuleError, match=r"self\.manual_backward\(loss\)"):
        train([dr.ImplicitNoise()], make=Manual, model_options={"way": "direct"})


def test_closure_called_several_times():
    class Lbfgs(Manual):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

        def training_step(self, batch, batch_idx):
            def closure():
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            self.optimizers().step(closure)

    with pytest.raises(errors.UnsupportedModuleError, match="LBFGS"):
        train([dr.ImplicitNoise()], make=Lbfgs)
