"""A step that is not the same when it is called again: put right, or refused and named before anything is trained."""

import io
import itertools
import random
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, same, train

import lightning_dropreg as dr
from lightning_dropreg.errors import NotRepeatableError

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "algorithm 4": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
}
BATCHES = 8
TABLE = np.random.default_rng(5).random(BATCHES)
TICK = itertools.count(1).__next__
TORCHS = torch.Generator()
GLOBAL = np.random.default_rng(5)


class Mixup(Classifier):
    """Mixup whose weight the subclass draws."""

    def training_step(self, batch, batch_idx):
        (x, y), weight = batch, self.draw(batch_idx)
        z = self.net(weight * x + (1 - weight) * x.flip(0))
        return weight * F.cross_entropy(z, y) + (1 - weight) * F.cross_entropy(z, y.flip(0))


class FromTable(Mixup):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def draw(self, batch_idx):
        return float(self.values[batch_idx])


class Transform:
    """An object of the user's with a generator in it, as MONAI's transforms have."""

    def __init__(self):
        self.R = np.random.RandomState(5)

    def __call__(self):
        return float(self.R.rand())


def drawing(make_generator, draw):
    """A step with a generator in an attribute, and the numbers that it should have drawn."""

    class Own(Mixup):
        def __init__(self):
            super().__init__()
            self.rng = make_generator()

        def draw(self, batch_idx):
            return draw(self.rng)

    generator = make_generator()
    return Own, [draw(generator) for _ in range(BATCHES)]


def in_a_global():
    class Own(Mixup):
        def draw(self, batch_idx):
            return float(GLOBAL.random())

    GLOBAL.bit_generator.state = np.random.default_rng(5).bit_generator.state
    return Own, list(TABLE)


def in_a_closure():
    rng = np.random.default_rng(5)

    class Own(Mixup):
        def draw(self, batch_idx):
            return float(rng.random())

    return Own, list(TABLE)


def in_a_list_of_objects():
    Own, values = drawing(lambda: [types.SimpleNamespace(call=Transform())], lambda held: held[0].call())
    return Own, values


def in_a_class():
    class Own(Mixup):
        rng = random.Random(5)

        def draw(self, batch_idx):
            return self.rng.random()

    twin = random.Random(5)
    return Own, [twin.random() for _ in range(BATCHES)]


def new_in_every_batch():
    """As one that is seeded by the epoch."""

    class Own(Mixup):
        def on_train_batch_start(self, batch, batch_idx):
            self.rng = np.random.default_rng(batch_idx)

        def draw(self, batch_idx):
            return float(self.rng.random())

    return Own, [np.random.default_rng(i).random() for i in range(BATCHES)]


GENERATORS = {
    "torch": lambda: drawing(lambda: torch.Generator().manual_seed(5), lambda g: torch.rand((), generator=g).item()),
    "numpy": lambda: drawing(lambda: np.random.default_rng(5), lambda g: float(g.random())),
    "Mersenne Twister": lambda: drawing(lambda: np.random.Generator(np.random.MT19937(5)), lambda g: float(g.random())),
    "RandomState": lambda: drawing(Transform, lambda transform: transform()),
    "Python": lambda: drawing(lambda: random.Random(5), lambda g: g.random()),
    "global": in_a_global,
    "closure": in_a_closure,
    "list of objects": in_a_list_of_objects,
    "class": in_a_class,
    "new in every batch": new_in_every_batch,
}


@pytest.mark.parametrize("where", GENERATORS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:The step draws random numbers")
def test_generators_are_put_back(method, where):
    make, values = GENERATORS[where]()
    loader = make_loader(6 * BATCHES)
    got = train(METHODS[method](), make=make, loader=loader)
    right = train(METHODS[method](), make=lambda: FromTable(values), loader=loader)
    assert same(got, right)


class Stream(Mixup):
    """A second stream, read by next in the step."""

    def on_train_start(self):
        self.weights = iter(np.random.default_rng(0).random(10_000))

    def draw(self, batch_idx):
        return float(next(self.weights))


class Written(Mixup):
    def on_train_start(self):
        self.lines = (str(i / 100) for i in range(10_000))

    def draw(self, batch_idx):
        return float(next(self.lines))


class FromSystem(Mixup):
    def on_train_start(self):
        self.dice = random.SystemRandom()

    def draw(self, batch_idx):
        return self.dice.random()


class Counted(Mixup):
    """A counter outside of everything that is put back."""

    def draw(self, batch_idx):
        return 1 / TICK()


@pytest.mark.parametrize(
    ("make", "named"),
    [(Stream, "self.weights"), (Written, "self.lines"), (FromSystem, "self.dice"), (Counted, "outside of the module")],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_put_back_is_refused_and_named(method, make, named):
    with pytest.raises(NotRepeatableError, match=rf"called again.*{named}"):
        train(METHODS[method](), make=make)


def test_a_step_that_stops_repeating_is_refused_when_it_is_looked_at_again():
    """At steps 1, 2, 4, 8: here it is the third of eight, so it is noticed in the fifth."""

    class Later(Stream):
        def draw(self, batch_idx):
            return super().draw(batch_idx) if batch_idx >= 3 else 0.5

    with pytest.raises(NotRepeatableError, match=r"self\.weights"):
        train(METHODS["algorithm 2"](), make=Later, loader=make_loader(6 * BATCHES))


def test_the_untouched_run_may_do_what_it_wants():
    train([dr.MiniBatchDropout(1)], make=Stream)


@pytest.mark.parametrize("method", METHODS)
def test_plain_objects_advance_once(method, capsys):
    class Statistics:
        def __init__(self):
            self.count, self.seen = 0, []

    class Counting(Classifier):
        def __init__(self):
            super().__init__()
            self.statistics = Statistics()
            self.nested = {"deep": [Statistics()]}

        def training_step(self, batch, batch_idx):
            for statistics in (self.statistics, self.nested["deep"][0]):
                statistics.count += 1
                statistics.seen.append(batch_idx)
            self.print(f"batch {batch_idx}")
            return super().training_step(batch, batch_idx)

    model = train(METHODS[method](), make=Counting)
    for statistics in (model.statistics, model.nested["deep"][0]):
        assert statistics.count == 4
        assert statistics.seen == [0, 1, 2, 3]
    assert capsys.readouterr().out.split("\n")[:-1] == [f"batch {i}" for i in range(4)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda shape: torch.from_numpy(np.random.rand(*shape)),
        lambda shape: torch.tensor([[random.random() for _ in range(shape[1])] for _ in range(shape[0])]),
        lambda shape: torch.from_numpy(GLOBAL.random(shape)),
        lambda shape: torch.rand(shape, generator=TORCHS),
    ],
    ids=["numpy", "Python", "own numpy", "own torch"],
)
def test_dropout_by_hand_is_said_whatever_it_draws_from(draw):
    class ByHand(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0] * 2 * (draw(batch[0].shape) > 0.5)), batch[1])

    with pytest.warns(UserWarning, match="random numbers"):
        train(METHODS["algorithm 2"](), make=ByHand)


def test_nothing_is_said_of_a_step_that_draws_nothing():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random numbers|.*called again")
        train(METHODS["algorithm 2"]())


COUNT, NAMES, TABLE_OF_COUNTS, STEPS = 0, [], {"steps": 0}, iter(range(100))


def counting_in(place):
    """A step that counts its calls, in a place of its own and without any effect on its loss."""
    inside, numbers = 0, iter(range(100))

    class Own(Classifier):
        calls, seen = 0, []

        def __init__(self):
            super().__init__()
            self.numbers = iter(range(100))

        def count(self, batch_idx):
            nonlocal inside
            global COUNT  # noqa: PLW0603
            if place == "global":
                COUNT += 1
            elif place == "closure":
                inside += 1
            elif place == "class":
                type(self).calls += 1
            elif place == "containers":
                NAMES.append(batch_idx)
                TABLE_OF_COUNTS["steps"] += 1
                self.seen.append(batch_idx)
            elif place == "iterators":
                assert next(STEPS) == next(numbers) == next(self.numbers) == batch_idx

        def training_step(self, batch, batch_idx):
            self.count(batch_idx)
            return super().training_step(batch, batch_idx)

    def counted():
        if place == "containers":
            assert NAMES == Own.seen == list(range(BATCHES))
            return TABLE_OF_COUNTS["steps"]
        return {"global": COUNT, "closure": inside, "class": Own.calls, "iterators": next(STEPS)}[place]

    return Own, counted


@pytest.mark.parametrize("place", ["global", "closure", "class", "containers", "iterators"])
@pytest.mark.parametrize("method", METHODS)
def test_counters_outside_of_objects_advance_once(method, place, monkeypatch):
    for name, value in {"COUNT": 0, "NAMES": [], "TABLE_OF_COUNTS": {"steps": 0}, "STEPS": iter(range(100))}.items():
        monkeypatch.setitem(globals(), name, value)
    make, counted = counting_in(place)
    train(METHODS[method](), make=make, loader=make_loader(6 * BATCHES))
    assert counted() == BATCHES


def made_of(stream):
    class Own(Classifier):
        """Its loss does not depend on what it reads."""

        def on_train_start(self):
            self.stream = stream()

        def training_step(self, batch, batch_idx):
            value = next(self.stream)
            assert value is not None
            return super().training_step(batch, batch_idx)

    return Own


@pytest.mark.parametrize(
    "stream",
    [
        lambda: (i for i in range(100)),
        lambda: itertools.cycle([1, 2, 3]),
        lambda: zip(range(100), range(100)),
        lambda: map(str, range(100)),
        lambda: enumerate(range(100)),
        lambda: io.StringIO("one\n" * 100),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_moves_on_is_refused_before_it_matters(method, stream):
    with pytest.raises(NotRepeatableError, match=r"self\.stream"):
        train(METHODS[method](), make=made_of(stream))
