"""``dropreg diagnose``: what does dropout do to a model, on one batch, and do the approximations hold there?"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.methods import REFERENCE
from lightning_dropreg.cli.step import look_at_first_step
from lightning_dropreg.diagnostics import Diagnosis, measure_effect, measure_noise, read, show
from lightning_dropreg.diagnostics.diagnosis import TOLERANCE, check_tolerance
from lightning_dropreg.diagnostics.effect import MIN_DRAWS
from lightning_dropreg.diagnostics.noise import NOISE_STEP
from lightning_dropreg.diagnostics.statistics import check_confidence
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.functional import check_count
from lightning_dropreg.isolation import Isolation
from lightning_dropreg.kinks import EXCESS, REMEDY, noise_excess

__all__ = ["main"]

SEED = 0


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.
    """
    cli = DropregCLI(["diagnose", *args], description=__doc__, add_options=_add_options)
    options = cli.config
    check_count("draws", options["draws"], MIN_DRAWS)
    check_confidence(options["confidence"])
    check_tolerance(options["tolerance"])
    costs = _read_costs(options["bench"], cli.model) if options["bench"] else None
    if options["figures"]:
        from lightning_dropreg.diagnostics.figures import need_matplotlib

        need_matplotlib()  # before minutes of measuring
    diagnosis, excess = look_at_first_step(cli, lambda model, closure: _diagnose(model, closure, options))
    lines = [*read(diagnosis, costs), *_kinks(excess), _scope(options["ckpt_path"])]
    if options["json"]:
        print(json.dumps({**diagnosis.as_dict(), "costs": costs, "reading": lines}, indent=2))
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
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")


def _diagnose(model: LightningModule, closure: Callable[[], Tensor], options: Any) -> tuple[Diagnosis, float | None]:
    draws, confidence, noise, excess = options["draws"], options["confidence"], None, None
    generator = torch.Generator().manual_seed(SEED)
    rounds = 1 + len(options["sweep"]) + options["noise"]
    with _progress(draws * rounds, shown=not options["json"]) as advance:
        common: dict[str, Any] = {
            "draws": draws,
            "confidence": confidence,
            "generator": generator,
            "on_draw": advance,
        }
        effect = measure_effect(closure, per_site=options["sites"], module=model, **common)
        sweep = tuple(
            (q, measure_effect(closure, per_site=False, drop_prob=q, module=model, **common)) for q in options["sweep"]
        )
        if options["noise"]:
            noise = measure_noise(closure, model, **common)
            trained = [p for p in model.parameters() if p.requires_grad]
            with Isolation(model) as isolation:
                excess = noise_excess(lambda: isolation.run(closure, trace=False), trained, step_size=NOISE_STEP)
    return Diagnosis(effect, noise, sweep, options["tolerance"]), excess


def _kinks(excess: float | None) -> list[str]:
    if excess is None or excess <= EXCESS:
        return []
    return [
        f"This xi_approx is that of the antithetic estimator with step_size={NOISE_STEP}. The network has kinks, and "
        f"so its norm is {excess:.2f} times that of the definition. {REMEDY}"
    ]


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """Show a bar on a terminal; nothing in a pipe.

    Yields:
        What advances the bar by one draw.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("draws", total=total)
        yield lambda: bar.advance(task)


def _read_costs(path: str, model: LightningModule) -> dict[str, float]:
    """Read the ratios of ``dropreg bench --json``.

    Returns:
        Cost of a step by method, dropout being 1.

    Raises:
        InvalidArgumentError: If the file is not there, is something else, or is of another model.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        measured = report["machine"]["parameters"]
        ratio = f"ratio_to_{REFERENCE}"
        costs = {cost["method"]: float(cost[ratio]) for cost in report["costs"] if cost.get(ratio) is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"--bench {path} is not what dropreg bench --json writes: {error!r}.") from error
    parameters = sum(p.numel() for p in model.parameters())
    if measured != parameters:
        raise InvalidArgumentError(
            f"--bench {path} was measured on a model of {measured} parameters, this one has {parameters}: costs are "
            "only shown for the model they were measured on."
        )
    return costs


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
