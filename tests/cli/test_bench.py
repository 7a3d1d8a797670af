"""``dropreg bench`` on small models."""

import itertools
from itertools import islice
from pathlib import Path

import pytest
from commands import BRIEF, CONFIGS, QUICKSTART, printed_json
from torch import nn

from lightning_dropreg.cli import main
from lightning_dropreg.cli.bench import _digits, _uses
from lightning_dropreg.cli.measure import Cost, without_dropout
from lightning_dropreg.cli.methods import KEYS, METHODS

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_bench_measures_every_method(capsys):
    brief = ["--repeats=2", "--steps=2", "--warmup=0", "--threads=1", *BRIEF]
    assert main(["bench", "--config", QUICKSTART, *brief, "--json"]) == 0
    report = printed_json(capsys)
    costs = {cost["method"]: cost for cost in report["costs"]}
    assert list(costs) == list(METHODS)
    assert all(len(ms) == 2 for cost in costs.values() for ms in cost["rounds"])
    assert all(cost["ratio_to_dropout"] > 0 and not cost["problem"] for cost in costs.values())
    assert {"cpu", "cores", "torch", "lightning"} <= report["machine"].keys()
    passes = {name: (cost["forwards"], cost["backwards"]) for name, cost in costs.items()}
    assert passes["dropout"] == passes["R_approx, every 4 steps"] == (1, 1)
    assert passes["Algorithm 2"] == passes["R_approx"] == (2, 2)
    assert passes["Algorithm 2, after_backward"] == (2, 4)
    assert passes["Algorithm 2, low_memory"] == (3, 2)
    assert passes["MiniBatchDropout(k=16)"] == (16, 16)


def test_bench_measures_memory_and_some_methods(capsys):
    brief = ["--repeats=1", "--steps=2", "--warmup=0", "--threads=1", *BRIEF]
    methods = "--methods=alg2"
    assert main(["bench", "--config", QUICKSTART, *brief, methods, "--memory"]) == 0
    out = capsys.readouterr().out
    assert "MiB" in out
    assert "alg2" in out
    assert "k4" not in out
    assert main(["bench", "--config", QUICKSTART, "--methods=[magic]"]) == 1
    assert "magic" in capsys.readouterr().err


def test_bench_measures_compiled_steps_beside_the_others(capsys):
    brief = ["--repeats=1", "--steps=2", "--warmup=0", "--threads=1", *BRIEF, "--methods=alg2,r_paper"]
    assert main(["bench", "--config", QUICKSTART, *brief, "--compile=aot_eager", "--json"]) == 0
    costs = {cost["key"]: cost for cost in printed_json(capsys)["costs"]}
    for key in ("dropout", "alg2"):
        compiled = costs[key]["compiled"]
        assert not compiled["problem"]
        assert len(compiled["rounds"][0]) == 2
        assert compiled["ratio_to_dropout"] > 0
        assert compiled["compile_s"] > 0
    assert costs["dropout"]["compiled"]["ratio_to_dropout"] == 1
    assert "estimator='antithetic'" in costs["r_paper"]["compiled"]["problem"]
    assert main(["bench", "--config", QUICKSTART, *brief, "--compile=aot_eager"]) == 0
    out = capsys.readouterr().out
    assert "compiled" in out
    assert "no (1)" in out


def test_bench_measures_a_module_with_a_mixin_without_it(capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("mixed.py").write_text(
        "from lightning_dropreg import ExplicitPenaltyMixin\n"
        "from lightning_dropreg.paper.models import LSTMLanguageModel\n\n"
        "class Mixed(ExplicitPenaltyMixin, LSTMLanguageModel):\n    pass\n"
    )
    Path("mixed.yaml").write_text(f"base: {CONFIGS / 'quickstart_dropout.yaml'}\nmodel:\n  class_path: mixed.Mixed\n")
    brief = ["--repeats=1", "--steps=2", "--warmup=0", "--threads=1", *BRIEF]
    methods = '--methods=["R_approx", "MiniBatchDropout(k=4)", "as configured"]'
    assert main(["bench", "--config", "mixed.yaml", *brief, methods, "--json"]) == 0
    costs = {cost["method"]: cost for cost in printed_json(capsys)["costs"]}
    assert not any(cost["problem"] for cost in costs.values())
    forwards = {name: cost["forwards"] for name, cost in costs.items()}
    assert forwards == {"dropout": 1, "R_approx": 2, "MiniBatchDropout(k=4)": 4, "as configured": 2}


def test_bench_begins_again_where_the_data_ends(capsys, monkeypatch):
    monkeypatch.setattr("lightning_dropreg.cli.bench.islice", lambda loader, count: islice(loader, 2))
    brief = ["--repeats=1", "--steps=5", "--warmup=0", "--threads=1", *BRIEF, "--methods=none", "--json"]
    assert main(["bench", "--config", QUICKSTART, *brief]) == 0
    assert [len(cost["rounds"][0]) for cost in printed_json(capsys)["costs"]] == [5, 5]


def test_bench_can_time_by_the_processors_clock(capsys, monkeypatch):
    """Whatever else the machine does; each look at this clock finds it a second later."""
    monkeypatch.setattr("lightning_dropreg.cli.measure.time.process_time", itertools.count().__next__)
    brief = ["--repeats=1", "--steps=2", "--warmup=0", *BRIEF, "--methods=none", "--processor_time", "--json"]
    assert main(["bench", "--config", QUICKSTART, *brief, "--threads=1"]) == 0
    assert {ms for cost in printed_json(capsys)["costs"] for ms in cost["rounds"][0]} == {1000.0}
    assert main(["bench", "--config", QUICKSTART, *brief]) == 1
    assert "give --threads 1" in capsys.readouterr().err


def test_bench_lists_its_keys_in_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{key}: {name}" in told for name, key in KEYS.items())


def test_short_steps_have_digits_and_what_most_use_is_told_once():
    assert [_digits(ms) for ms in (0.12345, 9.876, 54.321, 123.4, 2345.6)] == ["0.123", "9.88", "54.3", "123", "2346"]
    costs = [Cost(name, uses=["oneDNN RNN"] if name != "Algorithm 2" else []) for name in METHODS]
    assert _uses(costs) == ["uses: oneDNN RNN", "uses: no fused kernels (alg2)"]


def test_rates_that_stand_in_a_class_or_a_property_are_taken_out_too():
    class OfClass(nn.Module):
        dropout = 0.5

    class Told(nn.Module):
        rate = 0.5

        @property
        def dropout(self):
            return self.rate

        @dropout.setter
        def dropout(self, value):
            self.rate = value

    parts = nn.ModuleList([nn.Dropout(0.5), nn.LSTM(2, 2, 2, dropout=0.5), OfClass(), Told()])
    rates = lambda: [part.p if isinstance(part, nn.Dropout) else part.dropout for part in parts]
    with without_dropout(parts):
        assert rates() == [0.0] * 4
    assert rates() == [0.5] * 4
