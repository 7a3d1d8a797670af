"""The studies of PROTOCOL.md: which runs each consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .records import Records, Run
from .training import Setting

__all__ = [
    "ABLATIONS",
    "SEEDS",
    "A",
    "chosen",
    "claims",
    "dose",
    "labels",
    "map_of_noise",
    "negative",
    "r_drop",
    "r_drop_text",
    "remedies",
    "table_1",
    "table_1_tuning",
    "text",
    "text_time",
    "text_tuned",
    "transformer",
    "tuned",
    "wikitext",
]

SEEDS = {
    "tuning": list(range(100, 116)),
    "claims": list(range(1000, 1032)),
    "map": list(range(2000, 2016)),
    "tuned": list(range(3000, 3032)),
    "negative": list(range(4000, 4032)),
    "text": list(range(5000, 5008)),
    "labels": list(range(6000, 6016)),
    "r_drop": list(range(7000, 7016)),
    "remedies": list(range(8000, 8032)),
    "text tuning": list(range(200, 204)),
    "table_1": list(range(9000, 9008)),
    "wikitext": list(range(9100, 9108)),
    "r_drop_text": list(range(9200, 9208)),
    "text_tuned": list(range(9300, 9308)),
    "transformer": list(range(9400, 9408)),
    "text_time": list(range(9500, 9508)),
    "models": [1],
}
A = Setting()
"""Full batch, 40 % random labels: no noise but dropout's."""

ABLATIONS = {
    "identity": [0.03, 0.1, 0.3, 1.0],
    "loss Jacobian": [0.3, 1.0, 3.0, 10.0],
    "l2": [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064],
}
ARMS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("dropout", {}),
    ("DROPOUT_k", {"k": 8}),
    ("DROPOUT_k + 3.1", {"k": 8}),
    ("DROPOUT_k + xi", {"k": 8}),
    ("R", {}),
    ("Algorithm 2", {}),
]
TUNED_STRENGTHS = {"identity": 0.3, "loss Jacobian": 1.0, "l2": 0.008}
"""Of setting A, see `tuning_of_ablations`."""


def tuning_of_ablations() -> list[Run]:
    """The four strengths of each ablation, on the tuning seeds."""
    return [
        Run(method, {"strength": strength}, A, SEEDS["tuning"], "tuning")
        for method, strengths in ABLATIONS.items()
        for strength in strengths
    ]


def claims(setting: Setting = A, seeds: list[int] | None = None) -> list[Run]:
    """All arms on fresh seeds."""
    arms = [*ARMS, *((method, {"strength": strength}) for method, strength in TUNED_STRENGTHS.items())]
    return [Run(method, parameters, setting, seeds or SEEDS["claims"]) for method, parameters in arms]


def dose() -> list[Run]:
    """More and less noise than dropout's own, beside the penalty and beside averaged dropout."""
    return beside_penalty() + beside_dropout()


def beside_penalty() -> list[Run]:
    """Beside R."""
    return [Run("Algorithm 2", {"noise": s}, A, SEEDS["claims"]) for s in (0.5, 1.5, 2.0, 3.0, 4.0)]


def beside_dropout() -> list[Run]:
    """Beside DROPOUT_8."""
    return [Run("DROPOUT_k + xi", {"k": 8, "strength": s}, A, SEEDS["claims"]) for s in (2.0, 3.0)]


def map_of_noise() -> Iterator[tuple[Run, Run]]:
    """For every rate and batch size DROPOUT_8 and dropout, the cheap ones first."""
    for rows in (10, 40, 200):
        for rate in (0.8, 0.4, 0.2, 0.1):
            setting = replace(A, batch_size=rows, rate=rate, passes=round(400 / rate))
            seeds = SEEDS["map"]
            yield Run("DROPOUT_k", {"k": 8}, setting, seeds), Run("dropout", {}, setting, seeds)


RATES = (0.4, 0.8)
GRIDS: dict[str, list[dict[str, Any]]] = {
    "dropout": [{"q": q} for q in (0.35, 0.45, 0.55, 0.65)],
    "R": [{"strength": s} for s in (0.7, 1.2, 2.0, 3.5)],
    "Algorithm 2": [{"strength": r, "noise": s} for r, s in ((0.8, 1.0), (1.3, 1.5), (2.0, 1.0), (2.0, 2.0))],
    "R-Drop": [{"q": q, "alpha": a} for q, a in ((0.25, 0.25), (0.4, 0.25), (0.4, 0.5), (0.5, 0.1))],
    "SAM with dropout": [{"rho": rho, "q": q} for rho, q in ((0.2, 0.35), (0.2, 0.5), (0.5, 0.35), (0.5, 0.5))],
    "SAM": [{"rho": rho} for rho in (0.2, 0.4, 0.8, 1.6)],
    "R, quarter": [{"strength": s} for s in (0.7, 1.2, 2.0, 3.5)],
    "noise stability": [{"sigma": sigma} for sigma in (0.03, 0.06, 0.12, 0.24)],
    "l2": [{"strength": s} for s in (0.001, 0.003, 0.006, 0.012)],
    "label smoothing": [{"amount": a} for a in (0.01, 0.05, 0.1, 0.2)],
    "curvature full": [{"strength": s} for s in (0.5, 0.7, 0.85, 1.0)],
    "mixup": [{"alpha": a} for a in (0.2, 1.0, 4.0, 16.0)],
    "generalized CE": [{"power": p} for p in (0.3, 0.5, 0.7, 0.9)],
    "generalized CE with dropout": [
        {"power": p, "q": q} for p, q in ((0.3, 0.4), (0.3, 0.55), (0.7, 0.4), (0.7, 0.55))
    ],
}
LATER = ("curvature full", "mixup", "generalized CE", "generalized CE with dropout")
"""Methods that were added when the results of the others were known."""
NO_DROPOUT = [{"rate": rate} for rate in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]


def tuned(label_noise: float) -> list[Run]:
    """Eight configurations for each method, on the tuning seeds."""
    setting = replace(A, label_noise=label_noise, batch_size=50, passes=2400, count_steps=False)
    grids = {m: [{**own, "rate": r} for r in RATES for own in g] for m, g in GRIDS.items()} | {"none": NO_DROPOUT}
    return [
        Run(method, parameters, setting, SEEDS["tuning"], "tuning")
        for method, grid in grids.items()
        for parameters in grid
    ]


TEXT = Setting(
    data="ptb",
    label_noise=0.0,
    drop_probs=(0.0, 0.5, 0.5),
    batch_size=160,
    rate=4.0,
    passes=300,
    evaluations=15,
)


def text(data: str) -> list[Run]:
    """The paper's findings on text, and twice the noise."""
    arms: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("dropout", {}),
        ("DROPOUT_k", {"k": 4}),
        ("DROPOUT_k + 3.1", {"k": 4}),
        ("R", {}),
        ("Algorithm 2", {}),
        ("Algorithm 2", {"noise": 2.0}),
    ]
    return [Run(method, parameters, replace(TEXT, data=data), SEEDS["text"]) for method, parameters in arms]


TABLE_1 = replace(TEXT, data="ptb 240", drop_probs=(0.0, 0.4, 0.4), batch_size=40, passes=600, evaluations=20)
PAPERS_STRENGTH = {"strength": 2.0}
"""Of R in the paper's runs."""


def table_1() -> list[Run]:
    """The rows of the paper's first table without those whose strength is tuned, and DROPOUT_4."""
    arms: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("dropout", {}),
        ("DROPOUT_k", {"k": 4}),
        ("R", PAPERS_STRENGTH),
        ("Algorithm 2", PAPERS_STRENGTH),
        ("DROPOUT_k + xi", {"k": 4}),
    ]
    return [Run(method, own, TABLE_1, SEEDS["table_1"]) for method, own in arms]


def table_1_tuning() -> list[Run]:
    """The strengths of the other rows, on tuning seeds of their own."""
    grids = {
        "l2": (0.0001, 0.0003, 0.001, 0.003),
        "loss Jacobian": (0.5, 2.0, 8.0),
        "identity": (0.01, 0.1, 1.0, 10.0, 100.0),
    }
    return [
        Run(method, {"strength": s}, TABLE_1, SEEDS["text tuning"], "tuning")
        for method, each in grids.items()
        for s in each
    ]


def table_1_chosen(records: Records) -> list[Run]:
    """The rows whose strength was tuned, and the loss Jacobian with noise at the strength that it has without."""
    found = chosen(table_1_tuning(), records, SEEDS["table_1"])
    return found + [replace(run, method="loss Jacobian + xi") for run in found if run.method == "loss Jacobian"]


def wikitext() -> list[Run]:
    """The cheaper rows on windows of WikiText-2."""
    setting = replace(TABLE_1, data="wikitext2 240")
    return [
        replace(run, setting=setting, seeds=SEEDS["wikitext"]) for run in table_1() if run.method != "DROPOUT_k + xi"
    ]


def r_drop_text() -> list[Run]:
    """R-Drop on text, and Algorithm 2 with a penalty of the same strength, on all rows and on a quarter."""
    runs = [Run("dropout", {}, TABLE_1, SEEDS["r_drop_text"])]
    for alpha in (0.5, 2.0):
        strength = {"strength": 1 + 2 * alpha}
        arms = {"R-Drop": {"alpha": alpha}, "Algorithm 2": strength, "Algorithm 2, quarter": strength}
        runs += [Run(method, own, TABLE_1, SEEDS["r_drop_text"]) for method, own in arms.items()]
    return runs


def text_tuned() -> list[Run]:
    """Four configurations for dropout, R-Drop and Algorithm 2 in the setting of Table 1, on tuning seeds."""
    grids: dict[str, list[dict[str, Any]]] = {
        "dropout": [{"q": q} for q in (0.3, 0.4, 0.5, 0.6)],
        "R-Drop": [{"alpha": a} for a in (0.25, 0.5, 1.0, 2.0)],
        "Algorithm 2": [{"strength": s} for s in (1.0, 2.0, 3.0, 5.0)],
    }
    return [Run(m, own, TABLE_1, SEEDS["text tuning"], "tuning") for m, grid in grids.items() for own in grid]


EACH = {"each": True}
"""The losses of every seed at every evaluation: what was reached by then can be read off."""
TRANSFORMER = replace(
    TABLE_1, data="ptb 240 x 24", drop_probs=(0.0, 0.3, 0.3), adam=True, passes=800, count_steps=False
)


def transformer() -> list[Run]:
    """Six configurations for each method on small transformers, for equal passes, on tuning seeds."""
    grids: dict[str, list[dict[str, Any]]] = {
        "dropout": [{"q": q} for q in (0.3, 0.4, 0.5)],
        "Algorithm 2": [{"strength": s} for s in (1.0, 2.0, 4.0)],
        "R": [{"strength": s} for s in (1.0, 2.0, 4.0)],
        "R-Drop": [{"alpha": a} for a in (0.25, 0.5, 1.0)],
        "SAM with dropout": [{"rho": rho, "q": q} for rho, q in ((0.1, 0.3), (0.1, 0.4), (0.3, 0.3))],
        "Algorithm 2, quarter": [{"strength": s} for s in (1.0, 2.0, 4.0)],
    }
    return [
        Run(method, {**own, "rate": rate}, TRANSFORMER, SEEDS["text tuning"], "tuning", EACH)
        for method, grid in grids.items()
        for rate in (0.0015, 0.003)
        for own in grid
    ]


def text_time() -> list[Run]:
    """The LSTMs of Table 1 for equal passes, every method as it was chosen before, or with the strength that was."""
    arms: list[tuple[str, dict[str, Any]]] = [
        ("dropout", {"q": 0.5}),
        ("R-Drop", {"alpha": 0.5}),
        ("Algorithm 2", {"strength": 3.0}),
        ("Algorithm 2, quarter", {"strength": 3.0}),
        ("R", {"strength": 3.0}),
    ]
    setting = replace(TABLE_1, passes=1200, count_steps=False)
    return [Run(method, own, setting, SEEDS["text_time"], options=EACH) for method, own in arms]


def labels() -> list[Run]:
    """What becomes of wrong labels in a long run, and four ways to keep the whole curvature stable."""
    setting = replace(A, batch_size=50, rate=0.4, passes=2400)
    full = {"strength": 0.85}
    arms: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("dropout", {"q": 0.55}),
        ("R", {"strength": 1.2}),
        ("curvature full", full),
        ("curvature full", {**full, "rate": 0.1}),
        ("curvature full", {**full, "clip": 0.5}),
        ("curvature full", {**full, "fade": 2400}),
        ("generalized CE with dropout", {"power": 0.7, "q": 0.55}),
        ("mixup", {"alpha": 4.0}),
        ("Algorithm 2", {"strength": 1.3, "noise": 1.5}),
    ]
    return [Run(method, parameters, setting, SEEDS["labels"]) for method, parameters in arms]


def r_drop() -> list[Run]:
    """R-Drop, and the penalty of the same strength on all rows and on a quarter, for equal passes and equal steps."""
    passes = replace(A, label_noise=0.1, batch_size=50, rate=0.4, passes=2400, count_steps=False)
    steps = replace(passes, passes=1200, count_steps=True)
    runs = []
    for q in (0.1, 0.4):
        for alpha in (0.5, 1.0, 2.0, 5.0):
            strength = {"q": q, "strength": 1 + 2 * alpha}
            runs += [
                Run("R-Drop", {"q": q, "alpha": alpha}, passes, SEEDS["r_drop"]),
                Run("R", strength, passes, SEEDS["r_drop"]),
                Run("R, quarter", strength, passes, SEEDS["r_drop"]),
                Run("R, quarter", strength, steps, SEEDS["r_drop"], "equal steps"),
            ]
    return runs


def remedies() -> list[Run]:
    """The whole curvature and generalized cross entropy with dropout, both with their q tuned, on the tuning seeds."""
    setting = replace(A, batch_size=50, rate=0.4, passes=2400, count_steps=False)
    strengths = {0.35: (1.3, 1.6), 0.45: (0.85, 1.05), 0.55: (0.57, 0.7), 0.65: (0.38, 0.46)}  # x q/(1-q): 0.7, 0.85
    grids: dict[str, list[dict[str, Any]]] = {
        "curvature full": [{"q": q, "strength": s} for q, each in strengths.items() for s in each],
        "generalized CE with dropout": [{"q": q, "power": p} for q in (0.25, 0.35, 0.45, 0.55) for p in (0.5, 0.7)],
    }
    return [Run(method, own, setting, SEEDS["tuning"], "tuning") for method, grid in grids.items() for own in grid]


REGRESSION = Setting(
    drop_probs=(0.0, 0.1, 0.1), batch_size=20, rate=0.002, adam=True, silu=True, label_noise=0.0, count_steps=True
)
PROBLEMS = {
    "friedman 800": replace(REGRESSION, data="friedman", passes=800),
    "friedman 2500": replace(REGRESSION, data="friedman", passes=2500),
    "diabetes": replace(REGRESSION, data="diabetes", passes=500),
}


def negative(problem: str) -> list[Run]:
    """Four values for each method, on the tuning seeds."""
    small = problem != "diabetes"
    grids: dict[str, list[dict[str, Any]]] = {
        "none": [{}],
        "dropout": [{"q": q} for q in ((0.05, 0.1, 0.2, 0.3) if small else (0.1, 0.2, 0.4, 0.6))],
        "DROPOUT_k": [{"k": 8}],
        "R": [{"strength": s} for s in ((0.3, 1.0, 2.0, 4.0) if small else (1.0, 3.0, 10.0, 20.0))],
        "Algorithm 2": [{"strength": s} for s in ((0.3, 1.0, 2.0, 4.0) if small else (1.0, 3.0, 10.0, 20.0))],
        "l2": [{"strength": s} for s in ((0.0001, 0.0004, 0.001, 0.002) if small else (0.001, 0.004, 0.01, 0.02))],
    }
    return [
        Run(method, parameters, PROBLEMS[problem], SEEDS["tuning"], "tuning")
        for method, grid in grids.items()
        for parameters in grid
    ]


def chosen(runs: list[Run], records: Records, seeds: list[int]) -> list[Run]:
    """For every method the run with the least mean held-out loss, on other seeds.

    Args:
        runs: Runs on tuning seeds.
        records: Where they are recorded; those that are not count as not made.
        seeds: The fresh seeds.

    Returns:
        One run for each method of which all runs are recorded, and one is finite.
    """
    unfinished = {run.method for run in runs if records.find(run) is None}
    best: dict[str, tuple[float, Run]] = {}
    for run in runs:
        record = records.find(run)
        if record is not None and "failed" not in record and run.method not in unfinished:
            loss = sum(record["held_out"]) / len(record["held_out"])
            if run.method not in best or loss < best[run.method][0]:
                best[run.method] = loss, run
    return [replace(run, seeds=seeds, part="fresh") for _, run in best.values()]
