"""Configurations that ship, and options that make a run of one short."""

import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
TWO = [f"--trainer.limit_{split}_batches=2" for split in ("train", "val", "test", "predict")]
TWO += ["--trainer.max_epochs=1"]
BRIEF = [*TWO, "--model.embedding_dim=12", "--model.hidden_dim=12"]
TINY = {
    "trainer": {"accelerator": "cpu", "enable_progress_bar": "false", "logger": "false"},
    "model": {"vocab_size": 30, "window": 12, "num_layers": 1},
    "data": {
        "vocab_size": 30, "window": 12, "train_fraction": 1, "batch_size": 2, "eval_batch_size": 1, "root": "text",
    },
}  # fmt: skip
OPTIONS = [f"--{group}.{key}={value}" for group, options in TINY.items() for key, value in options.items()]


def printed_json(capsys: pytest.CaptureFixture[str]) -> object:
    out = capsys.readouterr().out
    return json.loads(out[min(out.index(bracket) for bracket in "[{" if bracket in out) :])
