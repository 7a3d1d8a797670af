"""What the callbacks log."""

import lightning
import pytest
import torch
from fits import Classifier, make_loader, make_trainer, train
from lightning.pytorch.loggers import Logger

import lightning_dropreg as dr


def test_logged_values():
    model = train([dr.ExplicitPenalty(), dr.ImplicitNoise()], log_every_n_steps=1)
    names = {"dropreg/explicit_penalty", "dropreg/noise_norm", "dropreg/grad_norm", "dropreg/loss", "train_loss"}
    assert names <= set(model.trainer.callback_metrics)
    model = train([dr.MiniBatchDropout(2), dr.ImplicitNoise()], log_every_n_steps=1)
    assert "dropreg/noise_norm" in model.trainer.callback_metrics


@pytest.mark.parametrize("mixin", [False, True])
def test_the_means_of_an_epoch_are_known_at_its_end_whatever_is_logged_in_between(mixin):
    """Also to a callback that comes before those of a mixin."""
    steps, ends = [], []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            steps.append([trainer.callback_metrics[f"dropreg/{name}"].item() for name in ("loss", "explicit_penalty")])

        def on_train_epoch_end(self, trainer, *args):
            means = [trainer.callback_metrics[f"dropreg/{name}_epoch"] for name in ("loss", "explicit_penalty")]
            ends.append([mean.item() for mean in means])

    class Mixed(dr.ExplicitPenaltyMixin, Classifier):
        pass

    callbacks = [Watch()] if mixin else [Watch(), dr.ExplicitPenalty()]
    train(callbacks, make=Mixed if mixin else Classifier, max_epochs=2, log_every_n_steps=50)
    torch.testing.assert_close(torch.tensor(steps).view(2, 4, 2).mean(1), torch.tensor(ends))


def test_noise_norm_is_the_norm_of_what_is_added():
    values = []
    for injection in ("loss", "after_backward"):
        model = train([dr.ExplicitPenalty(), dr.ImplicitNoise(injection=injection)], log_every_n_steps=1)
        values.append(model.trainer.callback_metrics["dropreg/noise_norm"])
    torch.testing.assert_close(*values)


class Writer:
    """An experiment as loggers have it."""

    def __init__(self):
        self.written = []

    def add_scalar(self, name, value, step):
        self.written.append((name, step))


class OwnLogger(Logger):
    def __init__(self):
        super().__init__()
        self._experiment, self.written = None, []
        self.name, self.version = "own", "0"

    name = version = None

    @property
    def experiment(self):
        self._experiment = self._experiment or Writer()
        return self._experiment

    def log_hyperparams(self, *args, **kwargs):
        """Nothing."""

    def log_metrics(self, metrics, step=None):
        """Nothing."""

    def log_image(self, name, step):
        self.written.append((name, step))


METHODS = [
    lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    lambda: [dr.ExplicitPenalty(batch_fraction=0.5)],
    lambda: [dr.MiniBatchDropout(3), dr.ImplicitNoise()],
    lambda: [dr.MiniBatchDropout(1)],
]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("callbacks", METHODS)
def test_experiments_of_loggers_are_written_to_once_in_a_batch(callbacks, manual):
    class Writes(Classifier):
        def on_train_start(self):
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            assert isinstance(self.logger, OwnLogger)
            assert isinstance(self.logger.name, str)
            self.logger.experiment.add_scalar("a", 1.0, batch_idx)
            self.writer.add_scalar("b", 1.0, batch_idx)
            self.trainer.loggers[0].log_image("c", batch_idx)
            loss = super().training_step(batch, batch_idx)
            if manual:
                self.manual_backward(loss)
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None if manual else loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            """Nothing to write down."""

    logger = OwnLogger()
    with torch.random.fork_rng():
        model = Writes()
    model.writer = logger.experiment
    make_trainer(callbacks(), logger=logger).fit(model, make_loader())
    assert logger.experiment.written == [(name, i) for i in range(4) for name in ("a", "b")]
    assert logger.written == [("c", i) for i in range(4)]
