"""What else lives in a Trainer: finders, mocks, the other package, steps that now and then have no dropout."""

from unittest.mock import MagicMock, Mock, create_autospec

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, train
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg import errors

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "after backward": lambda: [dr.ImplicitNoise(source="dropout", injection="after_backward")],
    "k": lambda: [dr.MiniBatchDropout(2)],
}


# ---------------------------------------------------------------- searches
class Searched(Classifier):
    def __init__(self):
        super().__init__()
        self.batch_size, self.runs = 6, 0

    def training_step(self, batch, batch_idx):
        self.runs += 1
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return make_loader(24, self.batch_size)


def finders():
    return {
        "rate": lambda: LearningRateFinder(num_training_steps=6, update_attr=False),
        "size": lambda: BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=6),
    }


@pytest.mark.parametrize("finder", finders())
@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_made_with_our_callbacks_and_leaves_nothing(tmp_path, method, finder):
    """What is trained afterwards is what is trained without the search (with the batch size that it found)."""
    L.seed_everything(1, verbose=False)
    model = Searched()
    found = finders()[finder]()
    trainer = make_trainer([*METHODS[method](), found], default_root_dir=tmp_path)
    trainer.fit(model)
    L.seed_everything(1, verbose=False)
    alone = Searched()
    alone.batch_size = model.batch_size
    make_trainer(METHODS[method](), default_root_dir=tmp_path).fit(alone)
    for ours, right in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)
    assert "dropreg/loss_epoch" in trainer.callback_metrics
    assert "training_step" not in model.__dict__


def test_the_rate_is_searched_on_the_loss_that_is_trained(tmp_path):
    """A large penalty shows in the losses of the search, by the Tuner and by the callback alike."""

    def losses(callbacks, tuner):
        L.seed_everything(1, verbose=False)
        finder = LearningRateFinder(num_training_steps=4, update_attr=False, early_stop_threshold=None)
        trainer = make_trainer([*callbacks, *([] if tuner else [finder])], default_root_dir=tmp_path)
        if tuner:
            found = Tuner(trainer).lr_find(Searched(), num_training=4, update_attr=False, early_stop_threshold=None)
            return found.results["loss"]
        trainer.fit(Searched())
        return finder.optimal_lr.results["loss"]

    for tuner in (True, False):
        small, large = (losses([dr.ExplicitPenalty(strength)], tuner) for strength in (0.0, 1e3))
        assert min(large) > 2 * max(small)


def test_noise_after_the_backward_is_in_the_search_too(tmp_path):
    class Counting(dr.ImplicitNoise):
        calls = 0

        def on_after_backward(self, *args):
            self.calls += 1
            super().on_after_backward(*args)

    noise = Counting(source="dropout", injection="after_backward")
    finder = LearningRateFinder(num_training_steps=6, update_attr=False, early_stop_threshold=None)
    make_trainer([noise, finder], default_root_dir=tmp_path).fit(Searched())
    assert noise.calls == 4 + 4  # the search ends with the epoch


class Twice(L.Callback):
    """A search of one's own in the midst of the training, as Lightning's documentation has it."""

    def __init__(self):
        self.finder = LearningRateFinder(num_training_steps=3, update_attr=False)

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.finder.lr_find(trainer, module)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_in_the_midst_of_training(tmp_path, method):
    L.seed_everything(1, verbose=False)
    model = Searched()
    trainer = make_trainer([*METHODS[method](), Twice()], default_root_dir=tmp_path, max_epochs=2)
    trainer.fit(model)
    assert trainer.global_step == 8
    assert trainer.callbacks[-1].finder.optimal_lr is not None


# ---------------------------------------------------------------- callbacks and packages of others
@pytest.mark.parametrize(
    "mock",
    [
        lambda: Mock(spec=L.Callback, state_dict=Mock(return_value={})),
        lambda: MagicMock(spec=L.Callback, state_dict=Mock(return_value={})),
        lambda: create_autospec(L.Callback, instance=True, state_dict=Mock(return_value={}), state_key="m"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_mocks(method, mock):
    spy = mock()
    make_trainer([spy, *METHODS[method]()]).fit(Classifier(), make_loader())
    assert spy.on_train_batch_end.call_count == 4


class Other(pl.LightningModule):
    """A module of the older package, with the steps of the newer one's."""

    training_step, configure_optimizers = Classifier.training_step, Classifier.configure_optimizers

    def __init__(self, manual=False):
        super().__init__()
        self.net, self.lr = Classifier().net, 0.1
        self.automatic_optimization = not manual
        if manual:
            self.training_step = self.manual_step

    def manual_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_other_package_trains_the_same(method, manual):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    L.seed_everything(2, verbose=False)
    model = Other(manual)
    pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=METHODS[method](), **quiet).fit(
        model, make_loader()
    )
    ours = train(METHODS[method](), seed=2)
    for p, q in zip(model.parameters(), ours.parameters()):
        torch.testing.assert_close(p, q)


# ---------------------------------------------------------------- steps without a site
class NowAndThen(Classifier):
    """Passes its dropout by in some batches."""

    def __init__(self, skips=(2,)):
        super().__init__()
        self.skips = skips

    def training_step(self, batch, batch_idx):
        layers = [l for l in self.net if batch_idx not in self.skips or not isinstance(l, nn.Dropout)]
        return F.cross_entropy(nn.Sequential(*layers)(batch[0]), batch[1])


@pytest.mark.parametrize(
    "make",
    [
        *METHODS.values(),
        lambda: [dr.ExplicitPenalty(strength=0.0)],
        lambda: [dr.ExplicitPenalty(every_n_steps=2)],
        lambda: [dr.ExplicitPenalty(estimator="forward")],
        lambda: [dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=0.5)],
        lambda: [dr.ExplicitPenalty(low_memory=True)],
        lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
    ],
)
def test_a_later_step_without_dropout_is_the_plain_one(make):
    L.seed_everything(3, verbose=False)
    model = NowAndThen(skips=(2, 3))
    model.lr = 0.0
    make_trainer(make()).fit(model, make_loader())
    assert len(model.gradients) == 4
    for index, (x, y) in enumerate(make_loader()):
        if index >= 2:
            plain = nn.Sequential(*(layer for layer in model.net if not isinstance(layer, nn.Dropout)))
            grads = torch.autograd.grad(F.cross_entropy(plain(x), y), list(model.parameters()))
            torch.testing.assert_close(model.gradients[index], torch.cat([g.reshape(-1) for g in grads]))


def test_a_first_step_without_dropout_is_refused():
    with pytest.raises(errors.NoDropoutSiteError):
        train([dr.ExplicitPenalty()], make=NowAndThen, model_options={"skips": (0,)})


# ---------------------------------------------------------------- messages
def by_hand(net, x, y):
    z = net(x)
    return (torch.logsumexp(z, 1) - z.gather(1, y[:, None])[:, 0]).mean()


LOST = {
    "a number": lambda net, x, y: torch.tensor(float(F.cross_entropy(net(x), y)), requires_grad=True),
    "detached, scaled": lambda net, x, y: 2 * F.cross_entropy(net(x), y).detach().requires_grad_(),
    "from a detached output": lambda net, x, y: F.cross_entropy(net(x).detach().requires_grad_(), y),
}


class Stepping(Classifier):
    def __init__(self, loss, prepare=lambda net: None):
        super().__init__()
        self.loss = loss
        prepare(self.net)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("method", ["algorithm 2", "k"])
def test_a_loss_that_has_lost_its_graph(method, lost):
    with pytest.raises(errors.DropregError, match=r"does not depend on (the|any of its) parameters"):
        train(METHODS[method](), make=Stepping, model_options={"loss": LOST[lost]})


@pytest.mark.parametrize(
    ("prepare", "name"),
    [
        (lambda net: net.eval(), r"net is in eval mode"),
        (lambda net: net[3].eval(), r"net\.3 is in eval mode"),
    ],
)
def test_dropout_in_eval_mode_is_named(prepare, name):
    plain = lambda net, x, y: F.cross_entropy(net(x), y)
    with pytest.raises(errors.NoDropoutSiteError, match=name):
        train([dr.ExplicitPenalty()], make=Stepping, model_options={"loss": plain, "prepare": prepare})


@pytest.mark.parametrize(
    "layer", [nn.LSTM(4, 4, 2, dropout=0.3), nn.MultiheadAttention(4, 2, dropout=0.3), nn.AlphaDropout(0.3)]
)
def test_what_rests_is_named_without_lightning(layer):
    layer.eval()
    x = torch.randn(3, 2, 4, requires_grad=True)
    call = (lambda: layer(x, x, x)[0]) if isinstance(layer, nn.MultiheadAttention) else (lambda: layer(x)[0])
    with pytest.raises(errors.NoDropoutSiteError, match="eval mode"):
        dr.functional.explicit_penalty(lambda: F.mse_loss(call(), torch.zeros_like(call().detach())))


@pytest.mark.parametrize(
    "make", [lambda: [dr.ExplicitPenalty(0.0)], lambda: [dr.ExplicitPenalty(0.0), dr.ImplicitNoise(0.0)]]
)
def test_strength_zero_needs_to_know_nothing_of_the_loss(make):
    ours = train(make(), make=Stepping, model_options={"loss": by_hand})
    right = train(make=Stepping, model_options={"loss": by_hand, "prepare": lambda net: setattr(net[3], "p", 0.0)})
    for p, q in zip(ours.parameters(), right.parameters()):
        torch.testing.assert_close(p, q)


# ---------------------------------------------------------------- going on
@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_extended_past_the_end_of_an_epoch(tmp_path, method, manual):
    """Stopped by ``max_steps`` at the last batch: it goes on with a batch index past the epoch's end."""

    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return {"loss": loss}

    same = DataLoader([next(iter(make_loader()))] * 5, batch_size=None)  # Lightning starts the data anew

    def fit(steps, path=None):
        L.seed_everything(4, verbose=False)
        model, trainer = Manual(), make_trainer(METHODS[method](), max_epochs=-1, max_steps=steps)
        trainer.fit(model, same, ckpt_path=path)
        return model, trainer

    whole = fit(10)[0]
    fit(5)[1].save_checkpoint(tmp_path / "half.ckpt")
    for p, q in zip(whole.parameters(), fit(10, tmp_path / "half.ckpt")[0].parameters()):
        assert torch.equal(p, q)
