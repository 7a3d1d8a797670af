"""What it costs to put a step's state back and to watch that it can be repeated, as a share of one run.

    python examples/benchmarks/cost_of_watching.py configs/quickstart.yaml configs/bench/transformer.yaml

One run of Algorithm 2 for each configuration, on one thread. Processor time is taken around what is watched and around
every training step of the same run, so both see the same machine. Looks at steps 1, 2, 4, … get rarer; what a run of
`STEPS` steps pays for them follows from the mean cost of a look. Written to cost_of_watching.json.
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
from lightning_dropreg.passes import isolation
from lightning_dropreg.session import arguments, looking

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


def measure(config):
    cli = DropregCLI(["bench", "--config", config])
    steps, looks, structure, batches, reach, repeated = [], [], [], [], [], []
    marks = []

    class Marks(Callback):
        """Tells which part of the times belongs to which step."""

        def on_train_batch_end(self, *_):
            marks.append((len(structure), len(batches)))

    def of_steps(spent, which):
        ends = [0, *(mark[which] for mark in marks)]
        return [sum(spent[a:b]) for a, b in itertools.pairwise(ends)]

    callbacks = [ExplicitPenalty(strength=2.0), ImplicitNoise(), Marks()]
    options = {**QUIET_TRAINER, "max_steps": MEASURED, "max_epochs": -1}
    trainer = cli.instantiate_trainer(callbacks=callbacks, **options)
    run = type(trainer.fit_loop.epoch_loop)
    with contextlib.ExitStack() as stack:
        for target, name, spent in (
            (run, "advance", steps),
            (looking.Looks, "watch", looks),
            (isolation.Holders, "__init__", structure),
            (isolation.Holders, "again", structure),
            (isolation.Structure, "restore", structure),
            (arguments, "fresh_batch", batches),
            (arguments.Arguments, "_check", batches),
            (looking, "Reach", reach),
            (looking, "measure_repeatability", repeated),
        ):
            stack.enter_context(patched(target, name, spent))
        trainer.fit(cli.model, datamodule=cli.datamodule)
    step = sorted(steps[3:])[len(steps[3:]) // 2]  # the first ones warm up
    structure, batches = (statistics.median(of_steps(*each)[3:]) for each in ((structure, 0), (batches, 1)))
    every = structure + batches
    looks = [seconds for seconds in looks if seconds > step / 100]  # in all other steps there is nothing to watch
    look = statistics.mean(looks)
    share = {n: (every + look * (2 + math.floor(math.log2(n))) / n) / step for n in STEPS}
    return {
        "machine": describe_machine(cli.model),
        "steps measured": len(steps),
        "seconds of a step": step,
        "seconds of putting hooks and structure back, a step": structure,
        "seconds of copying and checking the batch's containers, a step": batches,
        "seconds of a look": look,
        "of it, of going through what the step can reach": statistics.median(reach),
        "of it, of running the step twice": statistics.median(repeated),
        "looks": len(looks),
        "share of all in a run of so many steps": share,
        "share of the looks in a run of so many steps": {
            n: look * (2 + math.floor(math.log2(n))) / n / step for n in STEPS
        },
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {config: measure(config) for config in sys.argv[1:]}
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(target.read_text())
