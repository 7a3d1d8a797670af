"""Batches that are no dict, list or tuple, and steps that change them: every pass gets the batch as it was."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, same, train
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import NotRepeatableError

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "forward": lambda: [dr.ExplicitPenalty(estimator="forward"), dr.ImplicitNoise(estimator="forward")],
    "algorithm 4": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
    "one draw": lambda: [dr.MiniBatchDropout(1)],
    "diagnostics": lambda: [dr.DropoutDiagnostics(draws=4, verbose=False, at_end=False)],
}


@dataclass
class Rows:
    x: Any
    y: Any


class Tracked(dict):
    """A dict subclass that pytree takes for a leaf."""


class Plain(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net((batch[0] - 1) / 2), batch[1])


class AssignsField(Classifier):
    def training_step(self, batch, batch_idx):
        batch.x = (batch.x - 1) / 2
        return F.cross_entropy(self.net(batch.x), batch.y)


class Pops(Classifier):
    def training_step(self, batch, batch_idx):
        y = batch.pop("y")
        batch["x"] = (batch["x"] - 1) / 2
        return F.cross_entropy(self.net(batch["x"]), y)


class InPlace(Classifier):
    def training_step(self, batch, batch_idx):
        batch.x.sub_(1).div_(2)
        return F.cross_entropy(self.net(batch.x), batch.y)


class PastAutograd(Classifier):
    def training_step(self, batch, batch_idx):
        batch.x.data.sub_(1).div_(2)
        return F.cross_entropy(self.net(batch.x), batch.y)


class Arrays(Classifier):
    def training_step(self, batch, batch_idx):
        batch.x -= 1
        batch.x /= 2
        return F.cross_entropy(self.net(torch.from_numpy(batch.x.copy())), batch.y)


class AppendsDeeper(Classifier):
    def training_step(self, batch, batch_idx):
        batch.x.parts.append((batch.x.parts[-1] - 1) / 2)
        assert len(batch.x.parts) == 2
        return F.cross_entropy(self.net(batch.x.parts[-1]), batch.y)


class Parts:
    def __init__(self, x):
        self.parts = [x]


def graph(x, y):
    pyg = pytest.importorskip("torch_geometric.data")
    return pyg.Data(x=x, y=y)


def encoding(x, y):
    return pytest.importorskip("transformers").BatchEncoding({"x": x, "y": y})


STEPS = {
    "dataclass": (AssignsField, Rows),
    "graph": (AssignsField, graph),
    "BatchEncoding": (Pops, encoding),
    "UserDict": (Pops, lambda x, y: UserDict(x=x, y=y)),
    "subclass of dict": (Pops, lambda x, y: Tracked(x=x, y=y)),
    "tensor of a dataclass in place": (InPlace, Rows),
    "tensor of a graph in place": (InPlace, graph),
    "tensor past autograd": (PastAutograd, Rows),
    "array in place": (Arrays, lambda x, y: Rows(x.numpy().copy(), y)),
    "list in an object in a dataclass": (AppendsDeeper, lambda x, y: Rows(Parts(x), y)),
}


def batches(make, count=3):
    generator = torch.Generator().manual_seed(1)
    draws = [(torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.arange(6) % 3) for _ in range(count)]
    return DataLoader([make(x, y) for x, y in draws], batch_size=None, collate_fn=lambda batch: batch)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_the_step_changes_is_whole_again(method, step):
    make, of = STEPS[step]
    plain = train(METHODS[method](), make=Plain, loader=batches(lambda x, y: (x, y)))
    assert same(train(METHODS[method](), make=make, loader=batches(of)), plain)


@pytest.mark.parametrize("step", STEPS)
def test_rows_are_taken_of_any_batch(step):
    make, of = STEPS[step]
    rows = lambda: [dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=0.5)]
    plain = train(rows(), make=Plain, loader=batches(lambda x, y: (x, y)))
    assert same(train(rows(), make=make, loader=batches(of)), plain)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_step_leaves_in_the_batch_is_there_afterwards(method):
    """As in plain Lightning, where callbacks find the predictions that a step put into its batch."""

    class Leaves(Classifier):
        def training_step(self, batch, batch_idx):
            assert not hasattr(batch, "predicted")
            z = self.net(batch.x)
            batch.predicted = z.detach().argmax(1)
            return F.cross_entropy(z, batch.y)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            assert batch.predicted.shape == (6,)

    train(METHODS[method](), make=Leaves, loader=batches(Rows))


@pytest.mark.parametrize("method", ["algorithm 2", "algorithm 4"])
def test_a_batch_that_is_changed_in_place_later_on_is_refused(method):
    class Later(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                batch["x"].mul_(2)
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    with pytest.raises(NotRepeatableError, match=r"changed batch\['x'\] in place"):
        train(METHODS[method](), make=Later, loader=batches(lambda x, y: {"x": x, "y": y}))


def test_one_pass_may_change_its_batch_at_any_time():
    class Later(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                batch[0].mul_(2)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    train([dr.ExplicitPenalty(every_n_steps=1000)], make=Later, loader=batches(lambda x, y: (x, y)))


def test_arrays_stay_the_trainers():
    seen = []

    class Watching(Arrays):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            seen.append(batch.x.copy())

    held = [np.ones((6, 4)), np.zeros((6, 4))]
    loader = DataLoader([Rows(x.copy(), torch.arange(6) % 3) for x in held], batch_size=None, collate_fn=lambda b: b)
    train(METHODS["algorithm 2"](), make=Watching, loader=loader)
    for before, after in zip(held, seen):
        assert np.array_equal((before - 1) / 2, after)  # once
