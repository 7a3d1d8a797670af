"""``dropreg diagnose``: what does dropout do to a model, on one batch, and do the approximations hold there?"""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_dropreg.checks import check_count, make_directory, need_matplotlib
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.bench import measure
from lightning_dropreg.cli.measure import Cost
from lightning_dropreg.cli.methods import CLOSING, CONFIGURED, REFERENCE
from lightning_dropreg.cli.step import FirstStep, look_at_first_batch
from lightning_dropreg.diagnostics import (
    Costs,
    Diagnosis,
    measure_effect,
    measure_noise,
    measure_penalty,
    read,
    recommend_strength,
    show,
)
from lightning_dropreg.diagnostics.diagnosis import TOLERANCE, check_tolerance
from lightning_dropreg.diagnostics.noise import NOISE_STEP, NoiseReport, measure_batch_noise
from lightning_dropreg.diagnostics.numbers import common_exponent, with_margin
from lightning_dropreg.diagnostics.sampling import MIN_DRAWS
from lightning_dropreg.diagnostics.statistics import check_confidence
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.inspection.kinks import EXCESS, REMEDY, noise_excess
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.session.configured import Configured, configured

__all__ = ["main"]

SEED = 0
BATCHES = 8
"""Beside which the noise of dropout is set."""
ROUNDS = {"repeats": 3, "steps": 4, "warmup": 1}
"""Of the closing costs: enough to tell twice from thrice."""


def main(args: Sequence[str]) -> None:
    """Run the command."""
    cli = DropregCLI(["diagnose", *args], description=(__doc__ or "").replace("``", "`"), add_options=_add_options)
    options = cli.config
    check_count("draws", options["draws"], MIN_DRAWS)
    check_confidence(options["confidence"])
    check_tolerance(options["tolerance"])
    for q in options["sweep"]:  # before minutes of measuring
        if not 0 < q < 1:
            raise InvalidArgumentError(f"--sweep: drop_prob={q!r} must be a number in (0, 1).")
    if options["bench"] and options["no_costs"]:
        raise InvalidArgumentError("--bench FILE shows costs and --no-costs leaves them out: give one of them.")
    costs = _read_costs(options["bench"], cli.model) if options["bench"] else None
    if options["figures"]:
        need_matplotlib()  # before minutes of measuring
        make_directory("figures", options["figures"])
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    diagnosis, trained, excess, drawing = look_at_first_batch(cli, lambda first: _diagnose(first, callbacks, options))
    told = costs or ("not measured" if options["no_costs"] else _measure_costs(cli, trained))
    lines = [*_true_noise(trained), *read(diagnosis, told), *_kinks(excess), *drawing, _scope(options["ckpt_path"])]
    lines.append(recommend_strength(diagnosis.effect, trained=bool(options["ckpt_path"])))
    if options["json"]:
        found = None if isinstance(told, str) else asdict(told)
        print(json.dumps({**diagnosis.as_dict(), "costs": found, "reading": lines}, indent=2))
    else:
        show(get_console(), diagnosis, lines)
    if options["figures"]:
        _draw(diagnosis, Path(options["figures"]), quiet=options["json"])


def _add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument(
        "--draws", type=int, default=32, help=f"Draws of dropout for every number, at least {MIN_DRAWS}."
    )
    parser.add_argument("--sites", type=bool, default=True, help="Whether to look at every site alone too.")
    parser.add_argument("--noise", type=bool, default=True, help="Whether to look at the gradient noise.")
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=[], help="Drop probabilities to try, at all sites together."
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="Confidence of the intervals.")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="R_approx is trusted if it differs from R_drop by less than this fraction of R_drop.",
    )
    parser.add_argument("--figures", type=str | None, default=None, help="Directory for figures (PNG and SVG).")
    parser.add_argument(
        "--bench", type=str | None, default=None, help="Output of dropreg bench --json for this model: shows the costs."
    )
    parser.add_argument(
        "--no-costs",
        action="store_true",
        help="Do not measure what a step costs with each method, which takes ~100 steps.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")


def _diagnose(
    first: FirstStep, callbacks: Sequence[Any], options: Any
) -> tuple[Diagnosis, Configured, float | None, list[str]]:
    model, closure = first.model, first.loss
    draws, noise, penalty, excess = options["draws"], None, None, None
    drawing: list[str] = []
    trained = configured([*callbacks, *first.callbacks], first.trainer, model, closure)
    generator = torch.Generator().manual_seed(SEED)
    rounds = 1 + len(options["sweep"]) + options["noise"] + (trained.penalty is not None)
    with _progress(draws * rounds, shown=not options["json"]) as advance:
        common: dict[str, Any] = {
            "draws": draws,
            "confidence": options["confidence"],
            "generator": generator,
            "module": model,
            "on_draw": advance,
        }
        effect = measure_effect(closure, per_site=options["sites"], **common)
        sweep = tuple((q, measure_effect(closure, per_site=False, drop_prob=q, **common)) for q in options["sweep"])
        if options["noise"]:
            noise = measure_noise(closure, **trained.noise, **common)
            excess = _excess(model, closure, trained)
            drawing = _drawing(first, noise)
        if trained.penalty is not None and not effect.problem:
            penalty = measure_penalty(closure, **trained.penalty, **common)
    return Diagnosis(effect, noise, sweep, options["tolerance"], penalty=penalty), trained, excess, drawing


def _drawing(first: FirstStep, noise: NoiseReport) -> list[str]:
    """Set the noise of drawing batches beside that of dropout: what averaging and `ImplicitNoise` can change."""
    loader = first.trainer.train_dataloader
    try:
        batches = list(itertools.islice(loader, BATCHES)) if isinstance(loader, Iterable) else []
    except TypeError:
        return []
    if len(batches) < BATCHES:
        return []  # the first few are most of the data: hardly noise
    moved = [first.trainer.strategy.batch_to_device(batch) for batch in batches]
    closures = [replace(first, args=(batch, *first.args[1:])).loss for batch in moved]
    drawn, dropped = measure_batch_noise(closures, first.model, noise.confidence), noise.trace_drop()
    total = drawn.value + dropped.value
    if not total > 0:
        return []
    exponent = common_exponent([drawn, dropped])
    traces = [f"{with_margin(one, exponent)}{f'e{exponent}' if exponent else ''}" for one in (dropped, drawn)]
    share = f"{100 * dropped.value / total:.0f} %"
    return [
        f"When the noise helps: dropout makes {share} of the gradient's noise (trace of its covariance {traces[0]}, "
        f"that of drawing batches {traces[1]}). MiniBatchDropout(k) leaves 1/k of dropout's, ImplicitNoise(strength=s) "
        "has s^2 times as much. Measured on digits, more noise helps at large batches or low rates, less at small "
        "batches and high rates; two short runs, with dropout and with MiniBatchDropout(4), tell which it is here."
    ]


def _excess(model: LightningModule, closure: Callable[[], Tensor], trained: Configured) -> float | None:
    """How many times larger than by the definition the noise is; None where it is by the definition."""
    if trained.noise.get("estimator", "antithetic") != "antithetic":
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    step_size = trained.noise.get("step_size", NOISE_STEP)
    with Isolation(model) as isolation:
        return noise_excess(lambda: isolation.run(closure, trace=False), parameters, step_size=step_size)


def _kinks(excess: float | None) -> list[str]:
    if excess is None or excess <= EXCESS:
        return []
    return [
        "This xi_approx is that of the antithetic estimator. The network has kinks, and so its norm is "
        f"{excess:.2f} times that of the definition. {REMEDY}"
    ]


def _true_noise(trained: Configured) -> list[str]:
    if trained.source != "dropout":
        return []
    return [
        "The configured noise is that of dropout itself (source='dropout'), xi_drop; xi_approx is not trained with."
    ]


def _measure_costs(cli: DropregCLI, trained: Configured) -> Costs | str:
    """Time the methods on the model, each a few times; or say why that cannot be measured."""
    methods = [*CLOSING, CONFIGURED] if trained.penalty or trained.source else CLOSING
    try:
        costs = measure(cli, {**ROUNDS, "methods": methods})
    except InvalidArgumentError as error:
        return f"not measured: {error}"
    [reference] = [cost for cost in costs if cost.method == REFERENCE]
    return f"not measured: {reference.problem}" if reference.problem else _told("measured here", costs)


def _told(where: str, costs: Sequence[Cost]) -> Costs:
    """What is told of costs: the ratio to dropout with its range over the rounds, or why there is none."""
    [reference] = [cost for cost in costs if cost.method == REFERENCE]
    ratios = {c.method: c.ratios(reference) for c in costs if c.rounds and not c.problem and c is not reference}
    refused = {cost.method: cost.problem for cost in costs if cost.problem}
    count = len(reference.rounds)
    rounds = f"{where}, {count} round{'s' * (count != 1)} of {len(reference.rounds[0])} steps"
    return Costs({name: (statistics.median(r), min(r), max(r)) for name, r in ratios.items()}, refused, rounds)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """Show a bar on a terminal, nothing in a pipe, and yield what advances it by one draw."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("draws", total=total)
        yield lambda: bar.advance(task)


def _read_costs(path: str, model: LightningModule) -> Costs:
    """Read the costs of ``dropreg bench --json``; refuse what is something else, or of another model."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        measured = report["machine"]["parameters"]
        costs = [Cost(cost["method"], cost["rounds"], problem=cost["problem"]) for cost in report["costs"]]
        told = _told(path, costs)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidArgumentError(f"--bench {path} is not what dropreg bench --json writes: {error!r}.") from error
    parameters = sum(p.numel() for p in model.parameters())
    if measured != parameters:
        raise InvalidArgumentError(
            f"--bench {path} was measured on a model of {measured} parameters, this one has {parameters}: costs are "
            "only shown for the model they were measured on."
        )
    return told


def _scope(checkpoint: str | None) -> str:
    where = f"the weights of {checkpoint}" if checkpoint else "the initial weights (give --ckpt_path for trained ones)"
    return (
        f"All of this holds for the first training batch and {where}. Which method trains the better model is not "
        "measured here."
    )


def _draw(diagnosis: Diagnosis, folder: Path, quiet: bool) -> None:
    from lightning_dropreg.diagnostics.figures import draw

    for path in draw([diagnosis], folder):
        if not quiet:
            print(f"figure: {path}")
