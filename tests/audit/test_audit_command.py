"""``dropreg audit``, and masks compared over ranks."""

import json
import logging
import os
from pathlib import Path

import lightning as L
import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from ranks import run_on_two_ranks
from torch import nn
from zoo import Body

import lightning_dropreg as dr
from lightning_dropreg.cli import main
from lightning_dropreg.cli.audit import show_findings

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
SMALL = ["--model.embedding_dim=12", "--model.hidden_dim=12"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = torch.get_num_threads(), [logger.level for logger in loggers]
    yield
    torch.set_num_threads(before[0])
    for logger, level in zip(loggers, before[1], strict=True):
        logger.setLevel(level)


def test_shipped_configuration_is_clean(capsys):
    assert main(["audit", "--config", QUICKSTART, *SMALL, "--json"]) == 0
    assert [one for one in json.loads(capsys.readouterr().out) if one["severity"] != "note"] == []


def test_an_error_is_an_exit_status(monkeypatch, capsys):
    found = [dr.auditing.Finding("frozen-mask", "error", "net.3 (model.py:7)", "8 of 8 draws.", "Draw.")]
    monkeypatch.setattr("lightning_dropreg.cli.audit.audit", lambda *args, **kwargs: found)
    assert main(["audit", "--config", QUICKSTART, *SMALL, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {
            "id": "frozen-mask",
            "severity": "error",
            "where": "net.3 (model.py:7)",
            "evidence": "8 of 8 draws.",
            "repair": "Draw.",
        }
    ]
    assert main(["audit", "--config", QUICKSTART, *SMALL]) == 1
    out = capsys.readouterr().out
    assert "net.3 (model.py:7)" in out
    assert "1 error, 0 warnings, 0 notes" in out
    assert max(map(len, out.splitlines())) <= 80


def test_no_finding(capsys):
    show_findings([], "Net")
    assert capsys.readouterr().out == "Net: 0 errors, 0 warnings, 0 notes.\n"


def test_a_clean_audit_says_what_it_covered(capsys):
    """How much, what it had no occasion for, and that there is nothing if every p is 0."""
    for p in (0.4, 0.0):
        assert main(["audit", "--config", QUICKSTART, *SMALL, f"--model.drop_prob={p}"]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "variance-shift (no batch norm)" in told
        assert ("Every p is 0" in told) == (p == 0)
        assert ("12 checks over 5 dropouts in 8 draws" in told) == (p > 0)
        assert ("nothing is dropped in a training step" in told) == (p == 0)


def test_what_was_looked_at_is_every_kind_of_finding():
    found = dr.audit(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), torch.randn(48, 16))
    ids = {*found.coverage.checks, *found.coverage.left_out}
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    assert ids == {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert "variance-shift" in found.coverage.checks
    assert found.coverage.left_out["ranks-share-masks"] == "one process"


def masks(offset, kind):
    def check():
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
        torch.manual_seed(offset * torch.distributed.get_rank())
        return [(one.id, one.where) for one in dr.audit(Body(kind()), torch.randn(48, 16))]

    return check


class Ranks(Classifier):
    """Keeps on disk what the audit finds on each rank."""

    def __init__(self, folder, own):
        super().__init__(p=0.5)
        self.folder, self.own = folder, own
        self.net.insert(4, nn.Dropout(0.3))

    def on_fit_start(self):
        if self.own:  # seed_everything gives all ranks one seed
            torch.manual_seed(self.global_rank)

    def on_fit_end(self):
        found = [(one.id, one.where) for one in self.trainer.callbacks[0].findings]
        torch.save((found, self.net.state_dict()), f"{self.folder}/rank{self.global_rank}.pt")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.filterwarnings("ignore:DropoutAudit")
def test_ranks_of_a_trainer(tmp_path, own):
    """The masks of two processes under DDP are compared before the first step, and the replicas stay equal."""
    L.seed_everything(3, verbose=False)
    options = dict(devices=2, strategy="ddp_fork", max_steps=2)
    make_trainer([dr.DropoutAudit()], **options).fit(Ranks(str(tmp_path), own), make_loader(96, 24))
    (found, weights), (other, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert [name for name, _ in found] == [name for name, _ in other] == ["ranks-share-masks"] * (not own)
    assert all(where.startswith("net.3 (") for _, where in found)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_ranks(tmp_path):
    drop = lambda: nn.Dropout(0.4)
    deep = lambda: nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.2))
    checks = {"same": masks(0, drop), "deeper": masks(0, deep), "own": masks(1, drop)}
    for found in run_on_two_ranks(checks, str(tmp_path)):
        assert [name for name, _ in found["same"]] == ["ranks-share-masks"]
        assert found["same"][0][1].startswith("inner (")
        assert [where[:7] for _, where in found["deeper"]] == ["inner.1"]
        assert found["own"] == []
