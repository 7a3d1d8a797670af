"""The claims' command, the records and the statistics, at a size of seconds."""

import json
import math
from dataclasses import replace
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch

from examples import claims
from examples.benchmarks import figures, later_reports, methods, run, studies, style, text, text_reports
from examples.benchmarks.data import digits
from examples.benchmarks.paired import Difference, Mean, difference
from examples.benchmarks.records import Records, Run
from examples.benchmarks.reports import edges
from examples.benchmarks.training import train
from lightning_dropreg.functional import find_sites
from lightning_dropreg.paper.data import PythonManual
from lightning_dropreg.paper.data.encoding import TextEncoder

pytest.importorskip("sklearn")
TINY = replace(studies.A, passes=4, evaluations=2)
SMALL = {"widths": (4, 4)}


def test_claims_are_made_once_and_reported(tmp_path, capsys):
    claims.main(["--fast", "--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == len(studies.claims()) == 10
    assert all(json.loads(line)["provenance"]["torch"] for line in lines)
    assert "DROPOUT_8 - DROPOUT_1" in printed
    assert "±" in printed
    assert (tmp_path / "claims.png").stat().st_size > 10_000
    claims.main(["--fast", "--seeds", "2", "--out", str(tmp_path)])
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines


def test_one_seed_has_no_spread(tmp_path, capsys):
    claims.main(["--fast", "--seeds", "1", "--out", str(tmp_path)])
    assert "±" not in capsys.readouterr().out


def test_paired_difference():
    first, second = {"seeds": [1, 2, 3], "test": [1.0, 2.0, 4.0]}, {"seeds": [1, 2, 3], "test": [2.0, 2.5, 3.0]}
    found = difference(first, second)
    assert found.mean == pytest.approx(-1 / 6)
    assert found.error == pytest.approx(stdev([-1.0, -0.5, 1.0]) / math.sqrt(3))
    assert (found.wins, found.seeds) == (2, 3)
    with pytest.raises(ValueError, match="not the same seeds"):
        difference(first, {"seeds": [1, 2, 4], "test": [2.0, 2.5, 3.0]})
    assert Mean.of([2.0]).text() == "2.0000"
    assert math.isnan(Difference(1.0, None, 0, 1).in_errors)


def test_the_best_point_is_that_of_the_held_out_rows():
    record = train(TINY, "dropout", {}, [1, 2], **SMALL)
    longer = train(replace(TINY, passes=2, evaluations=1), "dropout", {}, [1, 2], **SMALL)
    assert record["steps"] == [2, 4]
    for seed in range(2):
        at = record["steps"].index(record["best_step"][seed])
        assert record["test"][seed] == (longer["test"][seed] if at == 0 else record["last_test"][seed])


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_as_many_steps_as_its_passes_allow(method):
    parameters = {
        "DROPOUT_k": {"k": 2},
        "DROPOUT_k + 3.1": {"k": 2},
        "DROPOUT_k + xi": {"k": 2},
        "l2": {"strength": 0.1},
    }
    parameters |= {"label smoothing": {"amount": 0.1}, "R-Drop": {"alpha": 0.5}, "noise stability": {"sigma": 0.1}}
    parameters |= {"mixup": {"alpha": 1.0}, "generalized CE": {"power": 0.7}}
    parameters |= {"generalized CE with dropout": {"power": 0.7, "q": 0.3}}
    parameters |= {"SAM": {"rho": 0.1}, "SAM with dropout": {"rho": 0.1, "q": 0.3}}
    chosen = parameters.get(method, {})
    steps = []
    setting = replace(TINY, passes=12, batch_size=50, count_steps=False)
    record = train(setting, method, chosen, [1, 2], lambda: steps.append(1), **SMALL)
    passes = methods.recipe(method, **{k: v for k, v in chosen.items() if k != "q"}).passes
    assert len(steps) == int(12 / passes)
    assert len(record["test"]) == 2
    assert style.style_of(method)


def test_gradients_are_cut_for_every_network_by_itself():
    start = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    w = torch.nn.Parameter(start.clone())

    def closure():
        w.grad = start.clone()

    methods.ClippedSGD([w], clip=1.0, lr=1.0).step(closure)
    torch.testing.assert_close(start - w.detach(), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_a_fading_penalty_ends_at_a_fifth_of_its_strength():
    module, trainer = SimpleNamespace(drop_probs=(0.2, 0.5, 0.5)), SimpleNamespace(global_step=0)
    fading = methods.Fading(10)
    fading.on_fit_start(trainer, module)
    found = []
    for trainer.global_step in (0, 5, 10, 20):
        fading.on_train_batch_start(trainer, module)
        found.append(module.drop_probs[0] / (1 - module.drop_probs[0]))
    assert found == pytest.approx([0.25, 0.15, 0.05, 0.05])


def test_wrong_labels_are_known_and_what_is_predicted_is_counted():
    data = digits([1, 2], label_noise=0.4)
    assert data.wrong is not None
    assert data.wrong.float().mean() == pytest.approx(0.36, abs=0.07)  # of 400 rows: three standard errors
    assert digits([1], label_noise=0.0).wrong is None
    record = train(TINY, "none", {}, [1, 2], **SMALL)
    shares = record["mean_fitted_wrong"] + record["mean_fitted_right"]
    assert len(shares) == 4
    assert all(0 <= share <= 1 for share in shares)


def test_a_language_model_gets_the_gradient_of_each_alone_and_drops_whole_sequences():
    setting = replace(studies.TEXT, data="python manual", passes=2, evaluations=1)
    together, swapped = (train(setting, "none", {}, seeds) for seeds in ([1, 2], [2, 1]))
    assert together["test"] == pytest.approx(swapped["test"][::-1], abs=2e-5)  # five decimals are kept
    data = text.windows(TextEncoder(PythonManual(), text.VOCABULARY), [1], rows=4, held_out=1, test=1)
    x, y = data.train
    assert torch.equal(x[..., 1:], y[..., :-1])
    networks = text.ManyLSTMs(data, [1], (6,), (0.0, 0.5, 0.5))
    sites = find_sites(lambda: networks.training_step((x, y), 0))
    assert [site.mask_shape for site in sites] == [(1, 4, 1, 6)] * 2


def test_same_split_and_start_for_every_method():
    first = train(replace(TINY, rate=0.0), "dropout", {}, [5, 6], **SMALL)
    second = train(replace(TINY, rate=0.0), "R", {}, [6, 5], **SMALL)
    assert first["test"] == second["test"][::-1]


def test_regression_and_classification_settings_run():
    for setting in studies.PROBLEMS.values():
        record = train(replace(setting, passes=4, evaluations=2), "Algorithm 2", {"q": 0.2}, [1], **SMALL)
        assert "accuracy" not in record
        assert record["test"][0] > 0


def test_the_least_held_out_loss_is_chosen_and_edges_are_marked(tmp_path):
    records = Records(tmp_path / "runs.jsonl")
    grid = [Run("l2", {"strength": s}, TINY, [1, 2], "tuning", SMALL) for s in (0.0, 30.0, 1e-3)]
    made = [records.make(one) for one in grid]
    losses = [sum(m["held_out"]) if "failed" not in m else math.inf for m in made]
    (chosen,) = studies.chosen(grid, records, [7])
    assert chosen.parameters == grid[losses.index(min(losses))].parameters
    assert (list(chosen.seeds), chosen.part) == ([7], "fresh")
    assert edges({"a": 1, "b": 2}, [{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 3, "b": 3}]) == {"a"}


def test_eight_configurations_for_each_and_tuning_seeds_are_no_others():
    grid = studies.tuned(0.4)
    assert {sum(one.method == method for one in grid) for method in {one.method for one in grid}} == {8}
    seeds = [seed for block in studies.SEEDS.values() for seed in block]
    assert len(seeds) == len(set(seeds))
    assert all(list(one.seeds) == studies.SEEDS["tuning"] for one in grid)


def test_titles_and_a_map_are_drawn(tmp_path):
    cells = {(0.1, 10): Difference(0.1, 0.02, 3, 16), (0.2, 10): Difference(-0.1, 0.02, 13, 16)}
    figures.heat_map(cells, "title", "x", "y", tmp_path / "map")
    assert (tmp_path / "map.png").is_file()


def test_studies_added_later_are_reported(tmp_path, monkeypatch):
    for study in ("text", "labels", "r_drop"):
        options = ("python manual",) if study == "text" else ()
        short = {"passes": 4, "evaluations": 2} | ({"batch_size": 10} if study == "text" else {})
        runs = [
            replace(one, setting=replace(one.setting, **short), seeds=[1, 2], options={"widths": (4, 4)})
            for one in getattr(studies, study)(*options)
        ]
        monkeypatch.setattr(
            studies, study, lambda *data, runs=runs: runs if data != ("ptb",) else [replace(runs[0], seeds=[9])]
        )
        made = Records(tmp_path / study / "runs.jsonl")
        for one in runs:
            assert "failed" not in made.make(one)
        getattr(text_reports if study == "text" else later_reports, study)(made)
    table = (tmp_path / "text" / "python_manual.md").read_text()
    assert "| (a) averaging the noise away makes it worse | DROPOUT_4 - DROPOUT_1 | above 0 |" in table
    assert "| curvature full (strength 0.85, clip 0.5) |" in (tmp_path / "labels" / "labels.md").read_text()
    assert (tmp_path / "r_drop" / "r_drop.md").read_text().count("| 0.1 | 5 |") == 1
    assert (tmp_path / "labels" / "labels.png").stat().st_size > 10_000


def test_studies_in_the_setting_of_table_1_choose_and_report(tmp_path, monkeypatch):
    short = replace(studies.TABLE_1, data="python manual", passes=2, evaluations=1, batch_size=10)
    monkeypatch.setattr(studies, "TABLE_1", short)
    monkeypatch.setattr(studies, "SEEDS", {**{name: [1, 2] for name in studies.SEEDS}, "text tuning": [3]})
    made = Records(tmp_path / "table_1" / "runs.jsonl")
    for one in [*studies.table_1(), *studies.table_1_tuning()]:
        made.make(one)
    chosen = studies.table_1_chosen(made)
    assert [one.method for one in chosen] == ["l2", "loss Jacobian", "identity", "loss Jacobian + xi"]
    assert chosen[1].parameters == chosen[3].parameters
    tuned = studies.text_tuned()[::4]
    monkeypatch.setattr(studies, "text_tuned", lambda: tuned)
    for one in [*chosen, *studies.r_drop_text(), *tuned]:
        made.make(one)
    for one in studies.chosen(tuned, made, [1, 2]):
        made.make(one)
    text_reports.text_tuned(made)
    assert "| Algorithm 2 minus R-Drop |" in (tmp_path / "table_1" / "text_tuned.md").read_text()
    text_reports.table_1(made)
    text_reports.r_drop_text(made)
    table = (tmp_path / "table_1" / "table_1.md").read_text()
    assert "| Algorithm 2 (strength 2) | 72.99 |" in table
    assert "| (f) the identity is no substitute for the Hessian | identity - R | above 0 |" in table
    assert (tmp_path / "table_1" / "r_drop_text.md").read_text().count("| 2 | Algorithm 2, quarter |") == 1


def test_what_was_chosen_on_tuning_seeds_is_compared_on_fresh_ones(tmp_path, monkeypatch):
    runs = [replace(one, setting=TINY, seeds=[1], options=SMALL) for one in studies.remedies()[7:9]]
    monkeypatch.setattr(studies, "remedies", lambda: runs)
    monkeypatch.setitem(studies.SEEDS, "remedies", [2, 3])
    made = Records(tmp_path / "runs.jsonl")
    for one in [*runs, *(made.make(one) and studies.chosen([one], made, [2, 3])[0] for one in runs)]:
        made.make(one)
    later_reports.remedies(made)
    assert "| curvature full minus generalized CE with dropout |" in (tmp_path / "remedies.md").read_text()


def test_report_of_nothing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    run.main([*run.STUDIES, "--report"])
    assert not list(tmp_path.rglob("*.md"))
