"""What it costs to put a step's state back and to watch that it can be repeated, as a share of one run.

    python examples/benchmarks/cost_of_watching.py configs/quickstart.yaml configs/bench/transformer.yaml

One run of Algorithm 2 for each configuration and each of two estimators, on one thread. Processor time is taken around
what is watched and around every training step of the same run, so both see the same machine. The first look comes once,
those at steps 1, 2, 4, … get rarer; what a run of `STEPS` steps pays follows from the first and the mean of the others.
Written to cost_of_watching.json.
"""

import contextlib
import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from lightning import Callback

from lightning_dropreg import ExplicitPenalty, ImplicitNoise
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.machine import describe_machine
from lightning_dropreg.cli.step import QUIET_TRAINER
from lightning_dropreg.inspection.assumptions import is_due
from lightning_dropreg.passes import isolation
from lightning_dropreg.session import arguments, looking

antithetic = sys.modules["lightning_dropreg.estimators.antithetic"]

STEPS, MEASURED = (1_000, 10_000, 100_000), 40


def timed(function, spent):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.process_time() - start)

    return wrapper


@contextlib.contextmanager
def patched(target, name, spent):
    own = getattr(target, name)
    setattr(target, name, timed(own, spent))
    try:
        yield
    finally:
        setattr(target, name, own)


def measure(config, estimator):
    cli = DropregCLI(["bench", "--config", config])
    steps, first, looks, runs, targets, structure, batches, reach = [], [], [], [], [], [], [], []
    watched = (structure, batches, looks, runs, targets)
    marks = []

    class Marks(Callback):
        """Tells which part of the times belongs to which step."""

        def on_train_batch_end(self, *_):
            marks.append(list(map(len, watched)))

    def of_steps(spent, which):
        ends = [0, *(mark[which] for mark in marks)]
        return [sum(spent[a:b]) for a, b in itertools.pairwise(ends)]

    callbacks = [ExplicitPenalty(strength=2.0, estimator=estimator), ImplicitNoise(estimator=estimator), Marks()]
    options = {**QUIET_TRAINER, "max_steps": MEASURED, "max_epochs": -1}
    trainer = cli.instantiate_trainer(callbacks=callbacks, **options)
    run = type(trainer.fit_loop.epoch_loop)
    with contextlib.ExitStack() as stack:
        for target, name, spent in (
            (run, "advance", steps),
            (looking.Looks, "inspect", first),
            (looking.Looks, "watch", looks),
            (looking.OwnRun, "__call__", runs),
            (antithetic, "check_fixed", targets),
            (isolation.Holders, "__init__", structure),
            (isolation.Holders, "again", structure),
            (isolation.Structure, "restore", structure),
            (arguments, "fresh_batch", batches),
            (arguments.Arguments, "_check", batches),
            (looking, "Reach", reach),
        ):
            stack.enter_context(patched(target, name, spent))
        trainer.fit(cli.model, datamodule=cli.datamodule)
    step = sorted(steps[3:])[len(steps[3:]) // 2]  # the first ones warm up
    of = [of_steps(spent, which) for which, spent in enumerate(watched)]
    structure, batches = (statistics.median(each[3:]) for each in of[:2])
    every = structure + batches
    looks = [sum(each[number] for each in of[2:]) for number in range(len(steps)) if is_due(number)]
    look = statistics.mean(looks)
    of_looks = {n: (first[0] + look * (1 + math.floor(math.log2(n)))) / n / step for n in STEPS}
    return {
        "machine": describe_machine(cli.model),
        "steps measured": len(steps),
        "seconds of a step": step,
        "seconds of putting hooks and structure back, a step": structure,
        "seconds of copying and checking the batch's containers, a step": batches,
        "seconds of the first look": first[0],
        "seconds of a later look": look,
        "of it, of going through what the step can reach": statistics.median(reach),
        "looks": len(looks),
        "share of all in a run of so many steps": {n: every / step + share for n, share in of_looks.items()},
        "share of the looks in a run of so many steps": of_looks,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {
        f"{config}, {estimator}": measure(config, estimator)
        for config in sys.argv[1:]
        for estimator in ("antithetic", "forward")
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(target.read_text())
