"""``dropreg compare``: tables, figures, and runs that fail or are interrupted."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from commands import BRIEF, CONFIGS, printed_json

from lightning_dropreg.cli import main
from lightning_dropreg.cli.comparison import Comparison, Run
from lightning_dropreg.cli.summary import FitResult

pytestmark = pytest.mark.usefixtures("elsewhere")


def compare(*options, to_every_run=()):
    files = [str(CONFIGS / f"quickstart{suffix}.yaml") for suffix in ("_dropout", "_none")]
    return main(["compare", *files, *options, "--", *BRIEF, "--trainer.enable_progress_bar=false", *to_every_run])


def test_compare_makes_tables_and_a_figure(capsys):
    tested = ["--test_after_fit=true"]
    assert compare("--seeds", "1", "2", "--out=out", "--figure", to_every_run=tested) == 0
    table = capsys.readouterr().out.rpartition("Comparison")[2]
    assert "ratio" in table
    assert "1.00" in table
    assert "±" in table
    rows = Path("out/table.md").read_text().splitlines()
    assert len(rows) == 4
    with Path("out/table.csv").open() as file:
        reference, none = csv.DictReader(file)
    with Path("out/runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 4
    best = [
        [float(run["best"]) for run in runs if run["configuration"] == row["configuration"]]
        for row in (reference, none)
    ]
    sd = math.sqrt((statistics.variance(best[0]) + statistics.variance(best[1])) / 2)
    expected = (statistics.mean(best[1]) - statistics.mean(best[0])) / sd
    assert float(none["difference_in_sd"]) == pytest.approx(expected, rel=0.01)
    assert not reference["difference_in_sd"]
    assert all(run["epochs"] == "1" and float(run["ms_per_step"]) > 0 for run in runs)  # of the fit, not of the test
    tests = [float(run["test_ppl"]) for run in runs[1::2]]
    assert float(none["test_ppl"]) == pytest.approx(statistics.mean(tests))
    assert len(Path("out/history.csv").read_text().splitlines()) == 5
    assert Path("out/curves.png").stat().st_size > 10_000
    assert Path("out/curves.svg").is_file()
    made_with = json.loads(Path("out/machine.json").read_text())
    assert "--seeds 1 2 --out=out" in made_with["command"]
    first, second = made_with["configurations"].values()
    assert {"cpu", "cores", "torch", "lightning", "parameters"} <= first["machine"].keys()
    assert first["config"]["model"]["init_args"]["hidden_dim"] == 12
    assert second["config"]["model"]["init_args"]["drop_prob"] == 0


def test_compare_keeps_finished_runs(capsys):
    assert compare("--json") == 0
    first = printed_json(capsys)["runs"]
    assert compare("--json") == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 2
    assert json.loads(out[out.index("{") :])["runs"] == first
    assert compare("--json", to_every_run=["--model.num_layers=1"]) == 0
    assert "finished before" not in capsys.readouterr().out  # another configuration


def test_compare_survives_a_run_that_fails(monkeypatch, capsys):
    from lightning_dropreg.paper.models import LSTMLanguageModel

    def broken(self, *args):
        raise ZeroDivisionError("in the user's step")

    assert compare("--out=first") == 0
    with monkeypatch.context() as patch:
        patch.setattr(LSTMLanguageModel, "training_step", broken)
        assert compare("--out=second") == 1
        assert "every run failed" in capsys.readouterr().err
        Path("first").rename("third")
        assert compare("--out=third", "--seeds", "1", "2") == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 2
    assert "failed: quickstart_none, seed 2: ZeroDivisionError" in out


def test_compare_goes_on_where_it_was_killed(monkeypatch, capsys):
    from lightning_dropreg.paper.models import LSTMLanguageModel

    two_epochs = ["--trainer.max_epochs=2"]
    assert compare("--out=whole", "--json", to_every_run=two_epochs) == 0
    whole = printed_json(capsys)["runs"]
    start = LSTMLanguageModel.on_train_epoch_start

    def killed(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(LSTMLanguageModel, "on_train_epoch_start", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            compare("--out=killed", to_every_run=two_epochs)
    capsys.readouterr()
    assert compare("--out=killed", "--json", to_every_run=two_epochs) == 0
    out = capsys.readouterr().out
    assert out.count("going on") == 1
    resumed = json.loads(out[out.index("{") :])["runs"]
    for a, b in zip(whole, resumed, strict=True):
        assert a["result"]["best"] == b["result"]["best"]
        assert [h[:2] for h in a["result"]["history"]] == [h[:2] for h in b["result"]["history"]]
        assert a["result"]["steps"] == b["result"]["steps"]


def test_comparison_of_known_histories():
    def run(config, seed, *history):
        best = min(value for _, value, _ in history)
        return Run(config, seed, FitResult("val_ppl", best, 1, len(history), 1, history[-1][2], history=list(history)))

    slow = [(1, 9.0, 1.0), (2, 5.0, 2.0), (3, 6.0, 3.0)]
    fast = [(1, 5.0, 1.5), (2, 4.0, 3.0), (3, 3.0, 4.5)]
    runs = [run("slow", 1, *slow), run("fast", 1, *fast), run("slow", 2, *slow), run("fast", 2, (1, 7.0, 1.5))]
    comparison = Comparison(runs, ["slow", "fast"])
    assert [comparison.time_to_reference(r) for r in runs] == [1.0, 0.75, 1.0, float("inf")]
    assert [comparison.at_equal_time(r) for r in runs] == [5.0, 4.0, 5.0, 7.0]
    assert comparison.rows()[2][-2] == "0.75 (never: 1 of 2)"
