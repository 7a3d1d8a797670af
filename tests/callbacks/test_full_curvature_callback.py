"""`ExplicitPenalty(curvature="full")` in a Trainer."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, same, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.errors import DivergenceError, KinkedNetworkWarning, UnboundedPenaltyWarning
from lightning_dropreg.estimators import Pairs, antithetic, one_pass
from lightning_dropreg.estimators.layout import find_layout
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Off, run_pass

pytestmark = pytest.mark.filterwarnings("ignore::lightning_dropreg.errors.UnboundedPenaltyWarning")


class OwnMean(Classifier):
    """A loss that nobody knows, and a mean over rows."""

    def training_step(self, batch, batch_idx):
        return F.multi_margin_loss(torch.tanh(self.net(batch[0])), batch[1], p=2)


class OwnLoss(Classifier):
    """A loss that nobody knows, behind a nonlinearity."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = torch.tanh(self.net(x))
        return F.multi_margin_loss(z, y, p=2) + 0.1 * z.square().sum() / z.abs().sum()


def penalty(**options):
    return [dr.ExplicitPenalty(curvature="full", **options)]


def test_a_step_is_that_of_the_functional_form():
    model = train(penalty(strength=2.0), make=OwnLoss, max_steps=1)
    torch.manual_seed(0)
    x, y = next(iter(make_loader()))
    fresh = OwnLoss()
    fresh.net.load_state_dict(train([], make=OwnLoss, max_steps=0).net.state_dict())
    estimate = antithetic(
        lambda: fresh.training_step((x, y), 0),
        curvature="full",
        noise=False,
        step_size=0.1,
        mask="as_model",
        key=fold_key(0, 0, 0, 0),
    )
    gradients = torch.autograd.grad(estimate.loss + 2 * estimate.penalty, list(fresh.net.parameters()))
    torch.testing.assert_close(model.gradients[0], torch.cat([g.reshape(-1) for g in gradients]))


def test_low_memory_differentiates_every_pass_at_once_and_gives_the_same():
    calls = []
    note = calls.append  # a list of the step's own would be put back

    class Counting(OwnLoss):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:  # in which nothing is looked at
                note(torch.is_grad_enabled())
            return super().training_step(batch, batch_idx)

    for more in ([], [dr.ImplicitNoise(low_memory=True)]):
        low = train(penalty(low_memory=True) + more, make=Counting, max_steps=4)
        assert len(calls) == 3  # no repetition of a pass
        calls.clear()
        high = train(
            penalty(estimator="antithetic") + [dr.ImplicitNoise(estimator="antithetic") for _ in more],
            make=Counting,
            max_steps=4,
        )
        assert len(calls) == 3
        calls.clear()
        torch.testing.assert_close(torch.stack(low.gradients), torch.stack(high.gradients), rtol=1e-9, atol=1e-12)


def test_the_untouched_loss_is_logged_exactly():
    class Seeing(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append(self.trainer.callback_metrics["dropreg/loss"].clone())

    model = train(penalty(), make=Seeing, max_steps=1)
    plain = train([dr.ExplicitPenalty(0.0)], make=Seeing, max_steps=1)
    assert torch.equal(model.losses[0], plain.losses[0])


def test_in_one_pass_the_drawn_rows_stand_there_three_times():
    torch.set_default_dtype(torch.float64)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.arange(6) % 2

    def on_rows(rows):
        return lambda: F.cross_entropy(net(x[rows]), y[rows])

    options = dict(curvature="full", noise=True, step_size=1e-2, mask="as_model", key=5)
    rows = torch.tensor([0, 2, 3, 5, 1, 4, 1, 4, 1, 4])
    ours = one_pass(on_rows(rows), find_layout(on_rows, 6), Pairs(6, 2, clean=True), **options)
    apart = antithetic(on_rows(torch.tensor([1, 4])), **options)
    torch.testing.assert_close(ours.loss, run_pass(on_rows(torch.arange(6)), Off()).loss)
    torch.testing.assert_close(ours.penalty, apart.penalty)
    torch.testing.assert_close(ours.noise, apart.noise)


@pytest.mark.parametrize("make", [Classifier, OwnMean], ids=["known", "unknown"])
def test_a_fraction_of_the_rows(make):
    """In one pass where the loss is known and a mean, else one pass for the loss and three over the rows."""
    sizes = []
    note = sizes.append  # what a step reaches otherwise is put back for every pass

    class Counting(make):
        def training_step(self, batch, batch_idx):
            note(len(batch[0]))
            return super().training_step(batch, batch_idx)

    train(penalty(batch_fraction=1 / 3), make=Counting, max_steps=2)
    # 6 rows, 2 of them drawn
    assert sizes[-1:] == [10] if make is Classifier else sorted(sizes[-4:]) == [2, 2, 2, 6]


def test_a_resumed_or_accumulated_run_is_one_run():
    assert same(train(penalty(), max_epochs=2), train(penalty(), max_epochs=2))
    train(penalty(), accumulate_grad_batches=2, gradient_clip_val=0.1)


def test_training_warns_once_unless_it_is_watched():
    with pytest.warns(UnboundedPenaltyWarning, match="DivergenceDetector") as caught:
        train(penalty(), max_steps=3)
    assert len([w for w in caught if w.category is UnboundedPenaltyWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnboundedPenaltyWarning)
        train([*penalty(), dr.DivergenceDetector()], max_steps=1)


def test_a_penalty_that_becomes_negative_is_warned_of_once():
    """That of a focal loss, confidently wrong; that of cross entropy never is."""
    picked = lambda p, y: p.gather(-1, y[:, None])[:, 0]
    focal = dr.recognize(lambda z, y: -((1 - picked(z.softmax(-1), y)) ** 2) * picked(z.log_softmax(-1), y))

    class Wrong(Classifier):
        def training_step(self, batch, batch_idx):
            z = 6 * self.net(batch[0])[:, :2]
            return self.loss(z, z.argmin(-1)).mean()

        loss = staticmethod(F.cross_entropy)

    class Focal(Wrong):
        loss = staticmethod(focal)

    for make, count in ((Focal, 1), (Wrong, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train([dr.ExplicitPenalty()], make=make, max_steps=4)
        told = [str(w.message) for w in caught if w.category is UnboundedPenaltyWarning]
        assert len(told) == count, told
        assert all("negative at optimizer step 0" in each for each in told)


def test_training_tells_of_kinks_unless_derivatives_are_followed():
    class Kinked(Classifier):
        def __init__(self):
            super().__init__()
            self.net.insert(4, nn.Linear(8, 8).double())
            self.net.insert(5, nn.ReLU())

    with pytest.warns(KinkedNetworkWarning, match="curvature='full'"):
        train(penalty(estimator="antithetic"), make=Kinked, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KinkedNetworkWarning)
        train(penalty(estimator="auto"), make=Kinked, max_steps=1)  # which takes forward mode there


def test_the_detector_sees_a_penalty_far_below_zero():
    class Concave(Classifier):
        def training_step(self, batch, batch_idx):
            return 100 - self.net(batch[0]).square().mean()  # linear behind the dropout: below zero in every draw

    watch = dr.DivergenceDetector(penalty_ratio=1e-5, patience=1, every_n_steps=1)
    with pytest.raises(DivergenceError):
        train([*penalty(), watch], make=Concave, max_steps=1)
