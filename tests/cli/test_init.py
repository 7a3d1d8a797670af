"""``dropreg init``: what it writes runs, the quickstart's and that for a model of one's own."""

from pathlib import Path

import pytest
import yaml
from commands import CONFIGS, OWN_MODEL
from rich.console import Console

from lightning_dropreg.cli import main

pytestmark = pytest.mark.usefixtures("elsewhere")
NEEDY = """
class Needy(Net):
    def __init__(self, classes: int, **kwargs):
        super().__init__(**kwargs)
class Alone(Net):
    def train_dataloader(self): return Data().make()
"""


@pytest.fixture
def own(elsewhere, monkeypatch):
    Path("own_to_init.py").write_text(OWN_MODEL + NEEDY)
    monkeypatch.syspath_prepend(Path.cwd())


def test_init_writes_what_runs(capsys):
    assert main(["init", "folder/first.yaml"]) == 0
    assert "dropreg fit --config folder/first.yaml" in capsys.readouterr().out
    assert (
        Path("folder/first.yaml").read_bytes()
        == (CONFIGS.parent / "lightning_dropreg/cli/quickstart.yaml").read_bytes()
    )
    assert main(["inspect", "--config", "folder/first.yaml", "--json"]) == 0


def test_what_it_writes_for_ones_own_model_runs(own, capsys):
    assert main(["init", "--model", "own_to_init.Net", "--data", "own_to_init.Data"]) == 0
    assert "dropreg compare mine.yaml --vary strength=" in capsys.readouterr().out
    config = yaml.safe_load(Path("mine.yaml").read_text())
    assert config["model"] == {"class_path": "own_to_init.Net", "init_args": {"drop_prob": 0.3}}
    assert config["trainer"]["callbacks"][0]["class_path"] == "lightning_dropreg.ExplicitPenalty"
    assert main(["inspect", "--config", "mine.yaml"]) == 0
    assert main(["fit", "--config", "mine.yaml", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]) == 0
    assert "penalty R" in capsys.readouterr().out


def test_a_model_with_loaders_of_its_own_needs_no_data(own, capsys):
    assert main(["init", "alone.yaml", "--model=own_to_init.Alone"]) == 0
    assert "data" not in yaml.safe_load(Path("alone.yaml").read_text())
    assert main(["inspect", "--config", "alone.yaml", "--json"]) == 0


def test_what_a_model_needs_is_asked_for(own, capsys):
    with pytest.raises(SystemExit):
        main(["init", "needy.yaml", "--model", "own_to_init.Needy"])
    assert "model: own_to_init.Needy needs classes: --model.classes VALUE." in capsys.readouterr().err
    assert not Path("needy.yaml").exists()
    assert main(["init", "needy.yaml", "--model", "own_to_init.Needy", "--model.classes", "3"]) == 0
    assert yaml.safe_load(Path("needy.yaml").read_text())["model"]["init_args"]["classes"] == 3
    assert main(["init", "other.yaml", "--drop_prob", "0.3"]) == 1
    assert "--drop_prob is unknown without --model" in capsys.readouterr().err


def test_inspect_shows_what_was_measured_in_80_columns(monkeypatch, capsys):
    """Names stay whole, and the comparison that chose forward mode is told."""
    Path("kinked_model.py").write_text(
        OWN_MODEL + "class Kinked(Net):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net.insert(2, torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()))\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setattr("lightning_dropreg.cli.inspect.get_console", lambda: Console(width=80))
    assert main(["init", "--model=kinked_model.Kinked", "--data=kinked_model.Data"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert max(map(len, Path("mine.yaml").read_text().splitlines())) <= 80
    assert main(["inspect", "--config=mine.yaml"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "│ derivative_is_of_the_function │ holds   │" in out
    assert "forward" in out.partition("derivative_is_of_the_function │")[2].partition("fixed_target")[0]
    assert "estimator forward" in out.lower()
