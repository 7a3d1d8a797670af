"""Large tensors on a module: shared by the passes while the step leaves them alone, and right when it does not."""

import pytest
import torch
from fits import Classifier, make_loader, train

import lightning_dropreg as dr
from lightning_dropreg.errors import NotRepeatableError
from lightning_dropreg.passes import still

SIZE = still.LARGE
METHODS = {
    "pair": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "in turn": lambda: [dr.ExplicitPenalty(estimator="antithetic", low_memory=True), dr.ImplicitNoise()],
    "forward": lambda: [dr.ExplicitPenalty(estimator="forward"), dr.ImplicitNoise(estimator="forward")],
    "draws": lambda: [dr.MiniBatchDropout(k=2)],
    "noise after": lambda: [dr.ImplicitNoise(source="dropout", injection="after_backward")],
}


class Holding(Classifier):
    """Has a large tensor in some place, which its step writes to from a batch on; the loss depends on it."""

    def __init__(self, place="attribute", write=None, begin=0):
        super().__init__()
        data = torch.zeros(SIZE, dtype=torch.float64)
        if place == "buffer":
            self.register_buffer("data", data)
        else:
            self.data = {"attribute": data, "list": [data], "dict": {"a": data}}[place]
        self.place, self.write, self.begin, self.met = place, write, begin, []

    @property
    def held(self):
        return self.data if self.place in {"attribute", "buffer"} else self.data[0 if self.place == "list" else "a"]

    def training_step(self, batch, batch_idx):
        if self.write is not None and batch_idx >= self.begin:
            self.write(self.held)
        self.met.append(self.held.data_ptr())
        return super().training_step(batch, batch_idx) * (1 + self.held[0])


def through_torch(tensor):
    with torch.no_grad():
        tensor += 1


def past_autograd(tensor):
    tensor.data.add_(1)


def steps_of(method, steps=12, **options):
    return train(METHODS[method](), make=Holding, model_options=options, loader=make_loader(6 * steps))


@pytest.mark.parametrize("place", ["attribute", "buffer", "list", "dict"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_leaves_alone_is_shared(method, place):
    model = steps_of(method, place=place)
    assert not model.held.any()
    # a look has copies; what a step that is not looked at meets is the tensor itself
    assert model.met[-1] == model.held.data_ptr()


@pytest.mark.parametrize("begin", [0, 1, 3, 5])
@pytest.mark.parametrize("place", ["attribute", "buffer", "list", "dict"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_writes_to_through_torch_is_written_to_once_a_batch(method, place, begin):
    steps = 7
    model = steps_of(method, steps=steps, place=place, write=through_torch, begin=begin)
    torch.testing.assert_close(model.held, torch.full_like(model.held, steps - begin))


@pytest.mark.parametrize("method", ["pair", "draws"])
def test_what_a_step_writes_to_past_autograd_from_the_start_is_written_to_once_a_batch(method):
    model = steps_of(method, steps=7, write=past_autograd)
    torch.testing.assert_close(model.held, torch.full_like(model.held, 7))


@pytest.mark.parametrize("place", ["attribute", "buffer", "list"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "forward"])
def test_what_begins_to_be_written_to_past_autograd_is_refused_by_name(method, place):
    """From batch 3 on; it is looked at in steps 1, 2 and 4."""
    with pytest.raises(NotRepeatableError, match="data of Holding past autograd|called again"):
        steps_of(method, write=past_autograd, begin=3, place=place)


def test_in_forward_mode_a_write_past_autograd_shows_in_the_version():
    model = steps_of("forward", steps=7, write=past_autograd, begin=3)
    torch.testing.assert_close(model.held, torch.full_like(model.held, 4))


class ThroughView(Holding):
    """Writes to a part of the large tensor, which it holds by itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.window = self.data[:2]

    def training_step(self, batch, batch_idx):
        if batch_idx >= self.begin:
            through_torch(self.window)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("begin", [0, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_write_through_a_view_reaches_what_is_shared_once(method, begin):
    model = train(METHODS[method](), make=ThroughView, model_options={"begin": begin}, loader=make_loader(6 * 7))
    assert model.data[:3].tolist() == [7.0 - begin, 7.0 - begin, 0.0]
    assert model.window.tolist() == [7.0 - begin] * 2
