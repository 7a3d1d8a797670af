"""What a step costs with the methods that one would choose from, SAM among them: one interleaved run for each model.

`dropreg bench` times the package's methods in turns, here in processor time (one thread), because on a machine that
others use too a step's wall-clock time says little. SAM is put among them, as what it is: a second forward and backward
pass at the worst point nearby, before a step of the model's own optimizer.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from statistics import median
from typing import Any

import lightning as L
import torch

from lightning_dropreg.cli import bench
from lightning_dropreg.cli.measure import Stopwatch
from lightning_dropreg.cli.methods import KEYS, METHODS

from .records import ROOT, Records
from .reports import write

__all__ = ["SAMSteps", "measure", "report"]

MODELS = ("lstm", "transformer")
CHOSEN = "none,alg2,alg2_quarter,alg2_eco,r,r_quarter,r_eco,rdrop,sam"
ROUNDS = ["--repeats=4", "--steps=4", "--warmup=2", "--threads=1"]


class SAMSteps(L.Callback):
    """Makes every step of the optimizer one of sharpness-aware minimization.

    Args:
        rho: Length of the way to the worst point.
    """

    def __init__(self, rho: float = 0.05) -> None:
        self.rho = rho

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        plain = optimizer.step

        def step(closure: Callable[[], Any]) -> Any:
            loss = closure()
            start = [p.detach().clone() for p in trained]
            gradients = [p.grad for p in trained if p.grad is not None]
            norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            with torch.no_grad():
                for p in trained:
                    if p.grad is not None:
                        p.add_(p.grad * (self.rho / (norm + 1e-12)))
            closure()
            with torch.no_grad():
                for p, old in zip(trained, start, strict=True):
                    p.copy_(old)
            plain()
            return loss

        optimizer.step = step  # type: ignore[method-assign,assignment]


def measure(made: Records) -> None:
    """Measure what has not been measured yet."""
    METHODS["SAM"], KEYS["SAM"] = lambda: [SAMSteps()], "sam"
    clock = Stopwatch._now
    Stopwatch._now = staticmethod(lambda module: time.process_time())  # type: ignore[method-assign,assignment]
    try:
        for model in MODELS:
            key = {"part": "fresh", "model": model, "options": [*ROUNDS, f"--methods={CHOSEN}"], "seeds": [1]}
            made.keep(key, lambda model=model: {"costs": _bench(model)})  # type: ignore[misc]
    finally:
        del METHODS["SAM"], KEYS["SAM"]
        Stopwatch._now = staticmethod(clock)  # type: ignore[method-assign,assignment]


def _bench(model: str) -> list[dict[str, Any]]:
    config = str(ROOT / "configs" / "bench" / f"{model}.yaml")
    with redirect_stdout(io.StringIO()) as printed:
        bench.main([f"--config={config}", *ROUNDS, f"--methods={CHOSEN}", "--json"])
    text = printed.getvalue()
    costs = json.loads(text[text.index("{") :])["costs"]
    return [{name: cost[name] for name in ("method", "rounds", "problem")} for cost in costs]


def report(made: Records) -> None:
    """Write the ratios."""
    if not made.lines:
        return
    models = {line["model"]: {cost["method"]: cost["rounds"] for cost in line["costs"]} for line in made.lines}
    lines = [
        "One optimization step as a ratio to a dropout step, one interleaved run, one thread,",
        "processor time: median over four rounds, lowest and highest round.",
        "",
        f"| method | {' | '.join(models)} |",
        "|---" * (len(models) + 1) + "|",
    ]
    for method in next(iter(models.values())):
        cells = []
        for rounds in models.values():
            pairs = zip(rounds[method], rounds["dropout"], strict=True)
            ratios = [sum(own) / sum(plain) for own, plain in pairs]
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    write(made.path.parent / "step_costs.md", lines, made.lines)
