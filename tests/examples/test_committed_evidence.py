"""The committed tables say what the committed records say."""

import json
import shutil
from pathlib import Path

import pytest

from examples.benchmarks import older, run, studies

pytest.importorskip("matplotlib")
FOLDERS = sorted({run.folder_of(study) for study in run.STUDIES})


def test_tables_are_made_of_the_records(tmp_path, monkeypatch):
    committed = {}
    for folder in FOLDERS:
        if (run.HERE / folder / "runs.jsonl").is_file():
            (tmp_path / folder).mkdir()
            shutil.copy(run.HERE / folder / "runs.jsonl", tmp_path / folder)
            committed |= {f"{folder}/{path.name}": path.read_text() for path in (run.HERE / folder).glob("*.md")}
    here = run.HERE
    monkeypatch.setattr(run, "HERE", tmp_path)
    run.main([*run.STUDIES, "--report"])
    made = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.md")}
    assert made == committed
    assert {path.name for path in tmp_path.rglob("*.png")} == {
        path.name for folder in FOLDERS for path in (here / folder).glob("*.png")
    }


def test_tables_from_before_the_studies_are_made_of_what_was_kept(tmp_path):
    for name, report in older.REPORTS.items():
        folder = run.HERE / (name if (run.HERE / name).is_dir() else "")
        parts = [path for path in folder.iterdir() if path.suffix in {".json", ".csv"}]
        here = tmp_path / name / "benchmarks"
        copy = here / (name if folder != run.HERE else "")
        copy.mkdir(parents=True)
        for path in parts:
            shutil.copy(path, copy)
        shutil.copy(run.HERE.parent / "reproduce_paper.py", tmp_path / name)
        report(here)
        made = {path.name: path.read_text() for path in copy.glob("*.md")}
        assert made
        assert made == {path: (folder / path).read_text() for path in made}


def test_what_is_there_is_listed(capsys):
    run.main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*run.STUDIES, *older.OLDER])


def test_every_record_says_where_it_comes_from_and_uses_the_seeds_of_its_study():
    allowed = {tuple(seeds) for seeds in studies.SEEDS.values()}
    for path in Path(run.HERE).glob("*/runs.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert {"commit", "command", "cpu", "torch", "lightning", "python"} <= record["provenance"].keys(), path
            assert "with changes" not in record["provenance"]["commit"], path
            assert tuple(record["seeds"]) in allowed, path
            assert (record["part"] == "tuning") == (record["seeds"] == studies.SEEDS["tuning"]), path
