"""The callbacks in a real Trainer: every composition against the definition, and the runs that must not change."""

import copy
import itertools
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from conftest import Classifier, make_loader, make_trainer, train

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.passes import Drop, Off, Perturb, run_pass
from lightning_dropreg.sites import Directions, fold_key

OFF = {"model_options": {"p": 0.0}}


def same(a, b):
    """Losses and gradients of two runs, bit for bit."""
    assert len(a.gradients) == len(b.gradients) > 0
    return all(torch.equal(x, y) for x, y in zip(a.gradients + a.losses, b.gradients + b.losses))


class Recording(Classifier):
    """Keeps the batch and the weights of the first step, so that a test can redo it by hand."""

    def on_train_batch_start(self, batch, batch_idx):
        if not hasattr(self, "first"):
            self.first = (batch, copy.deepcopy(self.net.state_dict()))


def by_hand(callbacks, expected, **kwargs):
    """Compare the gradient of the first step with that of ``expected(closure, key)`` at the same weights."""
    model = train(callbacks, make=Recording, seed=7, **kwargs)
    (x, y), weights = model.first
    net = Recording().net
    net.load_state_dict(weights)
    total = expected(lambda: F.cross_entropy(net(x), y), fold_key(7, 0, 0, 0))
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(net.parameters()))])
    torch.testing.assert_close(model.gradients[0], gradient, rtol=1e-10, atol=1e-12)


def drop(closure, key, j):
    return run_pass(closure, Drop(fold_key(key, j))).loss


def pair(closure, key, step=0.1):
    directions = Directions(key)
    plus = run_pass(closure, Perturb(directions, step)).loss
    directions.rewind()
    return plus, run_pass(closure, Perturb(directions, -step)).loss


def estimate(closure, key, estimator="antithetic", **options):
    from lightning_dropreg.estimators import ESTIMATORS

    options = {"curvature": "loss_hessian", "noise": True, "step_size": 0.1, "mask": "as_model", **options}
    return ESTIMATORS[estimator](closure, key=key, **options)


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


def test_noise_differs_between_steps_and_seeds_and_repeats():
    runs = [train([dr.ImplicitNoise()], seed=s) for s in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0].gradients[0], runs[2].gradients[0])
    one_batch = make_loader(6)  # the same in every epoch, with weights that stay: only the noise differs
    still = train([dr.ImplicitNoise()], loader=one_batch, model_options={"lr": 0.0}, max_epochs=2)
    assert not torch.equal(*still.gradients)


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


def test_batch_fraction_of_one_gives_the_whole_batch():
    whole = train([dr.ExplicitPenalty(step_size=1e-3), dr.ImplicitNoise(step_size=1e-3)], max_steps=1)
    rows = train(
        [dr.ExplicitPenalty(step_size=1e-3, batch_fraction=1.0), dr.ImplicitNoise(step_size=1e-3, batch_fraction=1.0)],
        max_steps=1,
    )
    torch.testing.assert_close(rows.gradients[0], whole.gradients[0], rtol=1e-4, atol=1e-6)


def test_batch_fraction_is_unbiased_and_keeps_the_noise():
    """Over 300 keys, the mean penalty on a third of the rows and the mean squared noise: three standard errors."""
    torch.set_default_dtype(torch.float64)
    from lightning_dropreg.callbacks.batch import Batch
    from lightning_dropreg.step import Estimation, NoiseSettings, PenaltySettings, Plan

    model, batch = Classifier(), next(iter(make_loader(12, 12)))
    module = type("Silent", (Classifier,), {"log": lambda self, *a, **k: None})()

    def sample(fraction):
        e = Estimation("forward", 0.1, "as_model", fraction, 0)
        plan = Plan(penalty=PenaltySettings(1.0, "loss_hessian", 1, e), noise=NoiseSettings(1.0, "taylor", "loss", e))
        values = []
        for key in range(300):
            runner = Batch(type(module).training_step.__get__(module), (batch, 0), {}, module, True, key)
            with runner.isolation:
                result = plan.run(runner, key, 0)
            gradients = torch.autograd.grad(result.noise, list(module.parameters()), allow_unused=True)
            values.append(
                torch.stack([result.penalty.detach(), sum(g.square().sum() for g in gradients if g is not None)])
            )
        return torch.stack(values)

    whole, third = sample(None), sample(1 / 3)
    error = (whole.mean(0) - third.mean(0)).abs()
    assert (error < 3 * ((whole.var(0) + third.var(0)) / 300).sqrt()).all()
    assert model is not module


def test_logged_values():
    model = train([dr.ExplicitPenalty(), dr.ImplicitNoise()], log_every_n_steps=1)
    names = {"dropreg/explicit_penalty", "dropreg/noise_norm", "dropreg/grad_norm", "dropreg/loss", "train_loss"}
    assert names <= set(model.trainer.callback_metrics)
    model = train([dr.MiniBatchDropout(2), dr.ImplicitNoise()], log_every_n_steps=1)
    assert "dropreg/noise_norm" in model.trainer.callback_metrics


def test_noise_norm_is_the_norm_of_what_is_added():
    values = []
    for injection in ("loss", "after_backward"):
        model = train([dr.ExplicitPenalty(), dr.ImplicitNoise(injection=injection)], log_every_n_steps=1)
        values.append(model.trainer.callback_metrics["dropreg/noise_norm"])
    torch.testing.assert_close(*values)


MIXINS = {
    dr.ExplicitPenaltyMixin: dr.ExplicitPenalty,
    dr.ImplicitNoiseMixin: dr.ImplicitNoise,
    dr.MiniBatchDropoutMixin: dr.MiniBatchDropout,
}


@pytest.mark.parametrize(
    "mixins",
    [
        (dr.ExplicitPenaltyMixin,),
        (dr.ImplicitNoiseMixin,),
        (dr.MiniBatchDropoutMixin,),
        (dr.ExplicitPenaltyMixin, dr.ImplicitNoiseMixin),
        (dr.MiniBatchDropoutMixin, dr.ImplicitNoiseMixin),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["mixins first", "module first"])
def test_mixins_give_the_gradients_of_the_callbacks(mixins, last):
    bases = (Classifier, *mixins) if last else (*mixins, Classifier)
    made = type("Mixed", bases, {"explicit_penalty": {"strength": 2.0}, "minibatch_dropout": {"k": 3}})
    options = {dr.ExplicitPenalty: {"strength": 2.0}, dr.MiniBatchDropout: {"k": 3}, dr.ImplicitNoise: {}}
    callbacks = [MIXINS[mixin](**options[MIXINS[mixin]]) for mixin in mixins]
    mixed = train(make=made)
    assert same(mixed, train(callbacks))
    assert not same(mixed, train())


def test_mixin_keeps_the_users_callbacks_and_options():
    class Mixed(dr.ImplicitNoiseMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.implicit_noise = {"strength": 0.25}

        def configure_callbacks(self):
            return [dr.ExplicitPenalty()]

    found = Mixed().configure_callbacks()
    assert [type(callback).__name__ for callback in found] == ["ExplicitPenalty", "ImplicitNoise"]
    assert found[1].noise.strength == 0.25


def test_mixin_option_that_is_misspelt():
    class Misspelt(dr.ExplicitPenaltyMixin, Classifier):
        explicit_penalty = {"strenght": 2.0}  # noqa: RUF012

    with pytest.raises(InvalidArgumentError, match=r"Misspelt.explicit_penalty.*'strength'"):
        train(make=Misspelt)


def test_mixin_and_callback_of_one_kind_are_refused():
    class Mixed(dr.ImplicitNoiseMixin, Classifier):
        pass

    with pytest.raises(dr.errors.CompositionError, match="mixin"):
        train([dr.ImplicitNoise()], make=Mixed)


def test_fit_leaves_the_module_as_it_was():
    model, plain = Classifier(), Classifier()
    make_trainer().fit(plain, make_loader())
    make_trainer([dr.ExplicitPenalty(), dr.ImplicitNoise()]).fit(model, make_loader())
    assert set(model.__dict__) == set(plain.__dict__)
    trainer = make_trainer([dr.ExplicitPenalty(), dr.ImplicitNoise()])
    trainer.fit(model, make_loader())
    assert len(model.gradients) == 8


def test_own_training_step_attribute_comes_back():
    model = Classifier()
    own = model.training_step
    model.training_step = own
    make_trainer([dr.ExplicitPenalty()]).fit(model, make_loader())
    assert model.__dict__["training_step"] is own


@pytest.mark.parametrize("when", [0, 2])
def test_fit_that_raises_leaves_the_module_as_it_was(when):
    class Raising(Classifier):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            if batch_idx == when:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model = Raising()
    with pytest.raises(ZeroDivisionError):
        make_trainer([dr.ExplicitPenalty()]).fit(model, make_loader())
    assert "training_step" not in model.__dict__
    assert "log" not in model.__dict__
    assert model.calls == (when + 1 if when else 0)  # the look at the first step leaves no trace


def test_deepcopy_during_and_after_fit_trains_by_itself():
    copies = []

    class Copying(Classifier):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            if not copies:
                self.losses.clear()
                trainer, self._trainer = self._trainer, None
                copies.append(copy.deepcopy(self))
                self._trainer = trainer

    model = Copying()
    make_trainer([dr.ExplicitPenalty()]).fit(model, make_loader())
    copies.append(copy.deepcopy(model))
    for copied in copies:
        copied.log = lambda *args, **kwargs: None
        batch = next(iter(make_loader()))
        assert copied.training_step(batch, 0).requires_grad  # the user's own step, on the copy
        copied.__dict__.pop("log")
        copied.__dict__.pop("training_step", None)
        make_trainer([dr.ExplicitPenalty()]).fit(copied, make_loader())


def test_dict_outputs_and_skipped_batches():
    class Dict(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                return None
            return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}

        def on_before_optimizer_step(self, optimizer):
            assert (self.net[0].weight.grad is None) == (self.trainer.fit_loop.epoch_loop.batch_idx == 0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx:
                assert outputs["extra"] == batch_idx
                super().on_train_batch_end(outputs, batch, batch_idx)

    assert len(train([dr.ExplicitPenalty(), dr.ImplicitNoise()], make=Dict).losses) == 3


@pytest.mark.parametrize("callbacks", ["algorithm 2", "algorithm 4"])
def test_resume_continues_bit_for_bit(tmp_path, callbacks):
    def make():
        if callbacks == "algorithm 2":
            return [dr.ExplicitPenalty(), dr.ImplicitNoise()]
        return [dr.MiniBatchDropout(2), dr.ImplicitNoise()]

    whole = train(make(), max_epochs=2, seed=3)
    first = train(make(), max_epochs=1, seed=3)
    first.trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Classifier()
    make_trainer(make(), max_epochs=2).fit(resumed, make_loader(), ckpt_path=tmp_path / "one.ckpt")
    assert [torch.equal(a, b) for a, b in zip(whole.gradients[4:], resumed.gradients)] == [True] * 4


def test_seeds_are_those_of_the_run_not_of_the_callback():
    callback = dr.ImplicitNoise()
    first, second = train([callback], seed=1), train([callback], seed=2)
    assert same(first, train([dr.ImplicitNoise()], seed=1))
    assert same(second, train([dr.ImplicitNoise()], seed=2))


def test_micro_batches_have_noise_of_their_own_without_batch_idx():
    keys = []

    class NoIndex(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    from lightning_dropreg.callbacks import session

    class Spy(session.Batch):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            keys.append(kwargs["key"])

    original, session.Batch = session.Batch, Spy
    try:
        train([dr.ImplicitNoise()], make=NoIndex, accumulate_grad_batches=4)
    finally:
        session.Batch = original
    assert len(set(keys)) == 5  # the look at the first step, and four micro-batches


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


def test_noise_on_rows_is_scaled_by_the_fraction_that_was_drawn():
    from lightning_dropreg.step import Estimation, NoiseSettings, Plan

    class Runner:
        def whole(self):
            return F.mse_loss(F.dropout(torch.ones(1, 1, requires_grad=True), 0.5), torch.zeros(1, 1))

        aside = whole

        def rows(self, fraction, dim, key):
            return self.whole, 0.25

    noise = []
    for fraction in (None, 0.1):
        plan = Plan(noise=NoiseSettings(1.0, "taylor", "loss", Estimation("antithetic", 0.1, "as_model", fraction, 0)))
        noise.append(plan.run(Runner(), 0, 0).noise)
    torch.testing.assert_close(noise[1], noise[0] / 2)


class Attending(Classifier):
    """Attention with dropout on its probabilities, computed again in the backward, and an ordinary dropout."""

    def __init__(self, q=0.5):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, dropout=q, batch_first=True, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        attend = lambda x: self.attention(x, x, x)[0]
        h = torch.utils.checkpoint.checkpoint(attend, batch[0][:, None], use_reentrant=False)[:, 0]
        return F.cross_entropy(self.net(h), batch[1])


class AttendingMixin(dr.ExplicitPenaltyMixin, Attending):
    explicit_penalty = MappingProxyType({"attention": "ignore"})


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: [dr.ExplicitPenalty(**o), dr.ImplicitNoise(**o)],
        lambda **o: [dr.MiniBatchDropout(2, **o), dr.ImplicitNoise(**o)],
        lambda **o: [dr.ImplicitNoise(source="dropout", injection="after_backward", **o)],
    ],
)
def test_attention_ignored_is_attention_without_dropout(make):
    without = train(make(), make=Attending, model_options={"q": 0.0})
    assert same(train(make(attention="ignore"), make=Attending), without)
    assert not same(train(make(), make=Attending), without)


def test_attention_ignored_by_a_mixin_and_with_one_draw():
    assert same(train(make=AttendingMixin), train([dr.ExplicitPenalty(attention="ignore")], make=Attending))
    by_one = train([dr.MiniBatchDropout(1, attention="ignore")], make=Attending)
    assert not same(by_one, train(make=Attending))  # not left alone, as k=1 is otherwise
