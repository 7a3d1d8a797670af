"""Compiled parts in what a fit may be set to: schedules, precision, accumulation, sizes, manual steps, many blocks."""

import pytest
import torch
from compiled_models import OLD, Model, assert_same, fit
from fits import make_loader, make_trainer
from lightning import seed_everything
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg import errors

ANTITHETIC = {"estimator": "antithetic"}
KINDS = "layers+attention"


def algorithm_2():
    return [dr.ExplicitPenalty(**ANTITHETIC), dr.ImplicitNoise(**ANTITHETIC)]


def both(callbacks=algorithm_2, kinds=KINDS, how="parts in place", near=1e-10, **options):
    """Fit the model without compiling and compiled, and compare."""
    plain = fit(callbacks(), kinds, **options)
    compiled = fit(callbacks(), kinds, how, **options)
    assert_same(plain, compiled, near)
    if OLD:
        pytest.skip(f"the values agree; torch {torch.__version__} may run the parts uncompiled")
    assert compiled[0].graphs[-1] > 0
    return compiled[0]


@pytest.fixture(autouse=True)
def _nothing_runs_uncompiled(recwarn):
    yield
    warned = [str(w.message) for w in recwarn if w.category is errors.CompiledPartWarning]
    assert not warned or OLD, warned


@pytest.mark.parametrize("start", [0.0, 0.1])
@pytest.mark.parametrize("method", [algorithm_2, lambda: [dr.MiniBatchDropout(2)]], ids=["algorithm 2", "k draws"])
def test_a_schedule_costs_one_graph_more(method, start):
    """The second value of a probability makes it an input of the graph, for torch looks at numbers so."""
    steps = {"length": 20, "interval": "step", "start": start}
    loader = make_loader(60, 6)
    callbacks = lambda: [*method(), dr.DropProbSchedule("linear", **steps)]
    compiled = both(callbacks, "layers", loader=loader)
    assert compiled.graphs[1:] == [2] * 9


def test_accumulation():
    both(accumulate_grad_batches=2)


def test_bf16_autocast():
    """Equal to rounding: 2^-8 in what is bfloat16, divided by the step of the pairs."""
    both(precision="bf16-mixed", dtype=torch.float32, near=0.05)


def test_sizes_that_change():
    """One graph for the first size, one for all others."""
    x, y = make_loader(28).dataset.tensors
    loader = DataLoader([(x[a:b], y[a:b]) for a, b in ((0, 6), (6, 11), (11, 20), (20, 24), (24, 28))], batch_size=None)
    compiled = both(kinds="layers", loader=loader)
    assert compiled.graphs[-1] == compiled.graphs[1] <= 2


class Manual(Model):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.gradients = [*self.gradients, torch.cat([p.grad.reshape(-1) for p in self.parameters()])]
        optimizer.step()
        return {"loss": loss.detach()}

    def on_before_optimizer_step(self, optimizer):
        pass


def test_manual_optimization():
    both(make=Manual)


def test_twelve_blocks_have_the_graphs_of_one():
    compiled = both(kinds="+".join(["layers"] * 12))
    assert compiled.graphs[-1] <= 2


class Predicts(Model):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def test_monte_carlo_dropout():
    found = []
    for how in (None, "parts in place"):
        seed_everything(0, verbose=False)
        trainer = make_trainer([dr.MonteCarloDropout(passes=4)])
        found.append(trainer.predict(Predicts(KINDS, how, "aot_eager", torch.float64), make_loader()))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain.to_dict(), compiled.to_dict(), rtol=1e-10, atol=1e-12)


def test_diagnostics():
    def callbacks():
        return [*algorithm_2(), dr.DropoutDiagnostics(draws=4, verbose=False)]

    both(callbacks)
    assert counters["stats"]["unique_graphs"] <= 4  # none for the measurements
