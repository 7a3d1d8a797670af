"""The command and the configurations that ship with it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import BRIEF, CONFIGS, QUICKSTART, TWO, printed_json
from fits import Classifier, make_loader

import lightning_dropreg as dr
from lightning_dropreg.cli import COMMANDS, init, main
from lightning_dropreg.cli.methods import CLOSING, CONFIGURED
from lightning_dropreg.errors import CompiledPartWarning
from lightning_dropreg.estimators import ESTIMATORS

pytestmark = pytest.mark.usefixtures("elsewhere")
IMAGES = {"conv", "mlp"}  # of the benchmark; the rest are language models
# the others, under paper/ and small/, have tests of their own
SHIPPED = sorted(path for folder in (".", "bench", "time_to_quality") for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    usage, *rest = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: dropreg")
    assert command in usage
    assert max(map(len, [usage, *rest])) <= 80


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lightning_dropreg", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_trains(config, capsys):
    if config.stem in IMAGES:
        assert main(["fit", "--config", str(config), *TWO]) == 0
        return
    small = [*TWO, "--model.width=8"] if config.stem == "transformer" else BRIEF
    assert main(["fit", "--config", str(config), *small]) == 0
    out = capsys.readouterr().out
    [log_dir] = Path("runs").glob("*/version_0")
    assert (log_dir / "metrics.csv").is_file()
    assert list((log_dir / "checkpoints").glob("*.ckpt"))
    assert ("penalty R" in out) == (config.stem == "quickstart" or "ExplicitPenalty" in config.read_text())
    with (log_dir / "metrics.csv").open() as file:
        means = [row.get("dropreg/loss_epoch") or row.get("train_loss_epoch") for row in csv.DictReader(file)]
    [mean] = filter(None, means)
    assert f"epoch     1/1  loss {float(mean):9.4g}" in out
    assert all(row in out for row in ("best val_ppl", "wall-clock", "per step", "logs"))


def test_the_three_quickstart_runs_differ_in_nothing_but_the_method(capsys):
    def resolved(name: str) -> dict[str, object]:
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(CONFIGS / name), "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        config["trainer"]["logger"]["init_args"].pop("name")
        return config

    full, dropout, none = (resolved(f"quickstart{suffix}.yaml") for suffix in ("", "_dropout", "_none"))
    names = [callback["class_path"] for callback in full["trainer"].pop("callbacks")]
    assert names[1:] == ["lightning_dropreg.ExplicitPenalty", "lightning_dropreg.ImplicitNoise"]
    assert [callback["class_path"] for callback in dropout["trainer"].pop("callbacks")] == names[:1]
    assert full == dropout
    assert none["model"]["init_args"].pop("drop_prob") == 0.0
    assert dropout["model"]["init_args"].pop("drop_prob") > 0.0
    none["trainer"].pop("callbacks")
    assert none == dropout


def test_a_run_can_be_repeated_from_its_own_record_and_evaluated(capsys):
    fit = ["fit", "--config", QUICKSTART, *BRIEF]
    assert main(fit) == 0
    record = "runs/quickstart/version_0/config.yaml"
    assert main(["fit", "--config", record]) == 0
    assert main([*fit, "--trainer.logger.version=1"]) == 0  # into a directory that is not empty
    first, second = (Path(f"runs/quickstart/version_{i}/metrics.csv").read_text().splitlines()[:2] for i in (0, 1))
    assert first == second
    [checkpoint] = Path("runs/quickstart/version_0/checkpoints").glob("*.ckpt")
    for command in ("validate", "test", "predict"):
        capsys.readouterr()
        assert main([command, "--config", record, "--ckpt_path", str(checkpoint)]) == 0
        assert capsys.readouterr().out.strip()


def test_inspect_lists_sites_losses_and_what_would_happen(capsys):
    assert main(["inspect", "--config", QUICKSTART, "--json"]) == 0
    found = printed_json(capsys)
    assert [site["name"] for site in found["sites"]] == ["dropouts.0", "dropouts.1", "dropouts.2"]
    assert all(site["shape"] == site["mask_shape"] == [20, 35, 200] for site in found["sites"])
    assert all(site["estimators"] == list(ESTIMATORS) for site in found["sites"])
    [loss] = found["losses"]
    assert (loss["name"], loss["outputs_shape"]) == ("cross_entropy", [700, 2000])
    assert loss["estimators"] == ["antithetic", "forward", "double_backward"]
    assert "1,400,000 backward passes" in loss["untried"]["exact"]
    [outlook] = found["plans"]
    assert found["configured"]
    assert outlook["callbacks"] == ["ExplicitPenalty", "ImplicitNoise"]
    assert "Back-propagated: loss + 2 R_approx + 1 s (whose gradient is xi_approx)." in outlook["plan"]
    assumed = {row["name"]: row for row in outlook["assumptions"]}
    assert assumed["repeatable"]["value"] <= assumed["repeatable"]["tolerance"]
    measured = ("repeatable", "whole_batch", "state_put_back", "fixed_parameters", "reached_site")
    assert all(assumed[name]["outcome"] == "holds" for name in measured)
    assert outlook["values"].keys() == {"loss", "explicit penalty", "norm of the gradient", "noise over xi_approx"}
    assert outlook["values"]["noise over xi_approx"] == pytest.approx(1, abs=0.01)
    assert not found["problems"]
    assert not outlook["refused"]


def test_inspect_without_dropout_tells_of_each_callback(capsys):
    with pytest.warns(UserWarning, match="drop probability 0"):
        assert main(["inspect", "--config", str(CONFIGS / "quickstart_none.yaml")]) == 0
    out = capsys.readouterr().out
    assert "No dropout" in out
    assert all(name in out for name in ("ExplicitPenalty", "ImplicitNoise", "MiniBatchDropout"))
    assert "explicit penalty 0, " in out
    assert "No callback of this package is configured. What each method would do" in " ".join(out.split())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * 2


class Troubled(dr.ImplicitNoiseMixin, Classifier):
    """Manual optimization, two compiled parts, an operation without second derivatives and half of a known loss."""

    def __init__(self, compiles: bool = True):
        super().__init__(dtype=torch.float32)
        self.automatic_optimization = False
        self.last = torch.nn.Linear(3, 3)
        self.implicit_noise = {"estimator": "forward" if compiles else "auto"}  # a compiled part has no forward mode
        for part in (self.net, self.net[3]) if compiles else ():
            part.compile()

    def training_step(self, batch, batch_idx):
        z = self.last(F.dropout(Once.apply(self.net(batch[0])), 0.1))
        loss = F.cross_entropy(z, batch[1]) + F.l1_loss(z, z.detach() + 1) + 0.1 * z.square().mean()
        self.manual_backward(loss)
        self.optimizers().step()
        return {"loss": loss}


class Compiled(dr.ExplicitPenaltyMixin, Classifier):
    """A part whose loss breaks its graph, and one whose loss the graph hides."""

    def __init__(self, compiles: bool = True):
        super().__init__(dtype=torch.float32)
        self.net, self.breaks, self.hides = torch.nn.Linear(4, 3), Ending(hides=False), Ending(hides=True)
        for part in (self.breaks, self.hides) if compiles else ():
            part.compile(backend="aot_eager")

    def training_step(self, batch, batch_idx):
        h = self.net(batch[0])
        return self.breaks(h, batch[1]) + self.hides(h, batch[1])


class Ending(torch.nn.Module):
    def __init__(self, hides):
        super().__init__()
        self.last, self.hides = torch.nn.Linear(3, 3), hides

    def forward(self, h, y):
        loss = torch.nn.CrossEntropyLoss() if self.hides else F.cross_entropy
        return loss(self.last(F.dropout(h, 0.2, self.training)), y)


def test_inspect_tells_what_runs_outside_of_graphs(capsys):
    command = ["inspect", "--model=test_cli.Compiled", "--data=test_cli.Examples", "--trainer.accelerator=cpu"]
    with pytest.warns(CompiledPartWarning, match="hides"):
        assert main([*command, "--json"]) == 0
    [outlook] = printed_json(capsys)["plans"]
    [told] = [row for row in outlook["assumptions"] if row["name"] == "compiled"]
    assert told["outcome"] == "fallback"
    assert "hides runs uncompiled: in the graph other losses are seen (none)" in told["note"]
    if torch.__version__ >= "2.7":
        expected = (
            "breaks runs compiled, with 1 dropout site in it; outside the graph: losses, and what else is not to be"
        )
        assert expected in told["note"]


@pytest.mark.parametrize("command", ["diagnose", "audit", "bench"])
def test_commands_on_compiled_parts(command, capsys):
    """What measures runs them uncompiled, the steps that are timed do not."""
    options = {"diagnose": ["--draws=4", "--no-costs"], "audit": [], "bench": ["--methods=alg2", "--repeats=1"]}
    options["bench"] += ["--steps=2", "--warmup=0"]
    model = ["--model=test_cli.Compiled", "--data=test_cli.Examples", "--trainer.accelerator=cpu"]
    found = []
    for compiles in ("true", "false"):
        status = main([command, *model, f"--model.compiles={compiles}", *options[command], "--json"])
        found.append(printed_json(capsys))
        assert status == 0
    if command == "bench":
        assert not any(cost["problem"] for each in found for cost in each["costs"])
    else:
        assert found[0] == found[1]


class Examples(L.LightningDataModule):
    def train_dataloader(self):
        return make_loader(dtype=torch.float32)


def test_inspect_finds_out_what_is_supported_and_all_that_is_not(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = ["inspect", "--model=test_cli.Troubled", "--data=test_cli.Examples", "--trainer.accelerator=cpu"]
    assert main([*command, "--json"]) == 0
    found = printed_json(capsys)
    behind, before = found["sites"]
    assert behind["estimators"] == ["antithetic"]
    assert "Once" in behind["refused"]["double_backward"]
    assert before["estimators"] == list(ESTIMATORS)
    assert [loss["name"] for loss in found["losses"] if not loss["refused"]] == ["cross_entropy"]
    [problem] = found["problems"]
    assert "does not lead through" in problem
    [outlook] = found["plans"]
    assert outlook["callbacks"] == ["ImplicitNoise"]
    assert "has 2 problems" in outlook["refused"]
    assert main(command) == 0
    told = capsys.readouterr().out.partition("ImplicitNoise")[2]
    assert "Refused:" in told
    assert "is added" not in told  # what will not be carried out
    assert main([*command, "--model.compiles=false"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "A [1] [2]" in out
    assert "On the first batch: loss" in out


def test_diagnose_measures_draws_and_reads(capsys):
    diagnose = ["diagnose", "--config", QUICKSTART, *BRIEF, "--draws=4", "--no-costs"]
    assert main([*diagnose, "--sweep", "0.1", "0.6", "--figures=figures", "--json"]) == 0
    report = printed_json(capsys)
    assert [site["name"] for site in report["sites"]] == ["dropouts.0", "dropouts.1", "dropouts.2"]
    for part in (report["total"], *report["sites"], *report["sweep"]):
        assert part["r_drop"]["low"] <= part["r_drop"]["value"] <= part["r_drop"]["high"]
        assert part["trusted"] in {"yes", "no", "unclear"}
    assert [part["drop_prob"] for part in report["sweep"]] == [0.1, 0.6]
    assert {layer["name"] for layer in report["noise"]["layers"]} == {"embedding", "layers.0", "layers.1", "decoder"}
    assert all(layer["alignment"]["value"] > 0 for layer in report["noise"]["layers"])
    assert report["penalty"]["strength"] == 2
    assert report["costs"] is None
    [when] = [line for line in report["reading"] if line.startswith("When the noise helps: dropout makes ")]
    assert 0 < int(when.split("makes ")[1].split(" %")[0]) < 100
    assert {path.suffix for path in Path("figures").iterdir()} == {".png", ".svg"}


def test_diagnose_measures_what_is_configured_and_what_it_costs(capsys):
    settings = {"ExplicitPenalty": {"step_size": 0.3, "mask": "elementwise"}, "ImplicitNoise": {"step_size": 0.4}}
    callbacks = [{"class_path": f"lightning_dropreg.{name}", "init_args": args} for name, args in settings.items()]
    Path("mine.yaml").write_text(yaml.safe_dump({"base": QUICKSTART, "trainer": {"callbacks": callbacks}}))
    diagnose = ["diagnose", "--config=mine.yaml", *BRIEF, "--draws=4", "--sites=false"]
    assert main([*diagnose, "--json"]) == 0
    report = printed_json(capsys)
    assert (report["penalty"]["step_size"], report["penalty"]["mask"]) == (0.3, "elementwise")
    assert (report["noise"]["step_size"], report["noise"]["mask"]) == (0.4, "as_model")
    assert list(report["costs"]["ratios"]) == [*CLOSING, CONFIGURED]
    assert all(0 < low <= ratio <= high for ratio, low, high in report["costs"]["ratios"].values())


def test_diagnose_shows_costs_that_bench_measured_on_this_model(capsys):
    few = ["--methods=[dropout,R_approx]", "--repeats=1", "--steps=2", "--warmup=0", "--json"]
    assert main(["bench", "--config", QUICKSTART, *BRIEF, *few]) == 0
    bench = printed_json(capsys)
    diagnose = ["diagnose", "--config", QUICKSTART, *BRIEF, "--draws=4", "--sites=false", "--noise=false"]
    Path("bench.json").write_text(json.dumps(bench))
    assert main([*diagnose, "--bench=bench.json"]) == 0
    out = capsys.readouterr().out
    told = "a step with dropout being 1 (bench.json, 1 round of 2 steps): R_approx"
    assert told in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    bench["machine"]["parameters"] += 1
    Path("bench.json").write_text(json.dumps(bench))
    assert main([*diagnose, "--bench=bench.json"]) == 1
    assert "only shown for the model they were measured on" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--draws=3", "--confidence=2", "--tolerance=0", "--bench=gone.json"])
def test_diagnose_refuses(option, capsys):
    assert main(["diagnose", "--config", QUICKSTART, option]) == 1
    assert option.partition("=")[0].lstrip("-") in capsys.readouterr().err


def test_a_file_changes_its_base(capsys):
    Path("below").mkdir()
    Path("base.yaml").write_text(f"base: {QUICKSTART}\nmodel:\n  init_args:\n    num_layers: 3\n")
    Path("below/top.yaml").write_text("base: ../base.yaml\nmodel:\n  init_args:\n    drop_prob: 0.25\n")
    assert main(["inspect", "--config", "below/top.yaml", "--json"]) == 0
    assert [site["drop_prob"] for site in printed_json(capsys)["sites"]] == [0.25] * 4


@pytest.mark.parametrize(("base", "message"), [("gone.yaml", "no file gone.yaml"), ("loop.yaml", "its own base")])
def test_a_base_that_cannot_be(base, message, capsys):
    Path("loop.yaml").write_text(f"base: {base}\n")
    assert main(["fit", "--config", "loop.yaml"]) == 1
    assert message in capsys.readouterr().err


def test_a_misspelt_key_in_a_file(capsys):
    Path("typo.yaml").write_text(init.QUICKSTART.read_text().replace("drop_prob", "dropp_prob"))
    assert main(["fit", "--config", "typo.yaml"]) == 1
    message = capsys.readouterr().err
    assert "lightning_dropreg.paper.models.LSTMLanguageModel" in message
    assert "'model.init_args.dropp_prob' is unknown" in message
    assert "Did you mean 'drop_prob'?" in message
    assert len(message.splitlines()) < 6


@pytest.mark.parametrize("option", ["--model.drop_probability=0.3", "--trainer.max_epoch=3", "--dropp=0.3"])
def test_a_misspelt_key_is_named_in_a_short_message(option, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", QUICKSTART, option])
    message = capsys.readouterr().err
    assert done.value.code == 2
    assert option.partition("=")[0].rpartition(".")[2].lstrip("-") in message
    assert option == "--dropp=0.3" or "Did you mean '" in message
    assert len(message.splitlines()) < 20


def test_an_error_of_this_package_is_printed_without_a_traceback(capsys):
    assert main(["fit", "--config", QUICKSTART, "--model.drop_prob=1.5"]) == 1
    message = capsys.readouterr().err
    assert "drop_prob=1.5 (in [0, 1))" in message
    assert "Traceback" not in message


def test_a_checkpoint_that_does_not_fit(capsys):
    torch.save({"state_dict": {}}, "empty.ckpt")
    for path, message in (("gone.ckpt", "no such file"), ("empty.ckpt", "does not fit")):
        assert main(["inspect", "--config", QUICKSTART, "--ckpt_path", path]) == 1
        assert message in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["fitt"]) == 2
    assert "fitt" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--config", "bad.yaml"],
            "trainer.callbacks: lightning_dropreg.ExplicitPenalty: step_size='quarter' must be float.",
        ),
        (["--trainer.max_epochs=many"], "trainer.max_epochs='many' must be int or None."),
        (
            ["--model.num_layers=1.5"],
            "model: lightning_dropreg.paper.models.LSTMLanguageModel: num_layers='1.5' must be int.",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_told_in_one_line(options, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = "{class_path: lightning_dropreg.ExplicitPenalty, init_args: {step_size: quarter}}"
    Path("bad.yaml").write_text(f"trainer: {{callbacks: [{bad}]}}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, *options])
    first, hint = capsys.readouterr().err.splitlines()
    assert first == f"dropreg fit: {told}"
    assert hint == "(all options: dropreg fit --help)"


def test_an_option_of_a_class_within_is_answered_for_that_class(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, "--model.optimizer.init_args.weight_dceay=0.1"])
    assert "torch.optim.Adam takes no 'weight_dceay'. Did you mean 'weight_decay'?" in capsys.readouterr().err
