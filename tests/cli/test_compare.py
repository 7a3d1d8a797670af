"""``dropreg compare``: tables, figures, and runs that fail or are interrupted."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from commands import BRIEF, CONFIGS, printed_json
from rich.console import Console

from lightning_dropreg.cli import main
from lightning_dropreg.cli.compare import _print
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


def test_compare_asks_once_for_a_corpus_that_is_not_there(capsys):
    """And not once for each configuration and seed."""
    configs = [str(CONFIGS / "small" / f"ptb_{name}.yaml") for name in ("none", "dropout_1", "r_approx")]
    assert main(["compare", *configs, "--seeds", "1", "2"]) == 1
    printed = "".join(capsys.readouterr())
    assert printed.count("dropreg compare: ") == 1
    assert printed.count("ptb_") == 1  # the rule above the first run


def test_names_stay_in_one_piece(capsys, monkeypatch):
    monkeypatch.setattr("lightning_dropreg.cli.compare.get_console", lambda: Console(width=80))
    name = "algorithm_2_economical_of_rows"
    histories = [FitResult("val_ppl", 40.0, 1, 1, 1, 9.0, history=[(1, 40.0 + n, 9.0)]) for n in range(4)]
    runs = [Run(config, seed, histories[2 * seed - 2 + n]) for n, config in enumerate(("d", name)) for seed in (1, 2)]
    _print(Comparison(runs, ["d", name]), {})
    out = capsys.readouterr().out
    assert out.count(f" {name} ") == 2
    assert max(map(len, out.splitlines())) <= 80


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
    single = Comparison([run("slow", 1, *slow), run("late", 1, (1, 9.0, 9.0))], ["slow", "late"]).rows()
    cells = [cell for row in single for cell in row]
    assert not [cell for cell in cells if "nan" in cell or not cell]
    assert single[1][3] == "–"  # the reference has no difference to itself
    assert single[2][-2] == "(never: 1 of 1)"
