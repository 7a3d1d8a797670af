"""Drop probabilities that change: named schedules, points, functions, patterns; what is put back; what is refused."""

import jsonargparse
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from companions import METHODS, Watched
from fits import Classifier, make_loader, make_trainer, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import errors

SCHEDULES = {  # 8 steps, 4 in an epoch
    "early": (lambda: dr.DropProbSchedule("early"), [1, 1, 1, 1, 0, 0, 0, 0]),
    "late, in steps": (lambda: dr.DropProbSchedule("late", 3, "step"), [0, 0, 0, 1, 1, 1, 1, 1]),
    "linear, in steps": (lambda: dr.DropProbSchedule("linear", 4, "step"), [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    "linear, down": (lambda: dr.DropProbSchedule("linear", 1, start=1, end=0), [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]),
    "points, in steps": (
        lambda: dr.DropProbSchedule({6: 0.25, 1: 0.0, 3: 1.0}, interval="step"),
        [0, 0, 0.5, 1, 0.75, 0.5, 0.25, 0.25],
    ),
    "points, in epochs": (lambda: dr.DropProbSchedule({0: 0, 2: 2}), [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
    "a function": (lambda: dr.DropProbSchedule(lambda t: float(t > 2) / 2, interval="step"), [0, 0, 0] + [0.5] * 5),
}


EACH = [("linear, in steps", method) for method in METHODS]


@pytest.mark.parametrize(("schedule", "method"), EACH + [(schedule, "algorithm 2") for schedule in SCHEDULES])
def test_schedule(schedule, method):
    """The probabilities are those of the schedule; where they are 0 the gradient is that of the plain loss."""
    make, factors = SCHEDULES[schedule]
    seen = train([make(), *METHODS[method]()], make=Watched, max_epochs=2)
    assert set(seen.ps) == {0.4 * factor for factor in factors}
    assert seen.net[3].p == 0.4  # put back
    plain = train(make=Watched, max_epochs=2, model_options={"p": 0.0})
    off = [step for step in range(8) if not any(factors[: step + 1])]  # before anything was dropped
    for step in off:
        torch.testing.assert_close(seen.gradients[step], plain.gradients[step], rtol=1e-12, atol=1e-14)
    assert not torch.equal(seen.gradients[-1], plain.gradients[-1])


class Recurrent(Classifier):
    """Dropout that does not show itself where its probability is 0: inside an LSTM, and in attention."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True).double()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True).double()
        self.net = nn.Linear(4, 3).double()
        self.ps = []

    def training_step(self, batch, batch_idx):
        self.ps.append((self.rnn.dropout, self.attention.dropout))
        h = self.rnn(batch[0].unsqueeze(1).expand(-1, 3, -1))[0]
        return F.cross_entropy(self.net(self.attention(h, h, h, need_weights=False)[0][:, -1]), batch[1])


@pytest.mark.parametrize("method", METHODS)
def test_schedule_of_hidden_dropout(method):
    seen = train([dr.DropProbSchedule("late", 2, "step"), *METHODS[method]()], make=Recurrent)
    assert set(seen.ps) == {(0.0, 0.0), (0.3, 0.2)}
    with pytest.raises(errors.NoDropoutSiteError, match="positive drop probability to schedule among"):
        train([dr.DropProbSchedule(modules=["net"]), *METHODS[method]()], make=Recurrent)


def test_schedule_of_probabilities_by_pattern():
    """Factor 1 stands for the probabilities of the patterns; what no pattern names stays, and all is put back."""
    patterns = {"*": 0.5, "attention": 0.2}
    seen = train([dr.DropProbSchedule({0: 0.5, 3: 1.0}, interval="step", modules=patterns)], make=Recurrent)
    assert seen.ps[0] == (0.25, 0.1)
    assert seen.ps[3] == (0.5, 0.2)
    assert (seen.rnn.dropout, seen.attention.dropout) == (0.3, 0.2)
    some = train([dr.DropProbSchedule("late", 2, "step", modules={"rnn": 0.1})], make=Recurrent)
    assert set(some.ps) == {(0.0, 0.2), (0.1, 0.2)}
    with pytest.raises(errors.PatternError, match=r"'rmn'.*nearest are 'rnn"):
        train([dr.DropProbSchedule(modules={"rmn": 0.1})], make=Recurrent)


def constant(time):
    return 0.5


def test_schedules_in_yaml():
    """A name, points and an import path, each as jsonargparse gives them to the callback."""
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(dr.DropProbSchedule, "schedule")
    for given, factor in (("late", 0.0), ({0: 0.0, 4: 1.0}, 0.25), ("test_drop_prob_schedule.constant", 0.5)):
        arguments = {"schedule": given, "modules": {"*.mlp": 0.1}}
        config = parser.parse_object({"schedule": {"class_path": "DropProbSchedule", "init_args": arguments}})
        found = parser.instantiate_classes(config).schedule
        assert found.factor(1) == (1.0 if given == "late" else factor)
        assert found.modules == {"*.mlp": 0.1}


def test_schedule_is_undone_after_an_exception():
    class Failing(Watched):
        def on_train_batch_end(self, *args):
            raise KeyError

    model = Failing()
    with pytest.raises(KeyError):
        make_trainer([dr.DropProbSchedule("late", 2)]).fit(model, make_loader())
    assert model.ps == [0.0]
    assert model.net[3].p == 0.4


def test_schedule_refuses():
    with pytest.raises(errors.InvalidArgumentError, match=r"net\.3\.p from 0\.4 to 1\.2; .* below 1"):
        train([dr.DropProbSchedule("linear", 2, end=3.0)])
    with pytest.raises(errors.InvalidArgumentError, match="'net' was called with drop probability 1.0"):
        dr.DropProbSchedule(modules={"net": 1.0})
    with pytest.raises(errors.InvalidArgumentError, match=r"net\.3\.p from 0\.4 to 1\.2; .* below 1"):
        train([dr.DropProbSchedule(lambda time: 3.0)])
    with pytest.raises(errors.InvalidArgumentError, match=r"returned -1 for time 0"):
        train([dr.DropProbSchedule(lambda time: -1)])
    for schedule in ({}, {0: -1.0}, {0: "1"}, {-1: 0.5}):
        with pytest.raises(errors.InvalidArgumentError, match="at least one time"):
            dr.DropProbSchedule(schedule)
    for wrong in ({"schedule": "cosine"}, {"length": 0}, {"interval": "batch"}, {"start": -0.1}, {"modules": "net"}):
        with pytest.raises(errors.InvalidArgumentError, match=next(iter(wrong))):
            dr.DropProbSchedule(**wrong)


@pytest.mark.parametrize("schedule", ["linear", "early", "late", {0: 0.1, 1.5: 1}])
@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_run_extended_from_a_checkpoint_goes_on_in_the_schedule(schedule, stop, tmp_path):
    """Lightning takes the epoch in which a run stops at max_steps for done: 4 batches make an epoch here."""
    seen = []

    class Spy(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append((trainer.global_step, module.net[3].p))

    def fit(steps, checkpoint=None):
        schedules = dr.DropProbSchedule(schedule, length=2 if schedule == "linear" else 1)
        trainer = make_trainer([schedules, Spy()], max_epochs=-1, max_steps=steps)
        trainer.fit(Classifier(), make_loader(), ckpt_path=checkpoint)
        return trainer

    fit(12)
    whole = dict(seen)
    seen.clear()
    fit(stop).save_checkpoint(tmp_path / "a.ckpt")
    fit(12, tmp_path / "a.ckpt")
    assert dict(seen) == pytest.approx(whole)
