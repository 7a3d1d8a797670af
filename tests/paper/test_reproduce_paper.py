"""examples/reproduce_paper.py: figures, table and verdicts, from runs of its own and from those of a comparison."""

import math
import runpy
from pathlib import Path

import pytest
from commands import BRIEF, OPTIONS
from texts import write_text

from lightning_dropreg.cli.comparison import Comparison, Run
from lightning_dropreg.cli.summary import FitResult

pytestmark = pytest.mark.usefixtures("elsewhere")

pytest.importorskip("matplotlib")
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "reproduce_paper.py"))
CLAIM, ORDERINGS = SCRIPT["Claim"], SCRIPT["orderings"]


def run(config, seed, best):
    history = [(1, 2 * best, 4.0), (2, best, 8.0)]
    return Run(config, seed, FitResult("val_ppl", best, 2, 2, 0, 8.0, 5.0, history=history))


def comparison(**bests):
    runs = [run(f"ptb_{row}", seed, best) for row, values in bests.items() for seed, best in enumerate(values)]
    return Comparison(runs, [f"ptb_{row}" for row in bests])


def test_figures_and_tables_from_runs_of_its_own():
    write_text("text")
    small = [*BRIEF, *(option for option in OPTIONS if "root" not in option), "--test_after_fit=false"]
    SCRIPT["main"](["--root=text", "--figures", "3", "5", "--seeds", "1", "--out=out", "--", *small])
    made = Comparison.read(Path("out"))
    assert made.configs == ["ptb_dropout_1", "ptb_dropout_8", "ptb_r_approx", "ptb_r_approx_xi", "ptb_none"]
    assert len(made.runs) == 5  # dropout_1, which both figures show, ran once
    for number in (3, 5):
        assert Path(f"out/figure_{number}.png").stat().st_size > 10_000
        assert Path(f"out/figure_{number}.svg").is_file()
    assert not Path("out/figure_1.png").exists()
    table = Path("out/table_1.md").read_text()
    assert "| r_approx_xi | 72.99 | " in table
    assert "| l2 | 112.04 |  |  |" in table
    verdicts = Path("out/orderings.md").read_text()
    assert "(d) R_approx beats DROPOUT_8" in verdicts
    assert "(a)" not in verdicts


def test_the_other_corpus_has_the_rows_that_the_paper_has_of_it():
    write_text("text")
    small = [*BRIEF, *(option for option in OPTIONS if "root" not in option), "--test_after_fit=false"]
    options = ["--corpus=wt2", "--root=text", "--figures", "5", "--seeds", "1", "--out=out"]
    SCRIPT["main"]([*options, "--", *small])
    assert Comparison.read(Path("out")).configs == ["wt2_dropout_1", "wt2_r_approx_xi"]
    assert Path("out/figure_5.png").is_file()
    assert "(e) Algorithm 2 is at least as good as DROPOUT_1" in Path("out/orderings.md").read_text()
    assert not Path("out/table_1.md").exists()


def test_what_is_written_is_read_again(tmp_path):
    before = comparison(dropout_1=[10.0, 11.0], none=[12.5, 13.0])
    before.runs[0].result.test = {"test_ppl": 9.5}
    before.write(tmp_path)
    assert Comparison.read(tmp_path).runs == before.runs


def test_figures_from_an_earlier_comparison(tmp_path, capsys):
    comparison(dropout_1=[10.0, 11.0], dropout_2=[14.0, 15.0], dropout_8=[21.0, 20.0]).write(tmp_path)
    SCRIPT["main"](["--from", str(tmp_path), "--out", "drawn"])
    assert {path.stem for path in Path("drawn").glob("figure_*")} == {f"figure_{n}" for n in (1, 2, 3, 4)}
    assert "| (a) perplexity worsens with k | | | | **holds** |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("noise", "verdict"),
    [([10.2, 10.9], "holds"), ([16.0, 15.5], "does not hold"), ([20.9, 21.0], "does not hold"), ([20.0, 20.4], None)],
)
def test_verdict_on_noise_that_brings_perplexity_back(noise, verdict):
    """Margins: -4.9 and less where perplexity is brought half the way, or not at all; None: not all rows are there."""
    rows = {"dropout_1": [10.0, 11.0], "dropout_8": [20.0, 21.0], "dropout_8_noise": noise}
    if verdict is None:
        del rows["dropout_1"]
    lines = [line for line in ORDERINGS(comparison(**rows)) if line.startswith("| (b)")]
    assert [line.rpartition("**")[0].rpartition("**")[2] for line in lines] == [verdict] * (verdict is not None)


def test_curves_are_compared_after_the_last_epoch_of_each_seed():
    """Seed 0 after epoch 3: 12 against 30; seed 1 after epoch 3: 12 against 13."""
    runs = comparison(dropout_1=[10.0, 11.0], r_approx_xi=[8.0, 9.0]).runs
    runs[0].result.history += [(3, 30.0, 12.0), (4, 1.0, 16.0)]
    runs[1].result.history += [(3, 13.0, 12.0)]
    for run in runs[2:]:
        run.result.history += [(3, 12.0, 12.0)]
    shown = ORDERINGS(Comparison(runs, ["ptb_dropout_1", "ptb_r_approx_xi"]))
    assert next(line for line in shown if "| | r_approx_xi at" in line) == (
        "| | r_approx_xi at least as good as dropout_1 | -2.00 | 2.8 | holds | -9.50 | 0.8 | 3 |"
    )


def test_verdicts_by_margin():
    decided = {
        relation: [CLAIM("a", relation, "b").verdict(margin) for margin in (2.1, 1.0, -1.0, -2.0, math.nan)]
        for relation in ("better than", "at least as good as", "back at")
    }
    yes, no, open_ = "holds", "does not hold", "undecided"
    assert decided == {
        "better than": [yes, open_, open_, no, open_],
        "at least as good as": [yes, yes, open_, no, open_],
        "back at": [yes, yes, yes, no, open_],
    }
