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
    table = capsys.readouterr().out.rpartition("Results: mean ± standard deviation over seeds")[2]
    assert "Minus quickstart_dropout, seed by seed: mean ± standard error over n seeds" in table
    assert "±" in table
    assert Path("out/table.md").read_text().count("| quickstart_none |") == 3
    with Path("out/table.csv").open() as file:
        reference, none = csv.DictReader(file)
    with Path("out/runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 4
    by_name = lambda key, name: [float(run[key]) for run in runs if run["configuration"] == f"quickstart_{name}"]
    for key, column in (("best", "val_ppl"), ("test_ppl", "test_ppl")):
        pairs = [b - a for a, b in zip(by_name(key, "dropout"), by_name(key, "none"), strict=True)]
        assert float(none[f"{column}_difference"]) == pytest.approx(statistics.mean(pairs), rel=1e-3)
        assert float(none[f"{column}_difference_se"]) == pytest.approx(statistics.stdev(pairs) / math.sqrt(2), rel=1e-3)
    assert (reference["val_ppl_difference"], none["pairs"]) == ("", "2")
    assert all(run["epochs"] == "1" and float(run["ms_per_step"]) > 0 for run in runs)  # of the fit, not of the test
    tests = [float(run["test_ppl"]) for run in runs[1::2]]
    assert float(none["test_ppl"]) == pytest.approx(statistics.mean(tests), rel=1e-5)
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


def test_names_and_titles_stay_in_one_piece(capsys, monkeypatch):
    monkeypatch.setattr("lightning_dropreg.cli.compare.get_console", lambda: Console(width=80))
    short, long = "algorithm_2_economical", "algorithm_2_economical_on_a_quarter_of_the_rows"
    tests = {"test_accuracy_at_the_end": 0.5, "test_perplexity": 40.0}
    histories = [FitResult("val_ppl", 40.0, 1, 1, 1, 9.0, test=tests, history=[(1, 40.0 + n, 9.0)]) for n in range(6)]
    names = ["d", short, long]
    runs = [Run(config, seed, histories[3 * seed - 3 + n]) for n, config in enumerate(names) for seed in (1, 2)]
    _print(comparison := Comparison(runs, names))
    out = capsys.readouterr().out
    assert out.count(f" {short} ") == out.count(" d ") == out.count(" C ")
    assert out.count(f"C: {long}") == 1
    assert max(map(len, out.splitlines())) <= 80
    words = {word for column in comparison.columns() for word in column.title.split()}
    assert words <= set(out.split())


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
    cells = {column.title: column.texts() for column in comparison.columns()}
    assert cells["best val_ppl"] == ["5 ± 0", "5.0 ± 2.8"]
    assert cells["val_ppl"] == ["–", "+0.0 ± 2.0"]  # of -2 and +2, the error of their mean
    assert cells["seeds never there"] == ["0", "1"]
    assert cells["n"] == ["–", "2"]
    single = Comparison([run("slow", 1, *slow), run("late", 1, (1, 9.0, 9.0))], ["slow", "late"])
    cells = {column.title: column.texts() for column in single.columns()}
    assert not [cell for column in cells.values() for cell in column if "nan" in cell or "±" in cell or not cell]
    assert cells["val_ppl"] == ["–", "+4"]
    assert cells["to reference's best"] == ["1", "–"]


def test_differences_are_those_of_the_seeds_that_both_have():
    tests = lambda value: {"test_loss": value}
    runs = [Run("a", seed, FitResult("val_loss", 1.0 + seed, 1, 1, 1, 1.0, test=tests(2.0))) for seed in (1, 2, 3)]
    runs += [Run("b", seed, FitResult("val_loss", 0.9 + seed, 1, 1, 1, 1.0, test=tests(1.5))) for seed in (2, 3, 9)]
    comparison = Comparison(runs, ["a", "b"])
    cells = {column.title: column.texts()[1] for column in comparison.columns() if column.table == 1}
    assert cells == {"n": "2", "val_loss": "-0.1 ± 0", "test_loss": "-0.5 ± 0"}


def test_the_tables_hold_what_is_in_the_folder(capsys):
    """Fewer configurations the next time take nothing out; a run of other options does not come in."""
    rows = lambda: {row.split(",")[0] for row in Path("out/table.csv").read_text().splitlines()[1:]}
    assert compare("--out=out", "--figure") == 0
    figure = Path("out/curves.svg").read_text()
    one = ["compare", str(CONFIGS / "quickstart_none.yaml"), "--out=out"]
    brief = [*BRIEF, "--trainer.enable_progress_bar=false"]
    assert main([*one, "--", *brief]) == 0
    assert rows() == {"quickstart_dropout", "quickstart_none"}
    redrawn = Path("out/curves.svg").read_text()
    assert redrawn != figure  # in the order of now
    assert redrawn.count("quickstart_dropout") == figure.count("quickstart_dropout") > 0
    capsys.readouterr()
    assert main([*one, "--", *brief, "--model.num_layers=1"]) == 0
    assert rows() == {"quickstart_none"}
    assert "not in the tables" in " ".join(capsys.readouterr().out.split())
    assert "quickstart_dropout" not in Path("out/curves.svg").read_text()
    assert main([*one, "--baseline", "nothing"]) == 1
    assert "there is only quickstart_none, quickstart_dropout" in capsys.readouterr().err
    assert main([*one, "--baseline", "quickstart_dropout", "--", *brief]) == 0
    assert "Minus quickstart_dropout" in capsys.readouterr().out
