"""A step that runs several times for one batch leaves the traces of one step."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from fits import Classifier, make_loader, train

import lightning_dropreg as dr
from lightning_dropreg.functional import dropout_loss, explicit_penalty, find_sites
from lightning_dropreg.passes.isolation import Isolation

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "algorithm 4": lambda: [dr.MiniBatchDropout(3), dr.ImplicitNoise()],
    "dropout noise": lambda: [dr.ImplicitNoise(source="dropout")],
    "rows": lambda: [dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=0.5)],
    "double backward": lambda: [dr.ExplicitPenalty(estimator="double_backward")],
}


@pytest.fixture(params=METHODS)
def callbacks(request):
    return METHODS[request.param]()


def test_other_randomness_is_the_same_in_every_run_and_advances_once(callbacks):
    class Augmenting(Classifier):
        seen = None

        def on_train_batch_start(self, batch, batch_idx):
            self.seen = set()
            Augmenting.seen = self.seen  # outside what is put back

        def training_step(self, batch, batch_idx):
            draw = (torch.rand(()).item(), random.random(), np.random.rand())
            Augmenting.seen.add(draw)
            Augmenting.all[batch_idx] = draw
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args):
            assert len(Augmenting.seen) == 1

    Augmenting.all = {}
    train(callbacks, make=Augmenting, loader=make_loader(24, 12))
    ours, Augmenting.all = Augmenting.all, {}
    train([], make=Augmenting, model_options={"p": 0.0}, loader=make_loader(24, 12))
    assert ours == Augmenting.all  # as many numbers drawn as by the run without dropout


@pytest.mark.parametrize("method", [name for name in METHODS if name != "rows"])
def test_batch_norm_statistics_advance_once(method):
    callbacks = METHODS[method]()
    options = {"norm": True}
    model = train(callbacks, model_options=options)
    plain = train([], model_options={**options, "p": 0.0})
    assert model.net[1].num_batches_tracked == plain.net[1].num_batches_tracked == 4
    # the site lies behind the layer, so in the first step its statistics are those of the plain run
    one = train(callbacks, model_options=options, max_steps=1).net[1]
    reference = train([], model_options={**options, "p": 0.0}, max_steps=1).net[1]
    torch.testing.assert_close(one.running_mean, reference.running_mean)
    torch.testing.assert_close(one.running_var, reference.running_var)


def test_hidden_state_attribute_advances_once(callbacks):
    class Recurrent(Classifier):
        def __init__(self):
            super().__init__()
            self.hidden = torch.zeros(1, 8, dtype=torch.float64)
            self.history = []
            self.starts = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            Recurrent.starts_of_batch.setdefault(batch_idx, []).append(self.hidden.clone())
            h = torch.tanh(F.dropout(self.net[0](x), 0.3) + self.hidden)
            self.hidden = h.detach().mean(0, keepdim=True)
            self.history.append(batch_idx)
            return F.cross_entropy(self.net[4](h), y)

        def on_before_optimizer_step(self, optimizer):
            pass

    Recurrent.starts_of_batch = {}
    options = {"loader": make_loader(24, 12), "make": Recurrent, "model_options": {}}
    model = train(callbacks, **options)
    assert model.history == [0, 1]
    whole = Recurrent.starts_of_batch[1]
    assert all(torch.equal(start, whole[0]) for start in whole)  # every run of a batch starts from the same state


def test_antithetic_state_is_that_without_dropout_to_second_order():
    """What is carried is the mean over the pair, as if the clean pass had left it."""
    errors = []
    for step in (0.2, 0.1):
        module = torch.nn.Module()
        module.state = torch.zeros(2, 4, dtype=torch.float64)
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4).requires_grad_()

        def closure(module=module, x=x):
            h = torch.tanh(F.dropout(x, 0.3))
            module.state = h.detach()
            return F.mse_loss(h, torch.ones_like(h))

        explicit_penalty(closure, module=module, step_size=step)
        errors.append((module.state - torch.tanh(x)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_metric_is_updated_once(callbacks):
    class Measuring(Classifier):
        def __init__(self):
            super().__init__()
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
            self.listed = [torchmetrics.MeanMetric()]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.accuracy.update(self.net(batch[0]), batch[1])
            self.listed[0].update(loss)
            self.log("accuracy", self.accuracy, on_epoch=True)
            return loss

        def on_train_epoch_end(self):
            Measuring.count = self.accuracy.tp + self.accuracy.fn
            Measuring.weight = self.listed[0].weight.item()

    model = train(callbacks, make=Measuring, log_every_n_steps=1)
    assert Measuring.count == 24
    assert Measuring.weight == 4
    assert 0 <= model.trainer.callback_metrics["accuracy"] <= 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logs_count_once(callbacks, reduction):
    class Logging(Classifier):
        def training_step(self, batch, batch_idx):
            self.log("one", 1.0, reduce_fx=reduction, on_step=False, on_epoch=True)
            self.log_dict({"two": torch.tensor(2.0)}, reduce_fx=reduction, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    metrics = train(callbacks, make=Logging).trainer.callback_metrics
    expected = 4 if reduction == "sum" else 1
    assert (metrics["one"], metrics["two"]) == (expected, 2 * expected)


def test_logged_loss_is_the_loss_without_dropout_to_second_order():
    model = train([dr.ImplicitNoise(step_size=0.01)], max_steps=1)
    plain = train([], model_options={"p": 0.0}, max_steps=1)
    torch.testing.assert_close(
        model.trainer.callback_metrics["train_loss"], plain.trainer.callback_metrics["train_loss"], rtol=1e-4, atol=0
    )


def test_functional_calls_advance_a_module_once_and_listing_sites_not_at_all():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    closure = lambda: F.mse_loss(net(torch.ones(4, 3, requires_grad=True)), torch.zeros(4, 3))
    state = torch.get_rng_state()
    assert len(find_sites(closure, module=net)) == 1
    assert net[0].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)
    dropout_loss(closure, k=3, module=net)
    assert net[0].num_batches_tracked == 1
    explicit_penalty(closure, module=net)
    assert net[0].num_batches_tracked == 2


def test_isolation_restores_after_an_exception_in_a_later_run():
    module = torch.nn.Module()
    module.items, module.count = [], torch.zeros(())

    def step(fail=False):
        module.items.append(1)
        module.count += 1
        module.lazy = "made in the step"
        if fail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Isolation(module) as isolation:
        isolation.run(step)
        isolation.run(lambda: step(fail=True))
    assert (module.items, module.count.item(), module.lazy) == ([1], 1, "made in the step")


def test_runs_before_a_restart_do_not_count():
    module = torch.nn.Module()
    module.hidden, module.seen = torch.zeros(()), []
    module.register_buffer("statistics", torch.zeros(2))
    buffer = module.statistics
    draws = []

    def step(value):
        module.hidden = module.hidden + value
        module.seen.append(value)
        module.statistics.add_(value)
        draws.append(torch.rand(()).item())

    with Isolation(module, mean=True) as isolation:
        isolation.run(lambda: step(100.0))
        isolation.restart()
        isolation.run(lambda: step(1.0))
        isolation.run(lambda: step(3.0))
    assert module.hidden == 2
    assert module.seen == [1.0]
    assert module.statistics is buffer
    assert buffer.tolist() == [2, 2]  # the mean, as of the hidden state
    assert len(set(draws)) == 1


def test_runs_aside_leave_nothing():
    module = torch.nn.Module()
    module.items, module.count = [], torch.zeros(())

    def step():
        module.items.append(1)
        module.count += 1
        return len(module.items)

    original = module.count
    with Isolation(module) as isolation:
        assert [isolation.run(step, trace) for trace in (False, True, True, False)] == [1, 1, 1, 1]
    assert module.items == [1]
    assert module.count is original  # the first run that counts works on the objects themselves
    assert original == 1


def test_randomness_of_the_step_with_the_default_generator():
    """The key is drawn before the random state that both passes start from."""
    torch.set_default_dtype(torch.float64)
    net = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(4, 3))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    draws = []

    def closure():
        draws.append(torch.randn(()).item())
        return F.cross_entropy(net(x + 0.3 * draws[-1]), y)

    explicit_penalty(closure)
    dr.functional.implicit_noise(closure)
    assert draws[0] == draws[1] != draws[2] == draws[3]


def test_a_batch_changed_in_place_is_whole_again_in_every_run(callbacks):
    class Changing(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch.pop("x")
            x.sub_(1.0)
            return super().training_step((x, batch["y"]), batch_idx)

    class Careful(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"] - 1.0, batch["y"]), batch_idx)

    def loader():
        x, y = make_loader().dataset.tensors
        batches = [{"x": x[i : i + 6].clone(), "y": y[i : i + 6]} for i in range(0, 24, 6)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    models = [train(callbacks, make=make, loader=loader()) for make in (Changing, Careful)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].gradients, models[1].gradients))


def test_what_is_shared_between_modules_stays_shared(callbacks):
    class Layer(torch.nn.Module):
        def __init__(self, aux, counter):
            super().__init__()
            self.aux = aux
            self.register_buffer("counter", counter)

        def forward(self, h):
            self.counter += 1
            self.aux.append(h.detach().mean())
            return h

    class Sharing(Classifier):
        def __init__(self):
            super().__init__()
            self.aux = []
            self.register_buffer("counter", torch.zeros(()))
            self.layer = Layer(self.aux, self.counter)

        def training_step(self, batch, batch_idx):
            self.aux.clear()
            self.layer(batch[0])
            Sharing.lengths.append((len(self.aux), self.counter.item() == self.layer.counter.item()))
            return super().training_step(batch, batch_idx)

    Sharing.lengths = []
    model = train(callbacks, make=Sharing)
    assert set(Sharing.lengths) == {(1, True)}
    assert model.counter is model.layer.counter
    assert model.aux is model.layer.aux
    assert model.counter == 4


def test_long_containers_and_cycles_are_left_alone():
    module = torch.nn.Module()
    module.vocabulary = {str(i): i for i in range(1000)}
    module.cycle = {}
    module.cycle["self"] = module.cycle
    with Isolation(module, mean=True) as isolation:
        for _ in range(2):
            isolation.run(lambda: module.vocabulary.update(new=1))
    assert len(module.vocabulary) == 1001
    assert module.cycle["self"] is module.cycle


def test_validation_step_may_call_the_training_step():
    class Validating(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    import lightning as L
    from fits import make_trainer

    L.seed_everything(0)
    trainer = make_trainer([dr.ExplicitPenalty()])
    trainer.fit(Validating(), make_loader(), make_loader())
    assert "val_loss" in trainer.callback_metrics
