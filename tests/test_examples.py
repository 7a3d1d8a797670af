"""Every script in examples/ runs, on two batches."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {
    "existing_trainer": ["dropreg/explicit_penalty", "val_loss"],
    "mixin": ["dropreg/explicit_penalty", "dropreg/noise_norm"],
    "lightning_cli": ["val_loss"],
    "ddp": ["2 replicas, equal", "test accuracy"],
    "plain_pytorch": ["penalty", "test accuracy"],
    "fabric": ["2 replicas, equal", "test accuracy"],
    "accelerate_loop": ["penalty", "test accuracy"],
    "huggingface_trainer": ["training loss", "evaluation loss"],
    "huggingface_classifier": ["attention", "chance 0.10", "predictive entropy"],
    "vision": ["accuracy"],
    "disentangle": ["best test loss"],
    "mathematics": ["covariance of DROPOUT_4"],
}
PICTURES = {"existing_trainer", "vision", "disentangle", "huggingface_classifier"}
NEEDS = {
    "huggingface_classifier": "transformers",
    "huggingface_trainer": "transformers",
    "accelerate_loop": "accelerate",
}

OWN_TEST = {"reproduce_paper", "claims"}  # test_reproduce_paper.py, examples/test_claims.py


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name, tmp_path, monkeypatch, capfd):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if "accelerate" in sys.modules:  # which fixes the precision for the length of a process
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--fast"]
    if name == "lightning_cli":
        arguments = ["fit", "--config", str(EXAMPLES / "lightning_cli.yaml"), "--fast"]
    elif name in PICTURES:
        arguments += ["--figure", str(tmp_path / "figure.png")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capfd.readouterr().out
    assert all(words in printed for words in SCRIPTS[name])
    if "--figure" in arguments:
        assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_all_examples_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS) | OWN_TEST
