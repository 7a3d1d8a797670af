"""``batch_fraction="auto"``: a quarter of the rows in the one pass where that is possible and pays."""

import logging

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, same, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.inspection import choice


class Wide(Classifier):
    """Large enough for a fraction to pay, if it were not for `LITTLE_WORK`."""

    def __init__(self, kind=nn.Tanh, norm=False, **options):
        super().__init__(norm=norm, **options)
        self.net[2] = kind()
        self.net.append(nn.Linear(3, 3).double())
        self.net.append(kind())


def algorithm_2(batch_fraction, **options):
    options = {"batch_fraction": batch_fraction, **options}
    return [dr.ExplicitPenalty(**options), dr.ImplicitNoise(**options)]


LOADER = {"n": 96, "batch_size": 32}


@pytest.fixture(autouse=True)
def _small_models_count(monkeypatch):
    monkeypatch.setattr(choice, "LITTLE_WORK", 0)


def chosen(callbacks, caplog, make=Wide, n=96, batch_size=32, **options):
    with caplog.at_level(logging.INFO):
        model = train(callbacks, make=make, loader=make_loader(n, batch_size), **options)
    [told] = [record.message for record in caplog.records if "batch_fraction" in record.message]
    return model, told


@pytest.mark.parametrize(
    "callbacks",
    [algorithm_2, lambda f: [dr.ExplicitPenalty(batch_fraction=f)], lambda f: [dr.ImplicitNoise(batch_fraction=f)]],
    ids=["algorithm 2", "penalty", "noise"],
)
def test_where_it_pays_it_is_a_quarter_in_one_pass(callbacks, caplog, monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *more: seen.append(len(x)) or linear(x, *more))
    model, told = chosen(callbacks("auto"), caplog)
    assert "batch_fraction 0.25: some rows stand for all" in told
    assert same(model, train(callbacks(0.25), make=Wide, loader=make_loader(**LOADER)))
    assert seen[-1] == 40  # once, with 8 of the 32 rows in it twice


def test_a_penalty_alone_shares_a_pass_where_there_are_kinks(caplog):
    callbacks = [dr.ExplicitPenalty(batch_fraction="auto")]
    _, told = chosen(callbacks, caplog, make=lambda: Wide(nn.ReLU))
    assert "batch_fraction 0.25" in told
    assert callbacks[0]._found["estimator"]["estimator"] == "antithetic"
    noisy = algorithm_2("auto")  # whose noise kinks do disturb
    train(noisy, make=lambda: Wide(nn.ReLU), loader=make_loader(**LOADER))
    assert noisy[0]._found["estimator"]["estimator"] == "forward"
    assert noisy[0]._found["batch fraction"]["fraction"] is None


class Augmenting(Wide):
    """Augments at random, so that the two of a pair would differ."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), batch_idx)


class OfAllRows(Wide):
    """Rows of which some do not stand for all."""

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0])
        return F.cross_entropy(z - z.mean(0), batch[1])


@pytest.mark.parametrize(
    ("callbacks", "options", "words"),
    [
        (algorithm_2("auto"), {"batch_size": 16}, "a batch of 16 rows is small"),
        (algorithm_2("auto"), {"make": Augmenting}, "draws random numbers"),
        (algorithm_2("auto"), {"make": OfAllRows}, "do not stand for all"),
        (algorithm_2("auto"), {"make": lambda: Wide(norm=True)}, "do not stand for all"),
        (algorithm_2("auto", estimator="forward"), {}, "no finite steps"),
        (algorithm_2("auto", low_memory=True), {}, "low_memory"),
        ([dr.ExplicitPenalty(), dr.ImplicitNoise(batch_fraction="auto")], {}, "in different ways"),
        ([dr.MiniBatchDropout(2), dr.ImplicitNoise(batch_fraction="auto")], {}, "dropout is drawn"),
    ],
)
def test_elsewhere_it_is_the_whole_batch_and_the_reason_is_told(callbacks, options, words, caplog):
    _, told = chosen(callbacks, caplog, **options)
    assert "batch_fraction None: " in told
    assert words in told


def test_the_whole_batch_is_trained_with_as_if_nothing_were_asked():
    small = {"n": 48, "batch_size": 16}
    auto = train(algorithm_2("auto"), make=Wide, loader=make_loader(**small))
    assert same(auto, train(algorithm_2(None), make=Wide, loader=make_loader(**small)))


def test_a_tiny_model_gains_nothing(monkeypatch, caplog):
    monkeypatch.undo()
    _, told = chosen(algorithm_2("auto"), caplog)
    assert "the model is so small" in told


def test_a_resumed_run_keeps_what_was_chosen(tmp_path, monkeypatch):
    whole = train(algorithm_2("auto"), make=Wide, loader=make_loader(**LOADER), max_epochs=2)
    trainer = make_trainer(algorithm_2("auto"), max_epochs=1)
    torch.manual_seed(0)
    half = train([], make=Wide, loader=make_loader(**LOADER), max_epochs=0)
    trainer.fit(half, make_loader(**LOADER))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monkeypatch.setattr(choice, "LITTLE_WORK", 10**9)  # it would not be chosen now
    callbacks = algorithm_2("auto")
    rest = Wide()
    make_trainer(callbacks, max_epochs=2).fit(rest, make_loader(**LOADER), ckpt_path=tmp_path / "half.ckpt")
    assert callbacks[0]._found["batch fraction"]["fraction"] == 0.25
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("fraction", [0, 1.5, "half", True, float("nan")])
def test_other_words_are_refused(fraction):
    with pytest.raises(dr.errors.InvalidArgumentError, match="batch_fraction"):
        dr.ExplicitPenalty(batch_fraction=fraction)
