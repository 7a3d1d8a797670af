"""The paper's other models, once each: what is run, and what is written of it."""

import json

from examples.benchmarks import models
from examples.benchmarks.records import Records

WHERE = {"commit": "c", "date": "d", "cpu": "p", "torch": "t", "lightning": "l", "python": "3", "cores": 2, "load": 1}


def test_two_models_by_three_methods_each_once(tmp_path, monkeypatch):
    fits = []
    monkeypatch.setattr(models, "_fit", lambda config, options: fits.append((config, options)) or {})
    made = Records(tmp_path / "runs.jsonl")
    models.train(made)
    models.train(made)  # what is there is kept
    assert [(line["model"], line["method"]) for line in made.lines] == [
        (model, method) for model in models.MODELS for method in ("dropout", "R", "Algorithm 2")
    ]
    assert len(fits) == 6
    noise = [sum("ImplicitNoise" in option for option in options) for _, options in fits]
    penalty = [sum("ExplicitPenalty" in option for option in options) for _, options in fits]
    assert (noise, penalty) == ([0, 0, 1] * 2, [0, 1, 1] * 2)
    assert [(models.ROOT / "configs" / "small" / f"{config}.yaml").is_file() for config, _ in fits] == [True] * 6


def test_a_fit_says_what_it_came_to():
    """The smallest there is: a few steps of the QRNN with the callbacks of Algorithm 2, as they are told to it."""
    config, _, strength = models.MODELS["QRNN"]
    penalty = [f"{models.CALLBACK}ExplicitPenalty", f"--trainer.callbacks.strength={strength}", models.MASK]
    noise = [f"{models.CALLBACK}ImplicitNoise", models.MASK]
    little = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    found = models._fit(config, [*little, *models.CORPUS, *penalty, *noise])
    assert found["steps"] == 2
    assert 1 < found["best"] == min(found["curve"])
    assert found["seconds"] > 0


def test_the_table_has_first_best_and_last(tmp_path):
    common = {"model": "QRNN", "provenance": WHERE, "steps": 7}
    line = {**common, "method": "R", "curve": [float("nan"), 300.0, 250.25, 260.5], "best": 250.25}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    models.report(Records(tmp_path / "runs.jsonl"))
    assert "| QRNN | 4 epochs | R | 300.0 | 250.2 | 260.5 | 7 |" in (tmp_path / "models.md").read_text()
