"""`DropoutDiagnostics` in a Trainer: it measures what it should, and training does not notice."""

import math
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, train
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

import lightning_dropreg as dr
from lightning_dropreg.diagnostics import Costs, Diagnosis, EffectReport, PenaltyReport, read, tables, trusted
from lightning_dropreg.diagnostics.figures import draw
from lightning_dropreg.errors import InvalidArgumentError, MissingDependencyError, UnsupportedModuleError
from lightning_dropreg.interception.sites import Site


class Stateful(Classifier):
    """Everything a repeated step could disturb: batch norm, a carried state, a metric, random numbers, sums logged."""

    def __init__(self, p=0.4):
        super().__init__(p, norm=True)
        self.metric = MeanMetric()
        self.carried = torch.zeros((), dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) + 0.01 * self.carried
        z = self.net(x)
        self.carried = self.carried / 2 + z.detach().mean()
        loss = F.cross_entropy(z, y)
        self.metric.update(loss)
        self.log("sum", loss.detach(), reduce_fx="sum", on_epoch=True, on_step=False)
        return loss


def diagnostics(**options):
    return dr.DropoutDiagnostics(**{"draws": 4, "verbose": False, **options})


REGULARIZERS = {
    "dropout": list,
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "algorithm 4": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
}


@pytest.mark.parametrize("method", REGULARIZERS)
@pytest.mark.parametrize("batch", ["first", "current"])
def test_training_does_not_notice(method, batch):
    def outcome(callbacks):
        model = train(callbacks, make=Stateful, max_epochs=2)
        values = {**model.state_dict(), "carried": model.carried, "metric": model.metric.compute()}
        values |= {f"gradient {i}": g for i, g in enumerate(model.gradients)}
        values |= {f"loss {i}": v for i, v in enumerate(model.losses)}
        logged = {k: v for k, v in model.trainer.callback_metrics.items() if "diagnostics" not in k}
        return {**values, **logged, "random": torch.get_rng_state()}

    plain = outcome(REGULARIZERS[method]())
    watch = diagnostics(steps=[2], batch=batch)
    watched = outcome([watch, *REGULARIZERS[method]()])
    assert [found.step for found in watch.history] == [0, 2, 4, 8]
    assert plain.keys() == watched.keys()
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name


def test_the_models_own_dropout_is_measured_whatever_replaces_it_in_training():
    one, other = diagnostics(at_end=False), diagnostics(at_end=False)
    train([one])
    train([dr.ExplicitPenalty(), dr.ImplicitNoise(), other])
    assert torch.equal(one.history[0].effect.samples, other.history[0].effect.samples)
    assert one.history[0].effect.truth().value > 0


def test_penalty_and_noise_are_those_of_the_trainers_callbacks():
    elementwise, plain = diagnostics(at_end=False), diagnostics(at_end=False)
    settings = {"estimator": "forward", "mask": "elementwise"}
    train([dr.ExplicitPenalty(2.0, "identity", **settings), dr.ImplicitNoise(**settings), elementwise])
    train([dr.MiniBatchDropout(2), plain])
    [penalty, noise] = elementwise.history[0].penalty, elementwise.history[0].noise
    assert (penalty.strength, penalty.curvature) == (2.0, "identity")
    assert {(one.estimator, one.mask) for one in (penalty, noise)} == {("forward", "elementwise")}
    assert plain.history[0].penalty is None
    assert plain.history[0].noise.estimator == "antithetic"


@pytest.mark.parametrize("stop", [{"max_epochs": 2}, {"max_steps": 6}])
def test_a_resumed_run_has_the_whole_history(tmp_path, stop):
    """On the batch held before, although the data come in another order, at the moments of an uninterrupted run."""

    def run(watch, folder, **options):
        checkpoint = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=2)
        L.seed_everything(0, verbose=False)
        ckpt_path = options.pop("ckpt_path", None)
        trainer = make_trainer([watch, checkpoint], enable_checkpointing=True, **options)
        loader = make_loader() if ckpt_path is None else make_loader(seed=2)
        trainer.fit(Classifier(lr=0.0), loader, ckpt_path=ckpt_path)
        return checkpoint.last_model_path

    whole, first, second = (diagnostics(at_end=False) for _ in range(3))
    run(whole, "whole", max_epochs=4)
    path = run(first, "first", **stop)
    assert torch.load(path, weights_only=True)
    run(second, "second", max_epochs=4, ckpt_path=path)
    assert [found.step for found in second.history] == [0, 4, 8, 12] == [found.step for found in whole.history]
    for one, other in zip(whole.history, second.history, strict=True):
        assert one.as_dict() == other.as_dict()


def test_a_batch_too_large_to_keep_is_missed_after_resuming(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dropreg.callbacks.diagnostics.LARGEST_HELD", 10)
    model = train([diagnostics()])
    model.trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="another batch than before"):
        make_trainer([diagnostics()], max_epochs=2).fit(Classifier(), make_loader(), ckpt_path=tmp_path / "last.ckpt")


def test_a_held_batch_is_the_same_at_every_measurement():
    losses = {}
    for batch in ("first", "current"):
        watch = diagnostics(steps=[1, 2, 3], batch=batch)
        train([watch], model_options={"lr": 0.0})
        losses[batch] = {round(found.effect.loss, 9) for found in watch.history}
    assert len(losses["first"]) == 1
    assert len(losses["current"]) == 4


def test_what_is_logged(tmp_path):
    watch = diagnostics(every_n_epochs=2)
    train([watch], max_epochs=3, logger=CSVLogger(tmp_path, "", ""))
    [header, *rows] = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = {f"dropreg/diagnostics/{n}" for n in ("r_drop", "r_approx_margin", "r_drop/net.3", "noise/trace_drop")}
    assert columns <= set(header.split(","))
    at = header.split(",").index("dropreg/diagnostics/r_drop")
    values = [float(row.split(",")[at]) for row in rows if row.split(",")[at]]
    assert values == pytest.approx([found.effect.truth().value for found in watch.history])
    assert [found.epoch for found in watch.history] == [0, 2, 3]
    assert all(math.isfinite(value) for value in watch.history[-1].metrics().values())


class Pair(Classifier):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        [watch] = [c for c in self.trainer.callbacks if isinstance(c, dr.DropoutDiagnostics)]
        found = watch.history[-1]
        saved = {"samples": found.effect.samples, "noise": found.noise.samples, "weights": self.net.state_dict()}
        torch.save(saved, f"{self.folder}/rank{self.global_rank}.pt")


def test_two_processes_report_the_average_batch(tmp_path):
    L.seed_everything(1, verbose=False)
    watch = diagnostics(draws=32)
    make_trainer([watch], devices=2, strategy="ddp_fork", max_epochs=1).fit(Pair(str(tmp_path)), make_loader(24, 12))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name in ("samples", "noise"):
        assert torch.equal(one[name], two[name])
    # one process with the batch that the two had together
    L.seed_everything(1, verbose=False)
    model = Classifier()
    model.net.load_state_dict(one["weights"])
    alone = diagnostics(draws=32, at_end=False)
    make_trainer([alone], max_steps=1).fit(model, make_loader(24, 24))
    effect = alone.history[0].effect
    both = EffectReport(effect.sites, 0.0, one["samples"], 0.95)
    for found in ("truth", "approximation"):
        a, b = getattr(effect, found)(), getattr(both, found)()
        assert abs(a.value - b.value) < 3 * math.hypot(a.margin, b.margin)
        assert 0.4 < a.margin / b.margin < 2.5
    assert 0.5 < one["noise"][..., 0].mean() / alone.history[0].noise.samples[..., 0].mean() < 2


def report(truth, approximation, sites=2, draws=40):
    g = torch.Generator().manual_seed(1)
    samples = torch.zeros(draws, 1 + sites, 5, dtype=torch.float64)
    samples[:, :, 0] = truth
    samples[:, :, 2:] = approximation
    samples += 0.1 * torch.randn(samples.shape, generator=g, dtype=torch.float64)
    found = tuple(Site(f"a [{i}]", 0.1 * (i + 1), (2,), (2,), "dropout") for i in range(sites))
    return EffectReport(found, 2.0, samples, 0.95)


@pytest.mark.parametrize(
    ("truth", "approximation", "verdict"), [(1, 0.95, "yes"), (1, 0.5, "no"), (1, 1.5, "no"), (1, 0.8, "unclear")]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_trust(truth, approximation, verdict, sign):
    found = report(sign * truth, sign * approximation)
    assert trusted(found, 0.2) == trusted(found, 0.2, site=1) == verdict


def test_a_warning_where_the_expansion_is_not_to_be_trusted():
    with pytest.warns(UserWarning, match="not to be trusted"):
        train([diagnostics(draws=32, tolerance=1e-9)], model_options={"p": 0.85})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not to be trusted.*")
        train([diagnostics(tolerance=100.0)])


def test_shares_of_a_sum_that_may_be_nothing_are_not_told():
    told = " ".join(read(Diagnosis(report(0.004, 0.004, draws=8))))
    assert "shares of the sum would mean nothing" in told
    assert "alone, " not in told  # it is not that a site would lower the loss


def test_the_reading_says_what_was_measured_and_no_more():
    effect = report(1, 0.5)
    told = " ".join(read(Diagnosis(effect)))
    assert "adds 5" in told  # 1 of 2 is half of the loss
    assert "a [0]" in told
    assert "cannot be ranked" in told
    assert "is not within 20 %" in told
    assert "Costs: not measured" in told
    assert "noise" not in told
    assert "as configured" not in told
    costs = Costs({"Algorithm 2": (2.0, 1.9, 2.1)}, {"forward": "no formula"}, "one round")
    swept = " ".join(read(Diagnosis(effect, sweep=((0.1, report(1, 1)), (0.9, effect))), costs))
    assert "within: 0.1; outside: 0.9" in swept
    assert "(one round): Algorithm 2 2.00 (1.90 to 2.10). Not possible here: forward." in swept
    penalty = PenaltyReport(0.5 + effect.samples[:, 0, 0] / 1000, 0.95, strength=2.0, step_size=0.3)
    configured = " ".join(read(Diagnosis(effect, penalty=penalty)))
    assert "(loss_hessian, antithetic with step 0.3)" in configured
    assert "strength of 2: 100 % of R_drop" in configured or "strength of 2: 101 % of R_drop" in configured
    nothing = " ".join(read(Diagnosis(report(0, 0))))
    assert "cannot be told from 0" in nothing
    assert tables(Diagnosis(effect))


@pytest.mark.parametrize("sites", [0, 9])
def test_figures(tmp_path, sites):
    history = [Diagnosis(report(1, 0.8, sites), step=step) for step in (0, 10)]
    history[-1] = Diagnosis(
        report(1, 0.8, sites), None, ((0.1, report(0.1, 0.1, 0)), (0.5, report(1, 0.6, 0))), step=20
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing glyphs, axes that do not fit
        warnings.filterwarnings("ignore", r"'\w+' (argument is )?deprecated")  # old matplotlib, new pyparsing
        paths = draw(history, tmp_path / "new")
    assert len(paths) == 6
    assert all(path.stat().st_size > 5000 for path in paths)


def test_figures_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"lightning-dropreg\[plot\]"):
        dr.DropoutDiagnostics(figures="figures")


def test_tables_figures_and_reading_after_training(tmp_path, capsys):
    train([diagnostics(verbose=True, figures=str(tmp_path))])
    out = capsys.readouterr().out
    assert all(word in out for word in ("Dropout at step 0", "Explicit effect", "Gradient noise", "Reading"))
    assert len(list(Path(tmp_path).iterdir())) == 8


@pytest.mark.parametrize(
    "options",
    [{"draws": 2}, {"every_n_epochs": 0}, {"steps": [-1]}, {"batch": "last"}, {"confidence": 1.0}, {"tolerance": 0}],
)
def test_arguments_out_of_range(options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        dr.DropoutDiagnostics(**options)


def test_manual_optimization_is_refused():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(UnsupportedModuleError, match="manually"):
        train([diagnostics()], make=Manual)


class MovingAverage(Classifier):
    """A teacher that the step itself moves; in the first step it stays where it is."""

    def __init__(self):
        super().__init__()
        self.teacher = torch.nn.Linear(4, 8).double().requires_grad_(False)
        self.teacher.load_state_dict(self.net[0].state_dict())

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight, 0.1)
        return super().training_step(batch, batch_idx) + F.mse_loss(self.net[0](batch[0]), self.teacher(batch[0]))

    def on_before_optimizer_step(self, optimizer):
        pass


def test_parameters_that_the_step_moves_are_no_longer_moved_unsaid():
    with pytest.raises(UnsupportedModuleError, match=r"changes parameters \(teacher.weight\)"):
        train([dr.DropoutDiagnostics(draws=4, steps=[2], verbose=False)], make=MovingAverage)
