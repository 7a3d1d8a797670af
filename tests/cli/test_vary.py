"""``dropreg compare --vary``: the strength is found, chosen by validation and judged by the test."""

import json
from pathlib import Path

import pytest
import yaml
from commands import OWN_MODEL

from lightning_dropreg.cli import main
from lightning_dropreg.cli.comparison import Comparison, Run
from lightning_dropreg.cli.summary import FitResult
from lightning_dropreg.cli.vary import choice, varied
from lightning_dropreg.errors import InvalidArgumentError

PENALTY = {"class_path": "lightning_dropreg.ExplicitPenalty", "init_args": {"curvature": "identity"}}
NOISE = "lightning_dropreg.ImplicitNoise"
QUIET = {
    "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
    "enable_checkpointing": False, "enable_model_summary": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "varied_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(name, *callbacks, model="Net", **more):
    config = {"model": {"class_path": f"varied_model.{model}"}, "data": {"class_path": "varied_model.Data"}}
    Path(name).write_text(yaml.safe_dump({**config, "trainer": {**QUIET, "callbacks": [*callbacks]}, **more}))
    return name


def callbacks_of(setting):
    [option] = setting.options
    return json.loads(option.removeprefix("--trainer.callbacks="))


def test_the_one_callback_with_the_option_is_found(folder):
    plain, half, one = varied(write("one.yaml", "lightning.pytorch.callbacks.Timer", PENALTY), "strength=0.5,1")
    assert (plain.plain, half.plain, half.name, one.name) == (True, False, "strength=0.5", "strength=1")
    timer, penalty = callbacks_of(half)
    assert penalty["init_args"] == {"curvature": "identity", "strength": 0.5}
    assert "Timer" in timer["class_path"]
    write("two.yaml", PENALTY, NOISE)
    with pytest.raises(InvalidArgumentError, match=r"name one: ExplicitPenalty\.strength or ImplicitNoise\.strength"):
        varied("two.yaml", "strength=0.5,1")
    for key in ("ImplicitNoise.strength", "trainer.callbacks.1.init_args.strength", "source"):
        penalty, noise = callbacks_of(varied("two.yaml", f"{key}=a,b")[1])
        assert penalty == PENALTY
        assert noise["init_args"] == {key.rpartition(".")[2]: "a"}
    Path("above.yaml").write_text(yaml.safe_dump({"base": "one.yaml", "trainer": {"callbacks+": [NOISE]}}))
    assert [c["class_path"] for c in callbacks_of(varied("above.yaml", "source=a,b")[1])][1:] == [
        PENALTY["class_path"], NOISE,
    ]  # fmt: skip
    assert varied("one.yaml", "model.init_args.drop_prob=0.1,0.2")[2].options == ("--model.init_args.drop_prob=0.2",)
    with pytest.raises(InvalidArgumentError, match=r"There is: .*ExplicitPenalty\.strength"):
        varied("one.yaml", "strenght=1,2")
    with pytest.raises(InvalidArgumentError, match="two values"):
        varied("one.yaml", "strength=1")


@pytest.mark.parametrize("model", ["Net", "Own"])
def test_plain_dropout_is_without_any_regularizer(folder, capsys, model):
    """A mixin's neither: its run is that of the model that has none."""
    file = write("net.yaml", PENALTY, model=model) if model == "Net" else write("net.yaml", model=model)
    vary = "ExplicitPenalty.strength=0,9" if model == "Net" else "model.init_args.drop_prob=0.3,0"
    assert main(["compare", file, "--vary", vary, "--out=out", "--seeds", "1"]) == 0
    best = {p.parent.parent.name: json.loads(p.read_text())["result"] for p in Path("out").rglob("result.json")}
    write("bare.yaml")
    assert main(["compare", "bare.yaml", "--out=bare"]) == 0
    bare = json.loads(Path("bare/bare/seed-1/result.json").read_text())["result"]
    assert best["dropout"]["best"] == bare["best"]
    assert best["dropout"]["test"] == bare["test"]
    others = [result["best"] for name, result in best.items() if name != "dropout"]
    assert len({best["dropout"]["best"], *others}) == 3
    assert (Path("out") / "dropout" / "seed-1" / "best.ckpt").is_file()
    told = " ".join(capsys.readouterr().out.split())
    assert "Chosen by val_loss: " in told
    assert "minus dropout, 1 seed in pairs: test_loss" in told
    assert Path("out/table.md").read_text().count("Chosen by val_loss") == 1


def test_the_rate_is_tuned_with_plain_dropout(folder, capsys):
    file = write("net.yaml", PENALTY)
    assert main(["compare", file, "--plain", "--vary", "model.init_args.drop_prob=0.3,0", "--seeds", "1"]) == 0
    best = lambda name: json.loads(Path(f"runs/compare/{name}/seed-1/result.json").read_text())["result"]["best"]
    assert best("dropout") == best("dropout, drop_prob=0.3") != best("dropout, drop_prob=0")
    told = " ".join(capsys.readouterr().out.split())
    assert "Chosen by val_loss: dropout, drop_prob=0" in told
    assert "penalty" not in told
    assert main(["compare", file, "--plain", "--vary", "strength=1,2"]) == 1
    assert "vary an argument of the model: drop_prob" in capsys.readouterr().err


def test_a_mixins_strength_and_values_that_are_lists(folder):
    own = varied(write("own.yaml", model="Own"), "explicit_penalty.strength=0,5")
    assert [each.name for each in own] == ["dropout", "strength=0", "strength=5"]
    assert main(["compare", "own.yaml", "--vary", "explicit_penalty.strength=0,5,9", "--seeds", "1"]) == 0
    best = {p.parent.parent.name: json.loads(p.read_text())["result"]["best"] for p in Path().rglob("result.json")}
    assert len(set(best.values())) == 4
    assert main(["compare", "own.yaml", "--out=alone"]) == 0
    alone = json.loads(Path("alone/own/seed-1/result.json").read_text())["result"]["best"]
    assert best["strength=5"] == alone  # what its class says
    listed = varied("own.yaml", "model.init_args.widths=[8,16],[4]")
    assert [each.options for each in listed[1:]] == [(f"--model.init_args.widths={v}",) for v in ("[8,16]", "[4]")]


def test_a_metric_of_which_higher_is_better(folder, capsys):
    """The checkpoint callback's, or a given one: its best epoch is kept, chosen by and tested."""
    keeper = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    write("given.yaml", PENALTY)
    options = ["--vary", "ExplicitPenalty.strength=0,500", "--seeds", "1"]
    highest = ["--monitor", "val_loss", "--mode", "max"]
    assert main(["compare", "given.yaml", *options, *highest, "--out=given"]) == 0
    best = {
        x: json.loads(Path(f"given/{x}/seed-1/result.json").read_text())["result"]["best"]
        for x in ("strength=0", "strength=500")
    }
    chosen = f"Chosen by val_loss: {max(best, key=best.__getitem__)} "
    assert chosen in capsys.readouterr().out
    keeper["init_args"] = {"monitor": "val_loss", "mode": "max"}
    write("watched.yaml", PENALTY, keeper)
    assert (
        main(["compare", "watched.yaml", *options, "--out=watched", "--", "--trainer.enable_checkpointing=true"]) == 0
    )
    told = capsys.readouterr().out
    assert chosen in told
    for out in ("given", "watched"):
        found = json.loads(Path(out, "strength=500", "seed-1", "result.json").read_text())["result"]
        values = [value for _, value, _ in found["history"]]
        assert (found["mode"], found["best"]) == ("max", max(values))
        assert found["test"]["test_loss"] == pytest.approx(max(values))  # the same data: the kept epoch is that one
        assert Comparison.read(Path(out)).mode == "max"
    assert main(["compare", "given.yaml", *options, "--monitor", "val_loss"]) == 1
    assert "go together" in capsys.readouterr().err


def test_times_to_a_metric_of_which_higher_is_better():
    fit = lambda *values: FitResult(
        "val_acc", max(values), 1, 2, 2, 2.0, mode="max", history=[(n, v, float(n)) for n, v in enumerate(values, 1)]
    )
    found = [Run("dropout", 1, fit(0.5, 0.8)), Run("strength=1", 1, fit(0.9, 0.7)), Run("strength=2", 1, fit(0.4, 0.6))]
    comparison = Comparison(found, ["dropout", "strength=1", "strength=2"])
    assert [comparison.time_to_reference(run) for run in found] == [1, 0.5, float("inf")]
    assert [comparison.at_equal_time(run) for run in found] == [0.8, 0.9, 0.6]
    assert choice(comparison, "strength=1,2")[0].startswith("Chosen by val_acc: strength=1 (0.9")


def test_what_is_reached_in_the_time_of_dropout_is_told():
    """The better one at equal epochs takes twice as long, and is the worse one at equal time."""
    fit = lambda values, pace: FitResult(
        "val_loss", min(values), 2, 2, 2, 2 * pace, history=[(n, v, n * pace) for n, v in enumerate(values, 1)]
    )
    found = [Run("dropout", 1, fit([0.9, 0.5], 1.0)), Run("strength=1", 1, fit([0.7, 0.4], 2.0))]
    told = choice(Comparison(found, ["dropout", "strength=1"]), "strength=1,2")
    assert "A fit took 2 times as long; in the time of dropout's it reached val_loss 0.7, dropout 0.5." in told


def test_fits_that_were_not_done_are_told():
    """A fit that was best in its last epoch says nothing of where the others would have ended."""
    fit = lambda best, epochs: FitResult("val_loss", 0.5, best, epochs, 2, 1.0)
    late = [Run("dropout", 1, fit(9, 9)), Run("strength=1", 1, fit(9, 9))]
    told = choice(Comparison(late, ["dropout", "strength=1"]), "strength=1,2")
    assert told[-1].startswith("Not done: the last epoch was the best of every setting. Train longer")
    one = [Run("dropout", 1, fit(4, 9)), Run("strength=1", 1, fit(9, 9))]
    assert "best of strength=1." in choice(Comparison(one, ["dropout", "strength=1"]), "strength=1,2")[-1]
    done = [Run("dropout", 1, fit(4, 9)), Run("strength=1", 1, fit(5, 9))]
    assert not any(line.startswith("Not done") for line in choice(Comparison(done, ["dropout", "strength=1"]), "s=1,2"))


def test_an_argument_of_the_model_needs_no_path(folder):
    file = write("one.yaml", PENALTY)
    whole, short = (varied(file, f"{key}=0.1,0.2", plain=True) for key in ("model.init_args.drop_prob", "drop_prob"))
    assert whole == short == varied(file, "drop_prob=0.1,0.2", plain=True)
    assert varied(file, "drop_prob=0.1,0.2") == varied(file, "model.init_args.drop_prob=0.1,0.2")
    with pytest.raises(InvalidArgumentError, match="vary an argument of the model: .*drop_prob"):
        varied(file, "strength=1,2", plain=True)


def test_a_misspelt_option_of_a_file_whose_model_stands_elsewhere(folder):
    Path("none.yaml").write_text(yaml.safe_dump({"trainer": {**QUIET, "callbacks": [PENALTY]}}))
    write("whole.yaml", PENALTY)
    Path("above.yaml").write_text(yaml.safe_dump({"base": "whole.yaml", "model": {"init_args": {}}}))
    for file in ("none.yaml", "above.yaml"):
        with pytest.raises(InvalidArgumentError, match="strenght"):
            varied(file, "strenght=0.5,1")


def test_what_is_only_shown_makes_no_other_run(folder):
    plain, half, _ = varied(write("one.yaml", PENALTY), "strength=0.5,1")
    marks = lambda *shared: [each.fingerprint(1, shared) for each in (plain, half)]
    before = marks()
    assert before[0] != before[1]
    shown = ["--trainer.enable_model_summary=true", "--trainer.log_every_n_steps", "7", "--trainer.logger=true"]
    assert marks(*shown) == before
    assert marks("--trainer.max_epochs", "7") != before
    assert marks("--trainer.logger", "true", "--trainer.max_epochs", "7") == marks("--trainer.max_epochs", "7")
    content = yaml.safe_load(Path("one.yaml").read_text())
    content["trainer"].pop("enable_progress_bar")
    Path("one.yaml").write_text(yaml.safe_dump(content))
    assert marks() == before
    content["trainer"]["max_epochs"] = 3
    Path("one.yaml").write_text(yaml.safe_dump(content))
    assert marks() != before


def runs(name, *values, test=None):
    tests = values if test is None else test
    return [
        Run(name, seed, FitResult("val_loss", value, 1, 1, 1, 2.0, test={"test_loss": other}))
        for seed, (value, other) in enumerate(zip(values, tests, strict=True))
    ]


def test_the_choice_is_by_validation_and_judged_by_the_test():
    """Whatever the test says of the others; the largest is said to be at the end."""
    found = [
        *runs("dropout", 1.0, 1.1, 1.2),
        *runs("strength=1", 0.9, 1.0, 1.2, test=[0.5, 0.5, 0.5]),
        *runs("strength=10", 0.8, 0.9, 1.0, test=[1.2, 1.3, 1.41]),
    ]
    told = choice(Comparison(found, ["dropout", "strength=1", "strength=10"]), "strength=1,10")
    assert told[0] == "Chosen by val_loss: strength=10 (0.9, mean of 3 seeds; next strength=1: 1.033)."
    assert told[1] == "It is the largest that was tried: try larger ones too."
    assert "strength=10 minus dropout, 3 seeds in pairs: test_loss +0.2033 ± 0.0033 (± standard error)." in told[2]
    assert told[5].startswith("The rate of dropout is the model's own: tune it first (--plain --vary ")
    assert told[3] == "strength=10: test_loss is higher than dropout (3 seeds, Student's t, 95 %)."


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([-0.1, -0.11, -0.12], "lower than dropout"),
        ([-0.1, 0.1, 0.05], "as far as seeds can tell that of dropout"),
        ([-0.1, -0.11], "With 2 seeds, the difference between strength=1 and dropout cannot be told from chance"),
    ],
)
def test_what_seeds_can_tell(pairs, told):
    found = [*runs("dropout", *[1.0] * len(pairs)), *runs("strength=1", *(1 + pair for pair in pairs))]
    assert any(told in line for line in choice(Comparison(found, ["dropout", "strength=1"]), "strength=1,2"))
