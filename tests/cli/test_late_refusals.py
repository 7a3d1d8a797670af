"""Nothing that took time is thrown away: what cannot end well is refused before, what is finished is kept."""

import json
import sys

import pytest
import torch
from fits import Classifier, make_loader, make_trainer, train

import lightning_dropreg as dr
from lightning_dropreg.cli import main
from lightning_dropreg.errors import InvalidArgumentError, MissingDependencyError

MODEL = """
import lightning as L, torch, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
class Data(L.LightningDataModule):
    def make(self): return DataLoader(TensorDataset(torch.arange(32.).view(8, 4) % 5, torch.arange(8) % 3), 4)
    train_dataloader = val_dataloader = test_dataloader = make
class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))
    def training_step(self, b, i): return F.cross_entropy(self.net(b[0]), b[1])
    def validation_step(self, b, i): self.log("val_loss", F.cross_entropy(self.net(b[0]), b[1]))
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
"""
CONFIG = """
model: {class_path: late_model.Net}
data: {class_path: late_model.Data}
trainer: {max_epochs: 2, accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "late_model.py").write_text(MODEL)
    (tmp_path / "one.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("late_model", None)
    return tmp_path


def result(folder):
    return json.loads((folder / "out" / "one" / "seed-1" / "result.json").read_text())


def test_runs_of_other_options_are_kept_and_found_again(folder, capsys):
    compare = lambda *options: main(["compare", "one.yaml", "--out", "out", *options])
    assert compare() == 0
    first = result(folder)
    assert compare("--", "--trainer.max_epochs", "1") == 0
    assert "made with other options is kept" in capsys.readouterr().out
    assert result(folder) != first
    assert compare() == 0  # the first again: taken out, not trained anew
    assert "finished before" in capsys.readouterr().out
    assert result(folder) == first
    (folder / "one.yaml").write_text(CONFIG.replace("max_epochs: 2", "max_epochs: 3"))
    assert compare() == 0
    assert len(list((folder / "out" / "one").glob("*/result.json"))) == 3


@pytest.mark.parametrize("options", [["--figure"], []])
def test_compare_refuses_before_the_first_run(folder, monkeypatch, capsys, options):
    out = "out"
    if options:
        for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        (folder / "taken").write_text("")
        out = "taken"
    assert main(["compare", "one.yaml", "--out", out, *options]) != 0
    assert ("matplotlib" if options else "taken") in capsys.readouterr().err
    assert not list(folder.rglob("result.json"))


def test_figures_are_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    model = Classifier()
    make = lambda place: make_trainer([dr.DropoutDiagnostics(draws=4, figures=tmp_path / place, verbose=False)])
    with pytest.raises(InvalidArgumentError, match="figures"):
        make("taken").fit(model, make_loader())
    trainer = make("new")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        trainer.fit(model, make_loader())
    assert not model.gradients


def test_a_checkpoint_of_plain_dropout_goes_on_with_another_method_from_the_command_line(folder, capsys):
    fit = ["fit", "--config", "one.yaml", "--trainer.default_root_dir", "plain"]
    assert main(fit) == 0
    [path] = (folder / "plain").rglob("*.ckpt")
    on = ["--trainer.max_epochs=3", "--ckpt_path", str(path), "--trainer.callbacks+=lightning_dropreg.ExplicitPenalty",
          "--trainer.callbacks+=lightning_dropreg.ImplicitNoise"]  # fmt: skip
    capsys.readouterr()
    assert main([*fit, *on]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "--accept_checkpoint_settings=true" in said
    assert main([*fit, *on, "--accept_checkpoint_settings=true"]) == 0


def test_diagnostics_pass_over_a_later_batch_without_dropout():
    class Sometimes(Classifier):
        def training_step(self, batch, batch_idx):
            self.net[3].train(batch_idx != 2)
            return super().training_step(batch, batch_idx)

    diagnostics = dr.DropoutDiagnostics(
        draws=4, every_n_epochs=None, steps=[0, 2, 3], at_end=False, batch="current", verbose=False
    )
    with pytest.warns(UserWarning, match="step 2; not measured"):
        train([diagnostics], make=Sometimes)
    assert [diagnosis.step for diagnosis in diagnostics.history] == [0, 3]
    assert torch.isfinite(torch.tensor(diagnostics.history[1].effect.truth().value))
