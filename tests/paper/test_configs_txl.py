"""The Transformer-XL rows of Table 2: each runs, and they differ in nothing but the method."""

import random
from pathlib import Path

import pytest
import yaml
from commands import CONFIGS

from lightning_dropreg.cli import main

pytestmark = pytest.mark.usefixtures("elsewhere")

ROWS = {
    "none": (),
    "dropout_1": (),
    "dropout_2": ("MiniBatchDropout",),
    "dropout_4": ("MiniBatchDropout",),
    "r_approx": ("ExplicitPenalty",),
    "fifth_dropout_1": (),
    "fifth_dropout_2": ("MiniBatchDropout",),
    "fifth_dropout_4": ("MiniBatchDropout",),
}
TINY = {
    "data": {"corpus": "folder", "root": "text", "vocab_size": 40, "batch_size": 2, "eval_batch_size": 2, "window": 6},
    "model": {"vocab_size": 40, "cutoffs": [10, 25], "num_layers": 2, "memory_length": 6, "inner_dim": 32, "dim": 8},
    "trainer": {"max_epochs": 1, "val_check_interval": 2, "accelerator": "cpu"},
}


def test_there_is_a_file_for_every_row_and_size():
    files = {(path.parent.name, path.stem) for path in CONFIGS.rglob("wt103_txl_*.yaml")}
    assert files == {(size, f"wt103_txl_{row}") for size in ("paper", "small") for row in ROWS}


@pytest.mark.parametrize("size", ["paper", "small"])
def test_every_row_runs_two_batches_and_differs_in_nothing_but_the_method(size, capsys):
    words = random.Random(1).choices([f"w{n}" for n in range(60)], k=2000)
    Path("text").mkdir()
    for split in ("train", "valid", "test"):
        Path("text", f"{split}.txt").write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, 2000, 10)))
    options = [f"--{part}.{name}={value}" for part, values in TINY.items() for name, value in values.items()]
    options += [f"--trainer.limit_{split}_batches=2" for split in ("train", "val", "test")]
    configs, drop_probs, fractions, draws = {}, {}, {}, {}
    for row, method in ROWS.items():
        assert main(["fit", "--config", str(CONFIGS / size / f"wt103_txl_{row}.yaml"), *options]) == 0
        assert "test_ppl" in capsys.readouterr().out
        name = ("small_" if size == "small" else "") + f"wt103_txl_{row}"
        config = yaml.safe_load(Path("runs", name, "version_0", "config.yaml").read_text())
        used = {c["class_path"].split(".")[-1]: c.get("init_args", {}) for c in config["trainer"].pop("callbacks")}
        assert tuple(used) == ("ModelCheckpoint", *method)
        draws[row] = used.get("MiniBatchDropout", {}).get("k", 1)
        config["trainer"]["logger"]["init_args"].pop("name")
        drop_probs[row] = config["model"]["init_args"].pop("drop_prob")
        fractions[row] = config["data"]["init_args"].pop("train_fraction")
        configs[row] = config
    assert all(config == configs["dropout_1"] for config in configs.values())
    assert drop_probs == {row: 0.0 if row == "none" else 0.1 for row in ROWS}
    assert draws == {row: int(row[-1]) if "dropout" in row else 1 for row in ROWS}
    whole = fractions["dropout_1"]
    assert fractions == pytest.approx({row: whole / 5 if row.startswith("fifth") else whole for row in ROWS})


def test_the_paper_rows_have_the_papers_settings():
    config = yaml.safe_load((CONFIGS / "paper" / "wt103_txl_dropout_1.yaml").read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert [model[k] for k in ("num_layers", "dim", "heads", "head_dim", "inner_dim")] == [16, 410, 10, 41, 2100]
    assert [model[k] for k in ("drop_prob", "attention_drop_prob", "memory_length")] == [0.1, 0.0, 150]
    assert model["optimizer"]["init_args"]["lr"] == 2.5e-4
    assert model["lr_scheduler"]["init_args"]["T_max"] == trainer["max_steps"] == 200_000
    assert (data["window"], data["batch_size"], trainer["gradient_clip_val"]) == (150, 60, 0.25)
    assert (data["corpus"], data["vocab_size"], model["vocab_size"]) == ("wikitext103", 267_735, 267_735)
