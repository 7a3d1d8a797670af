"""What a step makes or changes of its module: hooks, parametrizations, buffers, and what it logs and reads back."""

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, train
from torch import nn
from torch.nn.utils import parametrize

import lightning_dropreg as dr
from lightning_dropreg.errors import UnsupportedModuleError

METHODS = {
    "penalty": lambda: [dr.ExplicitPenalty()],
    "algorithm 4": lambda: [dr.MiniBatchDropout(4), dr.ImplicitNoise()],
    "one draw": lambda: [dr.MiniBatchDropout(1)],
    "strength 0": lambda: [dr.ExplicitPenalty(strength=0.0)],
}


@pytest.fixture(params=METHODS)
def callbacks(request):
    return METHODS[request.param]()


class Lazy(Classifier):
    """Makes something of itself in the first step, and notes that it has."""

    def __init__(self):
        super().__init__()
        self.ready, self.outputs = False, []

    def training_step(self, batch, batch_idx):
        if not self.ready:
            self.prepare()
            self.ready = True
        self.outputs = []
        return super().training_step(batch, batch_idx)


class Hooks(Lazy):
    def prepare(self):
        for layer in self.net:
            layer.register_forward_hook(lambda module, args, output: self.outputs.append(output.detach()))


class PreHooks(Lazy):
    def prepare(self):
        self.net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class Parametrized(Lazy):
    def prepare(self):
        parametrize.register_parametrization(self.net[4], "weight", Doubled())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Replaced(Lazy):
    def prepare(self):
        self.net[1] = nn.Softplus()
        self.net.add_module("last", nn.Tanh())


def test_hooks_of_the_first_step_are_there_once(callbacks):
    model = train(callbacks, make=Hooks)
    assert len(model.outputs) == 5
    assert all(len(layer._forward_hooks) == 1 for layer in model.net)


def test_hooks_before_the_forward_act_once(callbacks):
    model = train(callbacks, make=PreHooks)
    assert len(model.net[0]._forward_pre_hooks) == 1


def test_parametrizations_are_there_once(callbacks):
    model = train(callbacks, make=Parametrized)
    assert len(model.net[4].parametrizations.weight) == 1
    assert torch.equal(model.net[4].weight, 2 * model.net[4].parametrizations.weight.original)


def test_submodules_of_the_first_step_are_there_once(callbacks):
    model = train(callbacks, make=Replaced)
    assert isinstance(model.net[1], nn.Softplus)
    assert [name for name, _ in model.net.named_children()] == ["0", "1", "2", "3", "4", "last"]


def test_a_hook_that_removes_itself_is_gone(callbacks):
    class Once(Lazy):
        def prepare(self):
            handle = self.net[0].register_forward_hook(lambda *args: handle.remove())

    assert not train(callbacks, make=Once).net[0]._forward_hooks


def test_lazy_modules_become_what_they_are(callbacks):
    class Growing(Classifier):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.LazyLinear(3, dtype=torch.float64)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_before_optimizer_step(self, optimizer):
            pass

    model = train(callbacks, make=Growing)
    assert type(model.net[4]) is nn.Linear
    assert not model.net[4]._forward_pre_hooks


# ---------------------------------------------------------------- buffers after an antithetic pair
class Norm(Classifier):
    """Statistics behind dropout, by a norm or by hand."""

    kind = "norm"

    def __init__(self, p=0.5):
        super().__init__()
        self.dropout, self.layer = nn.Dropout(p), nn.Linear(4, 4, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.net = nn.Linear(4, 3, dtype=torch.float64)
        for name in ("mean", "square"):
            self.register_buffer(name, torch.zeros(4, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        h = self.layer(self.dropout(batch[0]))
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        self.square = 0.9 * self.square + 0.1 * h.detach().square().mean(0)
        return F.cross_entropy(self.net(torch.tanh(self.norm(h)) - self.mean * self.square), batch[1])


def statistics(callbacks, p=0.5):
    model = train(callbacks, make=lambda: Norm(p), loader=make_loader(6))
    return model.norm.running_mean, model.norm.running_var, model.mean, model.square


def test_linear_statistics_of_a_pair_are_those_without_dropout():
    for got, right in list(zip(statistics([dr.ExplicitPenalty()]), statistics([], p=0.0)))[::2]:
        torch.testing.assert_close(got, right)


def test_other_statistics_of_a_pair_are_right_to_second_order():
    right = statistics([], p=0.0)
    wide, narrow = (
        [(a - b).norm() for a, b in zip(statistics([dr.ExplicitPenalty(step_size=step)]), right)][1::2]
        for step in (0.1, 0.05)
    )
    for far, near in zip(wide, narrow):
        assert near < 0.3 * far


def test_buffers_stay_the_same_objects():
    seen = []

    class Held(Norm):
        def on_train_start(self):
            seen.append([self.mean, self.norm.running_mean])

    model = train([dr.ExplicitPenalty()], make=Held)
    assert model.mean is seen[0][0]
    assert model.norm.running_mean is seen[0][1]


# ---------------------------------------------------------------- logs
class ReadsBack(Classifier):
    def training_step(self, batch, batch_idx):
        self.log("x", float(batch_idx), prog_bar=True, logger=True)
        self.log_dict({"y": torch.tensor(2.0 * batch_idx), "z": 1.0}, on_step=True, on_epoch=True)
        metrics = self.trainer.callback_metrics, self.trainer.progress_bar_metrics, self.trainer.logged_metrics
        found = [float(metrics[0]["x"]), float(metrics[1]["x"]), float(metrics[2]["x"]), float(metrics[0]["y_step"])]
        self.found = [*self.found, found]
        return super().training_step(batch, batch_idx)

    def on_train_start(self):
        self.found = []


def test_what_is_logged_can_be_read_in_the_same_step(callbacks):
    model = train(callbacks, make=ReadsBack)
    assert model.found == [[i, i, i, 2 * i] for i in range(4)]
    assert model.trainer.callback_metrics["y_epoch"] == 3  # and counts once
    assert model.trainer.callback_metrics["x"] == 3


def test_a_curriculum_that_reads_the_loss_of_the_step_before(callbacks):
    class Curriculum(Classifier):
        def training_step(self, batch, batch_idx):
            before = float(self.trainer.callback_metrics.get("level", 0.0))
            assert before == batch_idx
            self.log("level", before + 1)
            return super().training_step(batch, batch_idx)

    train(callbacks, make=Curriculum)


class Scripted(Classifier):
    def __init__(self, part):
        super().__init__()
        self.part = torch.jit.script(part.double())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net[4](self.part(self.net[:4](batch[0]))), batch[1])


class Unscripted(Scripted):
    def __init__(self, part):
        Classifier.__init__(self)
        self.part = part.double()


@pytest.mark.parametrize("method", ["penalty", "algorithm 4"])
def test_scripted_parts_train_unless_they_have_state(method):
    options = {"part": nn.Sequential(nn.Tanh(), nn.Softplus())}
    models = [train(METHODS[method](), make=make, model_options=options) for make in (Scripted, Unscripted)]
    for scripted, plain in zip(*(model.gradients for model in models), strict=True):
        torch.testing.assert_close(scripted, plain)
    with pytest.raises(UnsupportedModuleError, match=r"part is a TorchScript module with buffers"):
        train(METHODS[method](), make=Scripted, model_options={"part": nn.BatchNorm1d(8)})
