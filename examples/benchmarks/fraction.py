"""Whether a quarter of the rows does for the estimates, and with which estimator where there are kinks.

    python -m examples.benchmarks.fraction [--seeds 4] [--epochs 15]

Digits with 40 % random training labels (in truth 36 % wrong), a ReLU network of width 256 and a small convolutional
one, Adam. Best validation loss, the epoch of it, and the median processor time of a step in
milliseconds, for every seed. Written to fraction.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path

import lightning as L
import torch

from examples.benchmarks.networks import ConvNet, Digits, ReLUNet
from examples.claims import quiet
from lightning_dropreg import ExplicitPenalty, ImplicitNoise
from lightning_dropreg.cli.machine import describe_machine
from lightning_dropreg.cli.measure import ProcessorTime
from lightning_dropreg.cli.summary import FitSummary
from lightning_dropreg.errors import DropregError

NETWORKS = {
    "relu": lambda: ReLUNet(width=256),
    "conv": lambda: ConvNet(channels=8),
}
HOW = {
    "antithetic": {"estimator": "antithetic"},
    "antithetic, 1/4": {"estimator": "antithetic", "batch_fraction": 0.25},
    "forward": {"estimator": "forward"},
}
METHODS = {
    "dropout": list,
    **{f"R, {name}": lambda how=how: [ExplicitPenalty(**how)] for name, how in HOW.items()},
    **{f"A2, {name}": lambda how=how: [ExplicitPenalty(**how), ImplicitNoise(**how)] for name, how in HOW.items()},
}


def fit(network: str, method: str, seed: int, epochs: int) -> dict[str, float] | None:
    """Train once; None where the model is refused."""
    L.seed_everything(seed, verbose=False)
    model, summary, watch = NETWORKS[network](), FitSummary(), ProcessorTime()
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*METHODS[method](), summary, watch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, datamodule=Digits(batch_size=128, rows=768, label_noise=0.4, seed=seed))
    except DropregError as error:
        print(f"{network}, {method}, seed {seed}: {error}")
        return None
    result = summary.result
    return {"best": result.best, "epoch": result.best_epoch, "ms": statistics.median(watch.ms)}


def show(runs: dict[str, dict[str, list[dict[str, float] | None]]]) -> None:
    for network, methods in runs.items():
        print(f"{network}: best validation loss, minus dropout (paired), epoch, step as a ratio to dropout's")
        for method, found in methods.items():
            pairs = [(a, b) for a, b in zip(found, methods["dropout"], strict=True) if a and b]
            if len(pairs) < 2:
                continue
            less = [a["best"] - b["best"] for a, b in pairs]
            best, epoch = (statistics.mean(a[key] for a, _ in pairs) for key in ("best", "epoch"))
            error = statistics.stdev(less) / len(less) ** 0.5
            ratio = statistics.median(a["ms"] / b["ms"] for a, b in pairs)
            told = f"{best:.4f}  {statistics.mean(less):+.4f} ± {error:.4f}  {epoch:4.1f}  {ratio:.2f}"
            print(f"  {method:20} {told}  ({len(pairs)} seeds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    warnings.filterwarnings("ignore")
    runs: dict[str, dict[str, list[dict[str, float] | None]]] = {n: {m: [] for m in METHODS} for n in NETWORKS}
    for seed in range(options.seeds):
        for network in NETWORKS:
            for method, done in runs[network].items():
                done.append(fit(network, method, seed, options.epochs))
    show(runs)
    report = {"machine": describe_machine(ReLUNet(width=256)), "options": vars(options), "runs": runs}
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
