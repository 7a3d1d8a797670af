"""`RDrop` in a Trainer."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, same, train

import lightning_dropreg as dr
from lightning_dropreg.errors import CheckpointSettingsError, CompositionError, LossNotRecognizedError
from lightning_dropreg.estimators import two_draws
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.step.description import describe


def expected_gradient(weights, batches, keys, alpha, accumulate=1):
    model = Classifier()
    model.net.load_state_dict(weights)
    total = 0.0
    for (x, y), key in zip(batches, keys, strict=True):
        draws = two_draws(lambda x=x, y=y: F.cross_entropy(model.net(x), y), key=key)
        total = total + ((draws.first + draws.second) / 2 + alpha * draws.divergence) / accumulate
    gradients = torch.autograd.grad(total, list(model.net.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients])


def start():
    L.seed_everything(0, verbose=False)
    return Classifier().net.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_that_of_the_functional_form(accumulate):
    model = train([dr.RDrop(alpha=0.7)], max_steps=1, accumulate_grad_batches=accumulate)
    batches = list(make_loader())[:accumulate]
    keys = [fold_key(0, 0, 0, number) for number in range(accumulate)]
    truth = expected_gradient(start(), batches, keys, 0.7, accumulate)
    torch.testing.assert_close(model.gradients[0], truth, rtol=1e-10, atol=1e-12)


def test_two_passes_a_step():
    calls = []
    note = calls.append  # a list of the step's own would be put back

    class Counting(Classifier):
        def training_step(self, batch, batch_idx):
            note(1)
            return super().training_step(batch, batch_idx)

    counts = []
    for steps in (6, 8):  # what is watched is watched at steps 1, 2, 4 and 8
        calls.clear()
        train([dr.RDrop()], make=Counting, max_steps=steps, max_epochs=3)
        counts.append(len(calls))
    assert counts[1] - counts[0] == 2 * 2


def test_alpha_zero_is_the_mean_of_two_draws():
    ours, theirs = train([dr.RDrop(alpha=0.0)]), train([dr.MiniBatchDropout(k=2, low_memory=False)])
    torch.testing.assert_close(torch.stack(ours.gradients), torch.stack(theirs.gradients))


def test_what_is_logged():
    model = train([dr.RDrop()], max_steps=1)
    metrics = model.trainer.callback_metrics
    assert metrics["dropreg/explicit_penalty"] > 0
    torch.testing.assert_close(metrics["dropreg/loss"] + metrics["dropreg/explicit_penalty"], model.losses[0])


def test_mixed_precision():
    class Half(Classifier):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            self.types = {p.grad.dtype for p in self.parameters()}

    options = dict(make=Half, model_options={"dtype": torch.float32}, loader=make_loader(dtype=torch.float32))
    half = train([dr.RDrop()], precision="bf16-mixed", max_steps=1, **options)
    full = train([dr.RDrop()], max_steps=1, **options)
    assert half.types == {torch.float32}
    torch.testing.assert_close(half.gradients[0], full.gradients[0], rtol=0.1, atol=0.02)


class Saving(Classifier):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0:
            self.first = batch

    def on_fit_end(self):
        state = {"batch": self.first, "gradients": self.gradients, "weights": self.net.state_dict()}
        torch.save(state, f"{self.folder}/rank{self.global_rank}.pt")


def test_two_processes(tmp_path):
    """The gradient is the mean over ranks, each with masks of its own, and the replicas stay equal."""
    L.seed_everything(0, verbose=False)
    model = Saving(str(tmp_path))
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    trainer = make_trainer([dr.RDrop(alpha=0.7)], devices=2, strategy="ddp_fork", max_steps=2)
    trainer.fit(model, make_loader(24, 4))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    truth = sum(
        expected_gradient(before, [ranks[rank]["batch"]], [fold_key(0, rank, 0, 0)], 0.7) / 2 for rank in range(2)
    )
    torch.testing.assert_close(ranks[0]["gradients"][0], truth, rtol=1e-10, atol=1e-12)
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name])


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss.detach()}


def test_manual_optimization():
    manual, automatic = train([dr.RDrop()], make=Manual, max_steps=1), train([dr.RDrop()], max_steps=1)
    torch.testing.assert_close(manual.gradients[0], automatic.gradients[0])


def test_with_noise():
    """As with two draws of MiniBatchDropout, from the same draws where the noise is dropout's own."""
    for noise in ({"source": "dropout"}, {}, {"injection": "loss"}):
        with_noise = train([dr.RDrop(alpha=0.0), dr.ImplicitNoise(**noise)], max_steps=2)
        theirs = train([dr.MiniBatchDropout(k=2), dr.ImplicitNoise(**noise)], max_steps=2)
        torch.testing.assert_close(torch.stack(with_noise.gradients), torch.stack(theirs.gradients))


def test_a_seed_repeats_a_run():
    assert same(train([dr.RDrop()], max_epochs=2), train([dr.RDrop()], max_epochs=2))


def test_a_checkpoint_of_another_alpha_is_refused(tmp_path):
    model = train([dr.RDrop(0.5)], max_epochs=1)
    model.trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(CheckpointSettingsError, match="alpha"):
        make_trainer([dr.RDrop(0.6)], max_epochs=2).fit(Classifier(), make_loader(), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize("other", [dr.ExplicitPenalty, dr.MiniBatchDropout])
def test_no_two_explicit_effects(other):
    with pytest.raises(CompositionError):
        train([dr.RDrop(), other()])


def test_a_regression_is_refused():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), self.net(batch[0]).detach())

    with pytest.raises(LossNotRecognizedError, match="ExplicitPenalty"):
        train([dr.RDrop()], make=Regression)


def test_a_regression_of_weight_zero_is_none():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            z = self.net(batch[0])
            return F.cross_entropy(z, batch[1]) + 0.0 * F.mse_loss(z, torch.zeros_like(z))

    plain, ours = (train([dr.RDrop()], make=make) for make in (Classifier, Regression))
    assert all(map(torch.allclose, ours.gradients, plain.gradients))


def test_inspect_says_what_it_does():
    told = describe(dr.RDrop(0.5).plan(make_trainer([dr.RDrop(0.5)])))
    assert any("R-Drop" in sentence for sentence in told)
    assert "0.5 (KL_12 + KL_21)/2" in told[-1]
