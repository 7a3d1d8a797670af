"""State in ``__slots__``, tensors that share memory, iterators in batches: with p = 0 all is as without callbacks."""

from dataclasses import dataclass, field

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, train
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import UnsupportedModuleError

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "full": lambda: [dr.ExplicitPenalty(curvature="full")],
    "algorithm 4": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
    "the last site": lambda: [dr.MiniBatchDropout(2, sites="last")],
    "one draw": lambda: [dr.MiniBatchDropout(1)],
}
TINY = 1e-12  # the sites are there, and the noise is below what is compared


def as_without_callbacks(make, method, loader=None, beside=lambda: []):
    """Fit with the callbacks and plainly; losses and gradients are the same. Returns both modules."""
    data = loader or make_loader
    plain = train(beside(), make=make, loader=data(), model_options={"p": 0.0})
    ours = train([*METHODS[method](), *beside()], make=make, loader=data(), model_options={"p": TINY})
    for one, other in zip(ours.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return ours, plain


class Counter:
    __slots__ = ("__kept", "calls", "total")

    def __init__(self):
        self.calls, self.total, self.__kept = 0, torch.zeros(1), []

    def count(self):
        self.calls += 1
        self.total += 1
        self.__kept.append(self.calls)
        return len(self.__kept)


class Named(Counter):
    """Attributes of both kinds."""

    def __init__(self):
        super().__init__()
        self.name = 0

    def count(self):
        self.name += 1
        return super().count()


@dataclass(slots=True)
class Slotted:
    seen: list = field(default_factory=list)
    last: int | None = None

    def count(self):
        self.last = (self.last or 0) + 1
        self.seen.append(self.last)
        return len(self.seen)


@pytest.mark.parametrize("kind", [Counter, Named, Slotted])
@pytest.mark.parametrize("method", METHODS)
def test_slots_are_put_back(kind, method):
    class Counting(Classifier):
        def __init__(self, p):
            super().__init__(p)
            self.counter = {"in": [kind()]}

        def training_step(self, batch, batch_idx):
            assert self.counter["in"][0].count() == batch_idx + 1
            return super().training_step(batch, batch_idx)

    ours, _ = as_without_callbacks(Counting, method)
    assert ours.counter["in"][0].count() == 5


class Moving(Classifier):
    """A queue by hand, of which a view counts in the loss, and an alias of a weight."""

    def __init__(self, p):
        super().__init__(p)
        self.register_buffer("queue", torch.zeros(4, 3, dtype=torch.float64))
        self.first = self.queue[:2]
        self.weight = self.net[0].weight.detach()

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0])
        self.queue += z.detach().mean(0)
        shift = self.first.mean() + self.weight.sum()
        return F.cross_entropy(z + shift * torch.tensor([0.0, 0.1, 0.2]), batch[1])


@pytest.mark.parametrize("method", METHODS)
def test_views_and_aliases_stay_such(method):
    ours, plain = as_without_callbacks(Moving, method)
    torch.testing.assert_close(ours.queue, plain.queue, rtol=1e-4, atol=1e-6)
    assert ours.first._base is ours.queue
    assert ours.weight.data_ptr() == ours.net[0].weight.data_ptr()


class Fading(L.Callback):
    """Holds a buffer of the module and writes to it after every batch."""

    def on_train_start(self, trainer, module):
        self.queue = module.queue

    def on_train_batch_end(self, trainer, module, *rest):
        self.queue.mul_(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_what_others_write_to_buffers_stays(method):
    ours, plain = as_without_callbacks(Moving, method, beside=lambda: [Fading()])
    torch.testing.assert_close(ours.queue, plain.queue, rtol=1e-4, atol=1e-6)


def test_buffers_with_infinities_stay_numbers():
    class Masked(Classifier):
        def __init__(self, p=0.4):
            super().__init__(p)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]) + self.mask, batch[1] % 2)

    model = train([dr.ExplicitPenalty()], make=Masked)
    assert model.mask.tolist() == [0.0, 0.0, -torch.inf]


X, Y = next(iter(make_loader()))
BATCHES = {
    "a generator": lambda: (x for x in X.clone()),
    "a map": lambda: map(torch.clone, X),
    "an iterator": lambda: iter(list(X)),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def test_iterators_in_a_batch_are_gone_through_in_every_pass(kind, method):
    class Stacking(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(torch.stack(list(batch["x"]))), batch["y"])

    as_without_callbacks(
        Stacking, method, lambda: DataLoader([{"x": BATCHES[kind](), "y": Y} for _ in range(3)], batch_size=None)
    )


@pytest.mark.parametrize("method", METHODS)
def test_views_in_a_batch_share_memory_in_every_pass(method):
    class InPlace(Classifier):
        def training_step(self, batch, batch_idx):
            batch[0].add_(1.0)
            return F.cross_entropy(self.net(batch[1]), batch[2])

    def loader():
        return DataLoader([(x, x.view(4, 6).view(6, 4), Y) for x in (X.clone(), X.clone())], batch_size=None)

    as_without_callbacks(InPlace, method, loader)


def test_a_gradient_taken_within_the_step_is_no_shared_body():
    class Attacked(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(self.net(x), batch[1]), x)
            return F.cross_entropy(self.net(x), batch[1]) + slope.square().sum()

    as_without_callbacks(Attacked, "the last site")


class Growing(Classifier):
    def __init__(self, p=0.4, norm=False):
        super().__init__(p)
        self.net[4] = nn.LazyLinear(3, dtype=torch.float64)
        if norm:
            self.net[1] = nn.LazyBatchNorm1d(dtype=torch.float64)

    def on_before_optimizer_step(self, optimizer):
        pass


def test_lazy_modules_know_what_they_have_become():
    model = train([dr.ExplicitPenalty()], make=Growing)
    assert model.net[4].in_features == 8
    assert not hasattr(model.net[4], "_initialize_hook")


@pytest.mark.parametrize("callback", [dr.ExplicitPenalty, dr.DropoutDiagnostics])
def test_lazy_buffers_are_refused_by_name(callback):
    with pytest.raises(UnsupportedModuleError, match="LazyBatchNorm1d makes its buffers in its first forward"):
        train([callback()], make=Growing, model_options={"norm": True})
