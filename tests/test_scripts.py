"""Scripts for machines that are not here: what they would run, and that they say so where they cannot."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
gpu = pytest.importorskip("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_run_on_a_gpu():
    found = {part.name: part.command for part in gpu.parts(False, Path("corpus"), 1.5)}
    assert {f"costs: {name}, {p}" for name in ("lstm", "transformer") for p in gpu.PRECISIONS} <= found.keys()
    assert "--compile=reduce-overhead" in found["costs: transformer, 32-true, compiled, reduce-overhead"]
    row = found["language model: ptb_r_approx_xi"]
    assert "--trainer.max_time=00:00:01:30" in row
    assert all(
        Path(command[command.index("--config") + 1]).is_file() for command in found.values() if "--config" in command
    )


def test_a_part_that_fails_is_told_and_the_rest_runs(tmp_path, monkeypatch):
    good = gpu.Part("good", [sys.executable, "-c", "print('{\"costs\": []}')"], json_output=True)
    bad = gpu.Part("bad", [sys.executable, "-c", "raise SystemExit('no such kernel')"])
    monkeypatch.setattr(gpu, "parts", lambda *args: [bad, good])
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [(part["name"], part["status"]) for part in parts] == [("bad", 1), ("good", 0)]
    assert "no such kernel" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_rehearsal(tmp_path):
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0


def test_workflows_call_scripts_that_are_there():
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text())["jobs"]
        lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        named = [word for line in lines for word in line.split() if word.startswith(("scripts/", ".ci/"))]
        assert [word for word in named if not (ROOT / word).is_file()] == []
        assert [word for word in named if not word.endswith(".py") and not os.access(ROOT / word, os.X_OK)] == []
