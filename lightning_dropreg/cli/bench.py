"""``dropreg bench``: what does one optimization step cost with each method?"""

import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.machine import describe_machine
from lightning_dropreg.cli.measure import Cost, MemoryWatch, PassCounter, ProcessorTime, Stopwatch, without_dropout
from lightning_dropreg.cli.methods import CONFIGURED, KEYS, METHODS, NO_DROPOUT, PAPER, REFERENCE, named
from lightning_dropreg.cli.step import QUIET_TRAINER, load_weights, placing
from lightning_dropreg.errors import CompiledPartWarning, DropregError, InvalidArgumentError
from lightning_dropreg.mixins import without_mixins
from lightning_dropreg.numerics.context import patched
from lightning_dropreg.numerics.torch_private import many_graphs
from lightning_dropreg.session.base import RegularizerCallback
from lightning_dropreg.session.looking import Looks

__all__ = ["main", "measure"]


def main(args: Sequence[str]) -> None:
    """Run the command."""
    cli = DropregCLI(["bench", *args], description=(__doc__ or "").replace("``", "`"), add_options=_add_options)
    options = cli.config
    if options["repeats"] < 1 or options["steps"] < 2 or options["warmup"] < 0:
        raise InvalidArgumentError(
            "bench needs --repeats of at least 1, --steps of at least 2, --warmup of at least 0."
        )
    if options["methods"]:
        options["methods"] = named([options["methods"]] if isinstance(options["methods"], str) else options["methods"])
    if options["threads"] is not None and options["threads"] < 1:
        raise InvalidArgumentError(f"--threads {options['threads']}: at least 1 is needed.")
    if options["processor_time"] and (options["threads"] != 1 or cli.model.device.type != "cpu"):
        raise InvalidArgumentError("--processor_time counts all threads together: give --threads 1, on a CPU.")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    load_weights(cli)
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")  # as meant
    if options["memory_of"]:
        print(json.dumps(_peak_memory(cli, options["memory_of"], options["compile"])))
        return
    machine = describe_machine(cli.model)
    costs = measure(cli, options)
    if options["memory"]:
        _measure_memory(costs, args)
    if options["json"]:
        print(json.dumps({"machine": machine, "costs": [_as_dict(cost, costs) for cost in costs]}, indent=2))
    else:
        _print(costs, machine, options)


def _add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="Rounds; in each, every method runs once.")
    parser.add_argument("--steps", type=int, default=12, help="Timed steps of each method in a round, at least 2.")
    parser.add_argument("--warmup", type=int, default=3, help="Steps before them that are not timed.")
    parser.add_argument("--threads", type=int | None, default=None, help="Threads of torch; its own choice by default.")
    parser.add_argument(
        "--processor_time",
        action="store_true",
        help="Time by the processor's clock, on a machine that has other things to do (no GPU; --threads 1).",
    )
    parser.add_argument(
        "--methods",
        type=str | list[str] | None,
        default=None,
        help="Methods to measure besides dropout, with commas between them; all by default. "
        + "; ".join(f"{key}: {name}" for name, key in KEYS.items()),
    )
    parser.add_argument(
        "--memory", action="store_true", help="Measure peak memory too, each method in a process of its own."
    )
    parser.add_argument(
        "--compile",
        type=str | None,
        default=None,
        help="Measure every method with the model compiled, too: a mode of torch.compile (default, reduce-overhead, "
        "...) or a backend (inductor, aot_eager, ...).",
    )
    parser.add_argument("--memory_of", type=str | None, default=None, help="Print the peak memory of one method.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def measure(cli: DropregCLI, options: Any) -> list[Cost]:
    """Time one optimization step with several methods, interleaved.

    Args:
        cli: The configured command.
        options: ``repeats``, ``steps``, ``warmup``, ``methods`` and perhaps ``compile``, as on the command line.

    Returns:
        What each method costs, dropout among them.
    """
    repeats, steps, warmup = options["repeats"], options["steps"], options["warmup"]
    weights = deepcopy(cli.model.state_dict())
    batches = _batches(cli, max(steps + warmup, 2))
    chosen = [m for m in METHODS if options["methods"] is None or m == REFERENCE or m in options["methods"]]
    if CONFIGURED in (options["methods"] or ()):
        chosen.append(CONFIGURED)
    costs = [Cost(method) for method in chosen]
    how = options.get("compile")
    for cost in costs if how else ():
        cost.compiled = Cost(cost.method)
    with (
        many_graphs() if how else nullcontext(),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as progress,
    ):
        task = progress.add_task("", total=len(costs) * (repeats + 1) * (2 if how else 1))
        nodes: dict[str, PassCounter] = {}
        for turn in range(-1, repeats):
            # Interleaved, and in another order every round: a machine that gets slower slows every method alike.
            for cost in costs[turn % len(costs) :] + costs[: turn % len(costs)]:
                for one in filter(None, (cost, cost.compiled)):
                    progress.update(task, description=one.method, advance=1)
                    if one.problem:
                        continue
                    cli.model.load_state_dict(weights)
                    try:
                        if turn < 0 and one is cost:
                            nodes[cost.method] = _count_passes(cli, cost.method, batches)
                            continue
                        watch = ProcessorTime() if options.get("processor_time") else Stopwatch()
                        with compiled(cli.model, how) if one is not cost else nullcontext():
                            _run(cli, one.method, batches, watch, 2 if turn < 0 else steps + warmup)
                        if turn < 0:
                            one.compile_s = sum(watch.ms) / 1000
                        else:
                            one.rounds.append(watch.ms[warmup:])
                    except (DropregError, CompiledPartWarning) as error:
                        one.problem = str(error)
    _fill_in_passes(costs, nodes)
    return costs


@contextmanager
def compiled(model: LightningModule, how: str) -> Iterator[None]:
    """Compile a module in place for the length of a ``with``; a part that runs uncompiled is an error."""
    modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    model.compile(**{"mode" if how in modes else "backend": how})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", CompiledPartWarning)
            yield
    finally:
        model._compiled_call_impl = None


def _run(cli: DropregCLI, method: str, batches: DataLoader[Any], watch: Callback, steps: int) -> None:
    trainer = cli.instantiate_trainer(
        callbacks=[*(placing(cli) if method != NO_DROPOUT else ()), *_callbacks(cli, method), watch],
        **{**QUIET_TRAINER, "limit_train_batches": steps, "log_every_n_steps": 1000},
    )
    own = nullcontext() if method == CONFIGURED else without_mixins(cli.model)
    with own, without_dropout(cli.model) if method == NO_DROPOUT else nullcontext():
        Looks.again = False
        try:
            trainer.fit(cli.model, train_dataloaders=batches)
        finally:
            Looks.again = True


def _callbacks(cli: DropregCLI, method: str) -> list[Callback]:
    if method != CONFIGURED:
        return METHODS[method]()
    mine: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return [deepcopy(callback) for callback in mine if isinstance(callback, RegularizerCallback)]


def _count_passes(cli: DropregCLI, method: str, batches: DataLoader[Any]) -> PassCounter:
    counter, step = PassCounter(), cli.model.training_step
    with patched((cli.model, "training_step", functools.wraps(step)(counter.count(step)))):
        _run(cli, method, batches, counter, 2)
    return counter


def _fill_in_passes(costs: list[Cost], counters: dict[str, PassCounter]) -> None:
    """Count backward passes by executions of the node that takes most of the reference's backward."""
    reference = counters.get(REFERENCE)
    for cost in costs:
        counter = counters.get(cost.method)
        if counter is None:
            continue
        cost.forwards, cost.uses = counter.forwards, counter.uses
        if reference is not None and counter.nodes[reference.heaviest]:
            cost.backwards = counter.nodes[reference.heaviest] / reference.nodes[reference.heaviest]


def _measure_memory(costs: list[Cost], args: Sequence[str]) -> None:
    # glibc keeps freed memory, in pieces that depend on the order of all allocations; told to give it back at once,
    # it makes the resident size what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for cost in costs:
        for one in filter(None, (cost, cost.compiled)):
            if one.problem:
                continue
            more = [f"--memory_of={one.method}", *(["--compile=null"] if one is not cost.compiled else [])]
            command = [sys.executable, "-m", "lightning_dropreg", "bench", *args, *more]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode == 0:
                one.peak_mb = json.loads(done.stdout.splitlines()[-1])


def _peak_memory(cli: DropregCLI, method: str, how: str | None) -> float | None:
    batches = _batches(cli, 4)
    watch = MemoryWatch()
    with compiled(cli.model, how) if how else nullcontext():
        if how:  # the compiler's own memory is no part of a step's
            _run(cli, method, batches, Stopwatch(), 4)
        _run(cli, method, batches, watch, 4)
    return watch.peak_mb


def _batches(cli: DropregCLI, count: int) -> DataLoader[Any]:
    """Read the batches that every method gets, as the configured loader gives them, again where it ends."""
    seen: list[Any] = []

    class Reader(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not isinstance(trainer.train_dataloader, Iterable) or isinstance(trainer.train_dataloader, dict):
                raise InvalidArgumentError("bench needs one training data loader, not a collection of them.")
            seen.extend(islice(trainer.train_dataloader, count))

    trainer = cli.instantiate_trainer(callbacks=[Reader()], **{**QUIET_TRAINER, "limit_train_batches": 1})
    with without_mixins(cli.model):
        trainer.fit(cli.model, datamodule=cli.datamodule)
    if not seen:
        raise InvalidArgumentError("The training data has no batch.")
    again = [seen[number % len(seen)] for number in range(count)]
    return DataLoader(cast("Dataset[Any]", again), batch_size=None, collate_fn=lambda batch: batch)


def _as_dict(cost: Cost, costs: Sequence[Cost]) -> dict[str, object]:
    twin = {"compiled": None}
    if cost.compiled is not None:
        twins = [one.compiled for one in costs if one.compiled is not None]
        twin = {"compiled": _as_dict(cost.compiled, twins)}  # type: ignore[dict-item]
    if cost.problem or not cost.rounds:
        return {**asdict(cost), **twin}
    low, median, high = cost.quantiles()
    ratios = {f"ratio_to_{name}": _ratio(cost, costs, name) for name in (REFERENCE, NO_DROPOUT, PAPER)}
    times = {"key": KEYS[cost.method], "median_ms": median, "quartiles_ms": [low, high]}
    return {**times, **ratios, **asdict(cost), **twin}


def _ratio(cost: Cost, costs: Sequence[Cost], name: str = REFERENCE) -> float | None:
    reference = next((c for c in costs if c.method == name and c.rounds and not c.problem), None)
    return None if reference is None else cost.ratio(reference)


def _print(costs: Sequence[Cost], machine: dict[str, str | int], options: Any) -> None:
    table = Table(title="One optimization step", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("method", overflow="fold")
    memory = any(cost.peak_mb is not None for cost in costs)
    twins = [cost.compiled for cost in costs if cost.compiled is not None]
    more = ["MiB"] if memory else []
    headings = ["ms", "ratio", *more, "compiled", "ratio", "first 2", *more] if twins else []
    headings = headings or ["ms", "quartiles", "ratio", "passes", *more]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    problems: list[str] = []
    for cost in costs:
        key = KEYS[cost.method]
        if cost.problem:
            table.add_row(key, cost.method, "", _no(cost.problem, problems))
            continue
        low, median, high = cost.quantiles()
        quartiles = f"{_digits(low)}-{_digits(high)}"
        ratio = _number(_ratio(cost, costs))
        cells = [_digits(median), ratio] if twins else [_digits(median), quartiles, ratio, _passes(cost)]
        if memory:
            cells.append("" if cost.peak_mb is None else f"{cost.peak_mb:.0f}")
        if cost.compiled is not None:
            cells += _compiled_cells(cost.compiled, twins, problems, memory)
        table.add_row(key, cost.method, *cells)
    console = get_console()
    console.print(table)
    done = [cost for cost in costs if not cost.problem]
    for line in _uses(done):
        console.print(line, highlight=False, markup=False)
    for number, problem in enumerate(problems, 1):
        console.print(f"({number}) {problem}", highlight=False, markup=False)
    console.print(
        f"{options['repeats']} rounds of {options['steps']} steps after {options['warmup']} untimed ones, methods "
        "interleaved, the same weights and batches for all. ms: median; ratio: to a dropout step (means of a round, "
        "median over rounds); passes: forward + backward"
        + ("; MiB: peak of the steps above what was there before" if memory else "")
        + ("; compiled: ms, ratio to a compiled dropout step, first two steps with compiling" if twins else "")
        + ".\n"
        + "  ".join(f"{name}: {value}" for name, value in machine.items() if value),
        highlight=False,
    )


def _compiled_cells(cost: Cost, twins: Sequence[Cost], problems: list[str], memory: bool) -> list[str]:
    if cost.problem:
        return [_no(cost.problem, problems)]
    cells = [_digits(cost.quantiles()[1]), _number(_ratio(cost, twins)), f"{cost.compile_s:.0f} s"]
    return [*cells, "" if cost.peak_mb is None else f"{cost.peak_mb:.0f}"] if memory else cells


def _no(problem: str, problems: list[str]) -> str:
    """Say that there is no cost, and by its number why; a reason is told once."""
    problems += [] if problem in problems else [problem]
    return f"no ({problems.index(problem) + 1})"


def _digits(ms: float) -> str:
    """Three significant digits, however short a step is."""
    return f"{ms:#.3g}".rstrip(".") if ms < 1000 else f"{ms:.0f}"


def _uses(costs: Sequence[Cost]) -> list[str]:
    """Say which kernels the steps use: what most do, and what differs."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for cost in costs:
        groups.setdefault(tuple(cost.uses), []).append(KEYS[cost.method])
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        f"uses: {', '.join(uses) or 'no fused kernels'}{f' ({chr(44).join(keys)})' if number else ''}"
        for number, (uses, keys) in enumerate(ordered)
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _passes(cost: Cost) -> str:
    backwards = "?" if cost.backwards is None else f"{cost.backwards:.3g}"
    return f"{cost.forwards}+{backwards}"
