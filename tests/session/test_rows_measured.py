"""Rows of which some do not stand for all: refused and named before anything is trained, or right."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, train
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import UnsupportedRowsError
from lightning_dropreg.passes import Off, run_pass


def similar(one, other):
    return F.cross_entropy(F.normalize(one) @ F.normalize(other).T / 0.1, torch.arange(len(one)))


def clip(model, x, y, step):
    one, other = F.normalize(model.net(x)), F.normalize(model.net(x.flip(1)))
    logits, names = one @ other.T / 0.1, torch.arange(len(x))
    return (F.cross_entropy(logits, names) + F.cross_entropy(logits.T, names)) / 2


def hand_made_norm(model, x, y, step):
    return F.cross_entropy((z := model.net(x)) / z.std(0), y)


def pairwise(model, x, y, step):
    z = model.net(x)
    return F.margin_ranking_loss(z[:, :1], z[:, :1].T, (y[:, None] > y).to(z.dtype) * 2 - 1, margin=0.5)


def with_regularizer(model, x, y, step):
    """A loss of decorrelation that nobody knows beside one that everybody does."""
    z = model.net(x)
    return F.cross_entropy(z, y) + 0.1 * torch.cov(z.T).square().mean()


def unlabelled_beside(model, x, y, step):
    """The unlabelled are not cut with the rows: they belong to the module."""
    z = model.net(torch.cat([x, model.unlabelled]))
    return 0.1 * F.cross_entropy(z[: len(x)], y) + F.mse_loss(z[len(x) :], torch.zeros_like(z[len(x) :]))


def over_a_queue(model, x, y, step):
    """Negatives of a queue are the same for all rows: each stands for itself."""
    z = model.net(x)
    logits = torch.cat([(z * F.one_hot(y, 3)).sum(1, keepdim=True), z @ model.unlabelled[:, :3].T], 1)
    return F.cross_entropy(logits, torch.zeros_like(y))


def both_halves(model, x, y, step):
    """As many unlabelled rows as labelled ones, in the same batch: a row is a pair of them."""
    z = model.net(torch.cat([x, -x]))
    return 0.1 * F.cross_entropy(z[: len(x)], y) + F.mse_loss(z[len(x) :], torch.zeros_like(z[len(x) :]))


def summed(model, x, y, step):
    return F.cross_entropy(model.net(x), y, reduction="sum") / 24


def unknown_mean(model, x, y, step):
    return F.multi_margin_loss(model.net(x), y)


def sorted_rows(model, x, y, step):
    order = x[:, 0].argsort()
    return F.cross_entropy(model.net(x[order]), y[order])


def with_weight_decay(model, x, y, step):
    return F.cross_entropy(model.net(x), y) + sum(p.square().sum() for p in model.parameters())


REFUSED = {
    "two views": (lambda m, x, y, s: similar(m.net(x), m.net(x.flip(1))), "depends on the other rows"),
    "CLIP": (clip, "depends on the other rows"),
    "SimCSE": (lambda m, x, y, s: similar(m.net(x), m.net(x)), "depends on the other rows"),
    "norm by hand": (hand_made_norm, "depends on the other rows"),
    "unlabelled beside": (unlabelled_beside, "not cut with the rows"),
}
REFUSED_FOR_NOISE = {
    "pairs": (pairwise, "no mean over rows"),
    "regularizer": (with_regularizer, "no mean over rows"),
    "unknown sum": (lambda m, x, y, s: F.multi_margin_loss(m.net(x), y, reduction="sum"), "no mean over rows"),
}
RIGHT = {
    "queue": over_a_queue,
    "both halves": both_halves,
    "sum": summed,
    "unknown mean": unknown_mean,
    "sorted": sorted_rows,
    "weight decay": with_weight_decay,
}


class Step(Classifier):
    def __init__(self, loss, **options):
        super().__init__(lr=0.0, **options)
        self.loss = loss
        self.unlabelled = torch.randn(20, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        return self.loss(self, *batch, batch_idx)


def fit(callbacks, loss, **options):
    return train(callbacks, make=lambda: Step(loss, **options), loader=make_loader(24, 12))


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("callback", [dr.ExplicitPenalty, dr.ImplicitNoise])
def test_rows_that_do_not_stand_for_all_are_refused(kind, callback):
    loss, why = REFUSED[kind]
    with pytest.raises(UnsupportedRowsError, match=why):
        fit([callback(batch_fraction=0.25)], loss)
    fit([callback()], loss)


@pytest.mark.parametrize("kind", REFUSED_FOR_NOISE)
def test_losses_that_nobody_knows_must_be_means(kind):
    loss, why = REFUSED_FOR_NOISE[kind]
    with pytest.raises(UnsupportedRowsError, match=why):
        fit([dr.ImplicitNoise(batch_fraction=0.25)], loss)


@pytest.mark.parametrize("layers", ["before", "behind", "frozen"])
def test_batch_norm_is_named(layers):
    def loss(model, x, y, step):
        model.norm.train(layers != "frozen")
        z = model.net[:3](x)
        z = model.norm(z)
        z = F.dropout(z, 0.4) if layers == "before" else z
        return F.cross_entropy(model.net[4](z), y)

    class Normed(Step):
        def __init__(self):
            super().__init__(loss)
            self.norm = nn.BatchNorm1d(8, dtype=torch.float64)
            if layers == "behind":
                self.net[2] = nn.Sequential(nn.Tanh(), nn.Dropout(0.4))

    run = lambda: train([dr.ImplicitNoise(batch_fraction=0.25)], make=Normed, loader=make_loader(24, 12))
    if layers == "frozen":
        with warnings.catch_warnings():
            warnings.simplefilter("error", category=UserWarning)
            warnings.filterwarnings("ignore", module="lightning.pytorch")
            Normed.training_step = lambda self, batch, i: F.cross_entropy(
                self.net[4](F.dropout(self.norm.eval()(self.net[:3](batch[0])), 0.4)), batch[1]
            )
            run()
        return
    with pytest.raises(UnsupportedRowsError, match=r"statistics of the batch.*norm \(BatchNorm1d\)"):
        run()


@pytest.mark.parametrize("kind", RIGHT)
def test_noise_of_rows_that_stand_for_all_has_the_covariance_of_the_batch(kind):
    """Mean square of 600 draws against that on the whole batch; three standard errors, one false alarm in 370 seeds."""
    from lightning_dropreg.session.batch import Batch
    from lightning_dropreg.step.plan import Estimation, NoiseSettings, Plan

    model, batch = Step(RIGHT[kind]), next(iter(make_loader(12, 12)))

    def squares(fraction):
        e = Estimation("antithetic", 1e-3, "as_model", fraction, 0)
        plan, found = Plan(noise=NoiseSettings(1.0, "taylor", "loss", e)), []
        for key in range(600):
            runner = Batch(Step.training_step.__get__(model), (batch, 0), {}, model, True, key)
            with runner.isolation:
                noise = plan.run(runner, key, 0).noise
            gradients = torch.autograd.grad(noise, list(model.parameters()), allow_unused=True)
            found.append(sum(g.square().sum() for g in gradients if g is not None))
        return torch.stack(found)

    fit([dr.ImplicitNoise(batch_fraction=0.25)], RIGHT[kind])
    whole, some = squares(None), squares(0.25)
    error = ((whole.var() + some.var()) / 600).sqrt()
    assert (whole.mean() - some.mean()).abs() < 3 * error


def one_batch(*batch):
    return DataLoader([batch], batch_size=None)


def test_a_mean_is_never_refused_by_chance():
    """Small residuals, few rows: nothing is drawn in what is compared."""
    x = torch.randn(4, 4, dtype=torch.float64)
    for seed in range(30):
        torch.manual_seed(seed)
        model = Classifier(p=0.5)
        y = model.net.eval()(x).detach() + 0.01 * torch.randn(4, 3, dtype=torch.float64)
        model.net.train()
        model.training_step = lambda batch, i, m=model: F.mse_loss(m.net(batch[0]), batch[1])
        train([dr.ExplicitPenalty(batch_fraction=0.5)], make=lambda m=model: m, loader=one_batch(x, y), seed=seed)


def test_augmentation_in_the_step_is_said_where_values_show_nothing():
    noisy = lambda m, x, y, s: F.cross_entropy(m.net(x + 0.1 * torch.randn_like(x)), y)
    with pytest.warns(UserWarning, match="draws random numbers.*depends on the other rows"):
        fit([dr.ExplicitPenalty(batch_fraction=0.25)], noisy)
    scalar = lambda m, x, y, s: F.cross_entropy(m.net(x * torch.rand(())), y)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*draws random numbers.*depends.*")
        fit([dr.ExplicitPenalty(batch_fraction=0.25)], scalar)


class Later(Step):
    """A term comes in the third batch; then what it does is done in every batch."""

    def __init__(self, loss, **options):
        super().__init__(loss, **options)
        self.seen = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(float(self.trainer.callback_metrics["dropreg/loss"]))


def warmed_up_negatives(model, x, y, step):
    z = model.net(x)
    return F.cross_entropy(z, y) + (step >= 3) * similar(z, z.detach().roll(1, 1))


def warmed_up_factor(model, x, y, step):
    factor = 1.0 if step < 3 else (x[:, 0].square() * torch.arange(len(x))).mean()
    return factor * F.cross_entropy(model.net(x), y)


def warmed_up_penalty(model, x, y, step):
    return F.cross_entropy(model.net(x), y) + min(1.0, step / 4) * (x[:, 0].exp() * torch.arange(len(x))).mean()


@pytest.mark.parametrize("loss", [warmed_up_factor, warmed_up_penalty])
def test_what_the_one_pass_does_not_know_is_met_at_the_next_look(loss):
    loader = make_loader(96, 12)
    model = train(
        [dr.ExplicitPenalty(1e-9, batch_fraction=1 / 3, step_size=1e-3)], make=lambda: Later(loss), loader=loader
    )
    plain = Step(loss)
    plain.load_state_dict(model.state_dict())
    right = [float(run_pass(lambda b=b, i=i: plain.training_step(b, i), Off()).loss) for i, b in enumerate(loader)]
    assert model.seen[4:] == pytest.approx(right[4:], rel=1e-4)


def test_rows_that_stop_to_stand_for_all_are_given_up():
    loader = make_loader(96, 12)
    with pytest.warns(UserWarning, match="From step 4 on, batch_fraction is given up.*depends on the other rows"):
        model = train(
            [callback := dr.ExplicitPenalty(batch_fraction=0.25)],
            make=lambda: Later(warmed_up_negatives),
            loader=loader,
        )
    assert callback._found["whole batches"]
    whole = train([dr.ExplicitPenalty()], make=lambda: Later(warmed_up_negatives), loader=loader)
    torch.testing.assert_close(model.gradients[5], whole.gradients[5])
