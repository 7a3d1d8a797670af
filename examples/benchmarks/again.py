"""Measurements that are one file each: the command that makes each, and running it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .records import ROOT

__all__ = ["COMMANDS", "measure_again"]

BENCH = "-m lightning_dropreg bench --json --config configs/"
PAPER = (
    "--repeats 4 --steps 4 "
    "--methods none,bare,alg2,alg2_eco,alg2_after,alg2_after_eco,r,r_eco,r_every4,noise,k4,alg2_paper"
)
QUICK = "--repeats 8 --steps 6 --methods none,bare,alg2,alg2_eco,r,r_eco,r_every4"
KINKS = "--threads 1 --processor_time --repeats 5 --methods none,alg2_quarter,alg2_anti,alg2_fwd,r_quarter,r_anti,r_fwd"
COMPILED = "--threads 1 --methods none,alg2_anti,alg2_lean,alg2_eco,noise,k4 --compile default --memory"
TINY = (
    "--repeats 30 --steps 20 --methods none,bare --data.batch_size=2 --data.window=5 --data.vocab_size=50 "
    "--model.vocab_size=50 --model.embedding_dim=8 --model.hidden_dim=8"
)
COMMANDS = {
    "bench_lstm.json": f"{BENCH}bench/lstm.yaml {PAPER}",
    "bench_transformer.json": f"{BENCH}bench/transformer.yaml {PAPER}",
    "bench_quickstart.json": f"{BENCH}quickstart.yaml {QUICK}",
    "bench_mlp.json": f"{BENCH}bench/mlp.yaml {KINKS} --steps 6",
    "bench_mlp256.json": f"{BENCH}bench/mlp.yaml {KINKS} --steps 12 --model.width=256",
    "bench_conv.json": f"{BENCH}bench/conv.yaml {KINKS} --steps 6",
    "bench_conv8.json": f"{BENCH}bench/conv.yaml {KINKS} --steps 12 --model.channels=8",
    "bench_transformer_compiled.json": f"{BENCH}bench/transformer.yaml {COMPILED}",
    "bench_interception.json": f"{BENCH}quickstart.yaml {TINY}",
    "memory_lstm.json": f"{BENCH}bench/lstm.yaml --memory",
    "fraction.json": "-m examples.benchmarks.fraction",
    "r_drop_ratio.json": "-m examples.benchmarks.r_drop_ratio",
    "small_step.json": "examples/benchmarks/small_step.py 30",
    "cost_of_watching.json": "examples/benchmarks/cost_of_watching.py configs/quickstart.yaml",
}
"""File beside this one: what Python is given to make it. Those of ``bench`` print it, the others write it."""


def measure_again(name: str, folder: Path) -> None:
    """Make a file of `COMMANDS` again; what was there is replaced.

    Args:
        name: Of the file.
        folder: Where it is.

    Raises:
        subprocess.CalledProcessError: If its command fails; what was there stays.
    """
    command = [sys.executable, *COMMANDS[name].split()]
    prints = "bench" in command
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE if prints else None)
    if prints:
        (folder / name).write_text(done.stdout[done.stdout.index("{") :], encoding="utf-8")
