"""The commands that measure single files again are those of the files that are there."""

import json
import shlex
import subprocess

import pytest

from examples.benchmarks import again, run
from lightning_dropreg.cli.methods import named


@pytest.mark.parametrize("name", again.COMMANDS)
def test_the_command_is_of_a_file_that_is_there(name):
    words = shlex.split(again.COMMANDS[name])
    assert (run.HERE / name).is_file()
    for word in words:
        if word.endswith((".yaml", ".py")):
            assert (again.ROOT / word).is_file(), word
    if "--methods" in words:
        asked = named([words[words.index("--methods") + 1]])
        kept = [cost["method"] for cost in json.loads((run.HERE / name).read_text())["costs"]]
        assert {*asked, "dropout"} == set(kept)


def test_what_bench_prints_is_kept_and_what_fails_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "memory_lstm.json").write_text("before")
    told = []

    def told_to_run(command, **options):
        told.append(command)
        return subprocess.CompletedProcess(command, 0, stdout='a line\n{"costs": []}\n')

    monkeypatch.setattr(subprocess, "run", told_to_run)
    again.measure_again("memory_lstm.json", tmp_path)
    assert json.loads((tmp_path / "memory_lstm.json").read_text()) == {"costs": []}
    assert told[0][1:] == again.COMMANDS["memory_lstm.json"].split()

    def fails(command, **options):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(subprocess.CalledProcessError):
        again.measure_again("memory_lstm.json", tmp_path)
    assert json.loads((tmp_path / "memory_lstm.json").read_text()) == {"costs": []}
