"""The committed tables say what the committed records say."""

import csv
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from examples.benchmarks import older, run, studies

pytest.importorskip("matplotlib")
ROOT = run.HERE.parents[1]
PAGES = [ROOT / "README.md"]
PAGES += [
    ROOT / "docs" / f"{name}.md"
    for name in ("is-it-worth-it", "when-does-the-noise-help", "rdrop", "costs", "start-here")
]
COSTS = [ROOT / "README.md"]
COSTS += [ROOT / "docs" / f"{name}.md" for name in ("start-here", "costs", "faq", "estimators", "quickstart", "index")]
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


def test_every_difference_that_a_page_tells_is_in_a_committed_table():
    told = re.compile(r"([+-]?\d+\.\d+)\s±\s(\d+\.\d+)")
    known = [
        (float(value), float(error))
        for folder in [*FOLDERS, "time_to_quality", "paper_small"]
        for table in (run.HERE / folder).glob("*.md")
        for value, error in told.findall(table.read_text())
    ]
    ratios = json.loads((run.HERE / "r_drop_ratio.json").read_text())["ratios"]
    known += [(each["ratio"], each["error"]) for each in ratios]
    known += [(mean, error) for mean, error, _ in _fraction().values()]
    for page in PAGES:
        for value, error in told.findall(page.read_text()):
            near = [10.0 ** -len(number.partition(".")[2]) / 2 + 1e-9 for number in (value, error)]
            assert any(abs(v - float(value)) < near[0] and abs(e - float(error)) < near[1] for v, e in known), (
                f"{page.name}: {value} ± {error} is in no table"
            )


def test_every_range_of_costs_is_that_of_the_records():
    with (ROOT / "docs" / "ranges.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        ratios = [
            cost["ratio_to_dropout"]
            for name in row["records"].split()
            for cost in json.loads((run.HERE / f"bench_{name}.json").read_text())["costs"]
            if cost["method"] in row["method"].split("|")
        ]
        assert f"{min(ratios):.1f} to {max(ratios):.1f}" == row["range"], row["method"]
    for page in COSTS:
        lines = page.read_text().splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            for told in re.findall(r"\b\d\.\d to \d\.\d\b", line):
                words = [word for row in rows if row["range"] == told for word in row["words"].split("|")]
                assert words, f"{page.name}: {told} is in no record"
                beside = line if line.startswith("|") else f"{before} {line}"
                assert any(word in beside for word in words), f"{page.name}: {told} is that of {words}: {line}"


def test_the_costs_of_single_methods_are_those_of_the_records():
    page = (ROOT / "docs" / "costs.md").read_text()
    costs = {name: _ratios(name) for name in ("lstm", "transformer")}
    names = {
        "no dropout": "no dropout",
        "Algorithm 2": "Algorithm 2 (default arguments)",
        "Algorithm 2, economical": "Algorithm 2, both `batch_fraction=0.125`",
        "Algorithm 2, after_backward": 'Algorithm 2, `injection="after_backward"`',
        "Algorithm 2, after_backward, noise on 1/8": "the same, noise with `batch_fraction=0.125`",
        "R_approx": "R_approx",
        "R_approx, economical": "R_approx, `batch_fraction=0.125`",
        "R_approx, every 4 steps": "R_approx, `every_n_steps=4`",
        "noise only": "noise only",
        "MiniBatchDropout(k=4)": "`MiniBatchDropout(k=4)`",
        "Algorithm 2, double_backward": "Algorithm 2 the paper's way (`double_backward`)",
    }
    for method, name in names.items():
        row = "".join(f" | {ratios[method]:.2f}" for ratios in costs.values())
        assert f"| {name}{row} |" in page, method
    assert set(costs["lstm"]) - {"dropout", "no dropout, intercepted"} == set(names)


def test_the_table_of_networks_with_kinks_is_that_of_its_record():
    page = (ROOT / "docs" / "start-here.md").read_text()
    found, names = _fraction(), {"R": "penalty", "A2": "penalty and noise"}
    for method in dict.fromkeys(method for _, method in found):
        short, how = method.split(", ", 1)
        cells = []
        for network in ("relu", "conv"):
            mean, error, seeds = found[network, method]
            cells.append(f"{mean:+.3f} ± {error:.3f}{' (2 seeds)' * (seeds == 2)}")
        assert f"| {names[short]}, {how.replace('1/4', 'a quarter')} | {' | '.join(cells)} |" in page, method
    rows = {
        "Algorithm 2, forward": 'Algorithm 2, forward: `"auto"`',
        "Algorithm 2, antithetic": "Algorithm 2, antithetic",
        "R_approx, forward": 'R_approx, forward: `"auto"`',
        "R_approx, antithetic": "R_approx, antithetic",
        "R_approx, a quarter of the rows": "R_approx, antithetic, a quarter",
    }
    records = [_ratios(name) for name in ("mlp", "mlp256", "conv", "conv8")]
    for method, name in rows.items():
        assert f"| {name} | {' | '.join(f'{ratios[method]:.1f}' for ratios in records)} |" in page, method


def _ratios(name):
    costs = json.loads((run.HERE / f"bench_{name}.json").read_text())["costs"]
    return {cost["method"]: cost["ratio_to_dropout"] for cost in costs}


def _fraction():
    """Mean difference to dropout, its error and the number of seeds, of networks with kinks."""
    found = {}
    for network, methods in json.loads((run.HERE / "fraction.json").read_text())["runs"].items():
        for method, runs in methods.items():
            pairs = [(a, b) for a, b in zip(runs, methods["dropout"], strict=True) if a and b]
            less = [a["best"] - b["best"] for a, b in pairs]
            if method != "dropout":
                error = statistics.stdev(less) / len(less) ** 0.5
                found[network, method] = statistics.mean(less), error, len(less)
    return found


def test_what_pages_say_of_results_has_a_row_of_data():
    """docs/sentences.csv: words of a page, and the words of a committed file that say the same."""
    with (ROOT / "docs" / "sentences.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 20
    for row in rows:
        for path, words in ((row["page"], row["words"]), (row["file"], row["data"])):
            text = " ".join((ROOT / path).read_text().split())
            assert " ".join(words.split()) in text, f"{path} does not say: {words}"


def test_every_row_of_the_page_of_results_has_a_row_of_data():
    with (ROOT / "docs" / "sentences.csv").open(newline="") as file:
        said = [" ".join(row["words"].split()) for row in csv.DictReader(file) if "is-it-worth-it" in row["page"]]
    page = (ROOT / "docs" / "is-it-worth-it.md").read_text()
    lines = [" ".join(line.split()) for line in page.splitlines() if line.startswith("|") and "±" in line]
    assert len(lines) > 50
    assert not [line for line in lines if not any(words in line for words in said)]


def test_every_record_says_where_it_comes_from_and_uses_the_seeds_of_its_study():
    allowed = {tuple(seeds) for seeds in studies.SEEDS.values()}
    for path in Path(run.HERE).glob("*/runs.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert {"commit", "command", "cpu", "torch", "lightning", "python"} <= record["provenance"].keys(), path
            assert "with changes" not in record["provenance"]["commit"], path
            assert tuple(record["seeds"]) in allowed, path
            tuning = studies.SEEDS["tuning"], studies.SEEDS["text tuning"]
            assert (record["part"] == "tuning") == (record["seeds"] in tuning), path


def test_the_page_on_multi_sample_dropout_says_what_was_measured():
    page = (run.HERE.parents[1] / "docs" / "multi_sample.md").read_text()
    for network, measured in json.loads((run.HERE / "bench_last_site.json").read_text()).items():
        ratios = [cost["ratio_to_dropout"] for cost in measured["costs"] if cost["method"] != "dropout"]
        assert f"| {network} | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |" in page


def test_the_page_on_compiled_models_says_what_was_measured():
    page = (ROOT / "docs" / "howto" / "compile.md").read_text()
    for cost in json.loads((run.HERE / "bench_transformer_compiled.json").read_text())["costs"]:
        cells = [f"{each['median_ms']:.0f} | {each['ratio_to_dropout']:.2f}" for each in (cost, cost["compiled"])]
        memory = f"{cost['peak_mb']:.0f}, {cost['compiled']['peak_mb']:.0f}"
        assert f" | {' | '.join(cells)} | {memory} |\n" in page, cost["method"]
