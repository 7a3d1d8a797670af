"""What the callbacks log."""

import lightning
import pytest
import torch
from fits import Classifier, train

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
