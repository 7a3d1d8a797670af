"""What a step costs besides its passes: counted in operations, which no load of the machine changes."""

from collections import Counter

import pytest
from fits import Classifier, make_loader, make_trainer
from lightning import Callback
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_dropreg as dr
from lightning_dropreg.session import batch


class Operations(Callback):
    """Notes the names of the operations of the second step, backward and optimizer included."""

    def __init__(self, step=1):
        self.names = []
        self._step = step
        noted = self.names

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                noted.append(str(func))
                return func(*args, **(kwargs or {}))

        self._mode = Mode()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self._step:
            self._mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self._step:
            self._mode.__exit__(None, None, None)


def operations(callbacks, p=0.4, step=1, **options):
    watch = Operations(step)
    trainer = make_trainer([*callbacks, watch], log_every_n_steps=100, **options)
    trainer.fit(Classifier(p), make_loader())
    return watch.names


@pytest.mark.parametrize(
    "callbacks",
    [
        [dr.ExplicitPenalty(every_n_steps=4)],
        [dr.ExplicitPenalty(strength=0), dr.ImplicitNoise(strength=0)],
        [dr.MiniBatchDropout(k=1)],
    ],
)
def test_a_step_in_which_nothing_happens_has_the_operations_of_a_plain_one(callbacks):
    p = 0.4 if callbacks[0].k else 0.0  # elsewhere dropout is off
    plain, intercepted = operations([], p), operations(callbacks)
    more = Counter(intercepted) - Counter(plain)
    assert not Counter(plain) - Counter(intercepted)
    # the loss is kept for the mean of the epoch, a scalar to add
    assert set(more) <= {"aten.detach.default", "aten.add.Tensor"}
    assert more.total() <= 3


def test_only_steps_in_which_something_happens_are_isolated(monkeypatch):
    isolated = []

    class Counting(batch.Isolation):
        def __init__(self, *args, **kwargs):
            isolated.append(None)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(batch, "Isolation", Counting)
    trainer = make_trainer([dr.ExplicitPenalty(every_n_steps=2)], log_every_n_steps=100)
    trainer.fit(Classifier(), make_loader())
    assert trainer.global_step == 4
    assert len(isolated) == 1 + 2 + 1  # the look at the first step, steps 0 and 2, and another look in step 2


class Logged(Classifier):
    """Notes in which steps this package logs the loss."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def log(self, name, *args, **kwargs):
        super().log(name, *args, **kwargs)
        if name == "dropreg/loss":
            self.steps.append(self.global_step)


def test_values_are_logged_where_they_are_read():
    model = Logged()
    trainer = make_trainer([dr.ExplicitPenalty(every_n_steps=4)], log_every_n_steps=2, max_steps=7, max_epochs=2)
    trainer.fit(model, make_loader(n=30))  # 5 steps an epoch
    # 0: the first; 1, 3, 5: the logger's; 4: the end of the epoch; 6: of the fit
    assert model.steps == [0, 1, 3, 4, 5, 6]
    assert trainer.callback_metrics["dropreg/explicit_penalty"] > 0


def test_operations_of_a_step_on_some_rows_within_the_pass():
    """A limit, so that they do not grow unseen; in step 3 nothing is looked at again."""
    options = {"batch_fraction": 0.5, "estimator": "antithetic"}
    economical = operations([dr.ExplicitPenalty(**options), dr.ImplicitNoise(**options)], step=3)
    assert 100 < len(economical) - len(operations([], 0.0, step=3)) < 210
