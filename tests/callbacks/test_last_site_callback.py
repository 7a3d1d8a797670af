"""`MiniBatchDropout(k, sites="last")` in a Trainer: multi-sample dropout."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, same, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.errors import CheckpointSettingsError, CompositionError, InvalidArgumentError
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes.last_site import draws_at_last_site
from lightning_dropreg.step.description import describe


class Two(Classifier):
    """Two sites and batch norm; counts how often each layer is computed."""

    def __init__(self, inplace=False, **options):
        super().__init__(**options)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.SiLU(), nn.Dropout(0.4),
            nn.Linear(8, 3),
        ).double()  # fmt: skip
        self.net[6].inplace = inplace


def last(k=4, **options):
    return [dr.MiniBatchDropout(k=k, sites="last", **options)]


def expected(weights, keys, batches, k, correction=0.0):
    """The gradient of whole passes with the earlier masks repeated."""
    model = Two()
    model.net.load_state_dict(weights)
    total = 0.0
    for key, (x, y) in zip(keys, batches, strict=True):
        passes = draws_at_last_site(lambda x=x, y=y: F.cross_entropy(model.net(x), y), key=key, k=k, share=False)
        losses = [done.loss for done in passes]
        total = total + sum(losses) / k + correction * (losses[0] - losses[1])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total / len(keys), list(model.net.parameters()))])


def start():
    L.seed_everything(0, verbose=False)
    return Two().net.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_it_is_the_gradient_of_whole_passes_with_the_earlier_masks_repeated(inplace, accumulate):
    model = train(last(), make=Two, model_options={"inplace": inplace}, max_steps=1, accumulate_grad_batches=accumulate)
    keys = [fold_key(0, 0, 0, number) for number in range(accumulate)]
    truth = expected(start(), keys, list(make_loader())[:accumulate], 4)
    torch.testing.assert_close(model.gradients[0], truth, rtol=1e-9, atol=1e-12)
    assert model.net[1].num_batches_tracked == accumulate


class Counting(Two):
    note = None

    def training_step(self, batch, batch_idx):
        from torch.utils._python_dispatch import TorchDispatchMode

        note = self.note

        class Kernels(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                note(func.name())
                return func(*args, **(kwargs or {}))

        with Kernels():
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("inplace", "layers"), [(False, 2 + 4), (True, 3 * 4)])
def test_the_body_runs_once_if_it_can(inplace, layers):
    counts = {}
    for steps in (6, 8):  # what is watched is watched at steps 1, 2, 4 and 8
        names = []
        Counting.note = staticmethod(names.append)  # a list of the step's own would be put back
        train(last(), make=Counting, model_options={"inplace": inplace}, max_steps=steps, max_epochs=3)
        counts[steps] = names.count("aten::addmm")
    assert counts[8] - counts[6] == 2 * layers


def test_one_site_is_plain_dropout_k():
    """With a single site there is nothing that the draws could share."""
    ours, all_sites = train(last()), train([dr.MiniBatchDropout(k=4, low_memory=False)])
    torch.testing.assert_close(torch.stack(ours.gradients), torch.stack(all_sites.gradients))


def test_noise_of_the_draws_restores_what_they_took():
    model = train([*last(), dr.ImplicitNoise(source="dropout")], make=Two, max_steps=1)
    truth = expected(start(), [fold_key(0, 0, 0, 0)], [next(iter(make_loader()))], 4, math.sqrt(0.5 * (1 - 1 / 4)))
    torch.testing.assert_close(model.gradients[0], truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("noise", [{}, {"source": "dropout", "injection": "after_backward"}])
def test_other_noise_is_refused(noise):
    with pytest.raises(CompositionError, match="last site only"):
        train([*last(), dr.ImplicitNoise(**noise)], make=Two)


def test_pairs_with_opposite_masks():
    model = train(last(2, antithetic=True), make=Two, max_steps=1)
    assert torch.isfinite(model.gradients[0]).all()
    assert not torch.allclose(model.gradients[0], train(last(2), make=Two, max_steps=1).gradients[0])


def test_manual_optimization_and_mixed_precision():
    class Manual(Two):
        def __init__(self, **options):
            super().__init__(**options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss.detach()}

    manual, automatic = train(last(), make=Manual, max_steps=1), train(last(), make=Two, max_steps=1)
    torch.testing.assert_close(manual.gradients[0], automatic.gradients[0])

    class Single(Two):
        def __init__(self):
            super().__init__()
            self.net.float()

    options = dict(make=Single, loader=make_loader(dtype=torch.float32), max_steps=1)
    half, full = train(last(), precision="bf16-mixed", **options), train(last(), **options)
    torch.testing.assert_close(half.gradients[0], full.gradients[0], rtol=0.1, atol=0.02)


def test_a_run_repeats_and_a_checkpoint_knows_its_sites(tmp_path):
    model = train(last(), make=Two, max_epochs=1)
    assert same(model, train(last(), make=Two, max_epochs=1))
    model.trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(CheckpointSettingsError, match="sites"):
        trainer = make_trainer([dr.MiniBatchDropout(k=4)], max_epochs=2)
        trainer.fit(Two(), make_loader(), ckpt_path=tmp_path / "one.ckpt")


def test_what_it_says_and_refuses():
    told = describe(last(8)[0].plan(make_trainer(last(8))))
    assert "up to the last dropout site" in told[0]
    with pytest.raises(InvalidArgumentError, match="sites"):
        dr.MiniBatchDropout(k=4, sites="first")
