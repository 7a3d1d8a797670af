"""What moves on and cannot be put back: left alone where one run is all there is, refused by name elsewhere."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, same, train
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import NotRepeatableError

X, Y = next(iter(make_loader()))


def diagnostics():
    return dr.DropoutDiagnostics(draws=4, steps=(2,), verbose=False)


class Counting(Classifier):
    def __init__(self, p=0.4):
        super().__init__(p)
        self.counter = itertools.count()

    def training_step(self, batch, batch_idx):
        self.number = next(self.counter)
        return super().training_step(batch, batch_idx) * (1 + self.number)


class Streaming(Counting):
    """A second stream of data, as an endless generator."""

    def __init__(self, p=0.4):
        super().__init__(p)
        self.counter = (n for n in itertools.count())


class Lazy(Classifier):
    def __init__(self, p=0.4):
        super().__init__(p)
        self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 3)).double()

    def on_train_start(self):
        self.shifts = []

    def training_step(self, batch, batch_idx):
        self.shifts.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx) * (1 + self.shifts[-1])


@pytest.mark.parametrize("make", [Counting, Streaming, Lazy])
def test_one_draw_of_dropout_is_the_run_without_callbacks(make):
    assert same(train([dr.MiniBatchDropout(1)], make=make), train(make=make))


@pytest.mark.parametrize("make", [Counting, Streaming])
@pytest.mark.parametrize("method", [diagnostics, dr.ExplicitPenalty, lambda: dr.MiniBatchDropout(2)])
def test_it_is_refused_by_name(make, method):
    with pytest.raises(Exception, match=r"self\.counter") as caught:
        train([method()], make=make)
    assert isinstance(caught.value, NotRepeatableError)


class Reading(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(torch.stack(list(batch["x"]))), batch["y"])


def read_once():
    return DataLoader([0], collate_fn=lambda _: {"x": (x for x in X), "y": Y})


def test_diagnostics_say_what_in_a_batch_is_read_once():
    with pytest.raises(NotRepeatableError, match=r"batch\['x'\] \(generator\)"):
        train([diagnostics()], make=Reading, loader=read_once())


def test_diagnostics_that_are_not_due_let_it_be():
    never = dr.DropoutDiagnostics(batch="current", steps=(100,), every_n_epochs=None, at_end=False, verbose=False)
    assert same(train([never], make=Reading, loader=read_once()), train(make=Reading, loader=read_once()))
    due = dr.DropoutDiagnostics(batch="current", steps=(0,), every_n_epochs=None, at_end=False, verbose=False)
    with pytest.raises(NotRepeatableError, match="generator"):
        train([due], make=Reading, loader=read_once())
