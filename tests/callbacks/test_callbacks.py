"""The callbacks in a real Trainer: every composition against the definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from by_hand import Recording, by_hand, drop, estimate, pair
from fits import Classifier, make_loader, same, train

import lightning_dropreg as dr
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Off, run_pass

OFF = {"model_options": {"p": 0.0}}


def test_minibatch_dropout():
    by_hand([dr.MiniBatchDropout(3)], lambda c, key: sum(drop(c, key, j) for j in range(3)) / 3)


@pytest.mark.parametrize("injection", ["auto", "loss", "after_backward"])
def test_minibatch_dropout_with_dropout_noise(injection):
    def expected(c, key):
        losses = [drop(c, key, j) for j in range(4)]
        return sum(losses) / 4 + (0.5 * (1 - 1 / 4)) ** 0.5 * (losses[0] - losses[1])

    by_hand([dr.MiniBatchDropout(4), dr.ImplicitNoise(source="dropout", injection=injection)], expected)


@pytest.mark.parametrize("injection", ["auto", "loss", "after_backward"])
def test_algorithm_4(injection):
    def expected(c, key):
        plus, minus = pair(c, key)
        return sum(drop(c, key, j) for j in range(4)) / 4 + 0.75**0.5 * 1.5 * (plus - minus) / 0.2

    by_hand([dr.ImplicitNoise(strength=1.5, injection=injection), dr.MiniBatchDropout(4)], expected)


@pytest.mark.parametrize("injection", ["auto", "loss"])
def test_noise_alone(injection):
    def expected(c, key):
        plus, minus = pair(c, key)
        return (plus + minus) / 2 + 0.5 * (plus - minus) / 0.2

    by_hand([dr.ImplicitNoise(strength=0.5, injection=injection)], expected)


def test_noise_alone_after_backward():
    def expected(c, key):
        plus, minus = pair(c, key)
        return run_pass(c, Off()).loss + 0.5 * (plus - minus) / 0.2

    by_hand([dr.ImplicitNoise(strength=0.5, injection="after_backward")], expected)


@pytest.mark.parametrize("injection", ["auto", "loss", "after_backward"])
def test_dropout_noise_alone(injection):
    def expected(c, key):
        return run_pass(c, Off()).loss + (drop(c, key, 0) - drop(c, key, 1)) / 2**0.5

    by_hand([dr.ImplicitNoise(source="dropout", injection=injection)], expected)


@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
@pytest.mark.parametrize("curvature", ["loss_hessian", "identity", "loss_jacobian"])
def test_penalty_alone(estimator, curvature):
    def expected(c, key):
        e = estimate(c, key, estimator, curvature=curvature)
        return e.loss + 2 * e.penalty

    by_hand([dr.ExplicitPenalty(strength=2.0, estimator=estimator, curvature=curvature)], expected)


@pytest.mark.parametrize("injection", ["auto", "loss", "after_backward"])
@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward"])
def test_algorithm_2(estimator, injection):
    def expected(c, key):
        e = estimate(c, key, estimator)
        return e.loss + 2 * e.penalty + 0.5 * e.noise

    callbacks = [
        dr.ImplicitNoise(0.5, estimator=estimator, injection=injection),
        dr.ExplicitPenalty(2.0, estimator=estimator),
    ]
    by_hand(callbacks, expected)


def test_every_n_steps():
    model = train([dr.ExplicitPenalty(every_n_steps=2)])
    both = [train([dr.ExplicitPenalty(strength=s)]) for s in (2.0, 0.0)]
    torch.testing.assert_close(model.gradients[0], both[0].gradients[0], rtol=0, atol=0)
    # the second step starts from the same weights as in the run of twice the strength and has no penalty
    assert not torch.equal(model.gradients[1], both[0].gradients[1])


@pytest.mark.parametrize("callback", [dr.ExplicitPenalty, dr.ImplicitNoise])
def test_strength_zero_is_the_run_without_dropout(callback):
    assert same(train([callback(strength=0.0)]), train(**OFF))


def test_one_draw_is_the_untouched_run():
    plain = train()
    assert same(train([dr.MiniBatchDropout(1)]), plain)
    assert same(train([dr.MiniBatchDropout(1), dr.ImplicitNoise()]), plain)
    assert same(train([dr.MiniBatchDropout(1), dr.ImplicitNoise(source="dropout")]), plain)


def test_every_combination_trains_or_says_why():
    makers = {
        "k": lambda: dr.MiniBatchDropout(2),
        "r": dr.ExplicitPenalty,
        "n": dr.ImplicitNoise,
    }
    for size in range(4):
        for names in itertools.combinations(makers, size):
            callbacks = [makers[name]() for name in names]
            if {"k", "r"} <= set(names):
                with pytest.raises(dr.errors.CompositionError, match="twice|once more"):
                    train(callbacks)
            else:
                assert all(torch.isfinite(g).all() for g in train(callbacks).gradients)


def test_accumulation_equals_the_mean_of_the_micro_batches():
    for injection in ("loss", "after_backward"):
        callbacks = [dr.ExplicitPenalty(), dr.ImplicitNoise(injection=injection)]
        accumulated = train(callbacks, make=Recording, accumulate_grad_batches=2, seed=7)
        _, weights = accumulated.first
        gradient = 0.0
        for index, (x, y) in enumerate(itertools.islice(make_loader(), 2)):
            net = Recording().net
            net.load_state_dict(weights)
            e = estimate(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y), fold_key(7, 0, 0, index))
            gradients = torch.autograd.grad((e.loss + e.penalty + e.noise) / 2, list(net.parameters()))
            gradient = gradient + torch.cat([g.reshape(-1) for g in gradients])
        torch.testing.assert_close(accumulated.gradients[0], gradient, rtol=1e-10, atol=1e-12)


def test_sparse_gradients():
    class Sparse(Classifier):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(3, 4, sparse=True, dtype=torch.float64)

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + self.embedding(batch[1]), batch[1]), batch_idx)

        def on_before_optimizer_step(self, optimizer):
            assert self.embedding.weight.grad.is_sparse

    for callbacks in ([dr.ExplicitPenalty(), dr.ImplicitNoise()], [dr.MiniBatchDropout(2), dr.ImplicitNoise()]):
        train(callbacks, make=Sparse, log_every_n_steps=1)
