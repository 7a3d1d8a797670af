"""What a step costs: SAM among the package's methods, the processor's clock, and the table."""

import json
import time

import pytest
import torch
from fits import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.baselines.sam import SAM
from examples.benchmarks import step_costs
from examples.benchmarks.records import Records
from lightning_dropreg.cli.measure import Stopwatch
from lightning_dropreg.cli.methods import KEYS, METHODS

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()


class Cubic(step_costs.L.LightningModule):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(2)
        self.net, self.make = nn.Linear(3, 2).double(), make

    def training_step(self, batch, _):
        return self.net(batch[0]).pow(3).mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def trained(callbacks, make):
    module = Cubic(make)
    make_trainer(callbacks, max_steps=3).fit(module, DataLoader(TensorDataset(X.repeat(3, 1)), 6))
    return list(module.parameters())


def test_sam_as_a_callback_is_the_baseline():
    plain = trained([], lambda p: torch.optim.SGD(p, lr=0.1))
    ours = trained([step_costs.SAMSteps(0.4)], lambda p: torch.optim.SGD(p, lr=0.1))
    theirs = trained([], lambda p: SAM(p, rho=0.4, lr=0.1))
    assert not torch.allclose(plain[0], theirs[0])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fails", [False, True])
def test_sam_and_the_processors_clock_are_there_while_measuring_and_then_gone(tmp_path, monkeypatch, fails):
    seen, before = [], (dict(METHODS), dict(KEYS), Stopwatch._now)

    def measured(model):
        lost = abs(Stopwatch._now(None) - time.process_time())
        seen.append((model, "SAM" in METHODS, KEYS["SAM"], lost < 1))
        if fails:
            raise ValueError("stopped")
        return []

    monkeypatch.setattr(step_costs, "_bench", measured)
    made = Records(tmp_path / "runs.jsonl")
    if fails:
        with pytest.raises(ValueError, match="stopped"):
            step_costs.measure(made)
    else:
        step_costs.measure(made)
        step_costs.measure(made)  # what is there is kept
    assert seen == [(model, True, "sam", True) for model in step_costs.MODELS[: 1 if fails else 2]]
    assert (METHODS, KEYS, Stopwatch._now) == before


def test_the_table_has_the_median_of_the_rounds(tmp_path):
    rounds = {"dropout": [[1.0, 1.0], [2.0, 2.0], [1.0, 3.0]], "SAM": [[2.0, 2.0], [6.0, 6.0], [2.0, 2.0]]}
    costs = [{"method": method, "rounds": each, "problem": None} for method, each in rounds.items()]
    where = {
        "commit": "c",
        "date": "d",
        "cpu": "p",
        "torch": "t",
        "lightning": "l",
        "python": "3",
        "cores": 2,
        "load": 1,
    }
    line = {"model": "lstm", "costs": costs, "provenance": where}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    step_costs.report(Records(tmp_path / "runs.jsonl"))
    table = (tmp_path / "step_costs.md").read_text()
    assert "| method | lstm |" in table
    assert "| dropout | 1.00 (1.00 to 1.00) |" in table
    assert "| SAM | 2.00 (1.00 to 3.00) |" in table
