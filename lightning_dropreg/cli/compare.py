"""``dropreg compare``: run several configurations and put their results into one table."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich import get_console
from rich.table import Table

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.summary import FitResult
from lightning_dropreg.errors import DropregError, InvalidArgumentError

__all__ = ["main"]


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.

    Raises:
        InvalidArgumentError: If every run fails.
    """
    cut = list(args).index("--") if "--" in args else len(args)
    options = _parser().parse_args(args[:cut])
    results: dict[str, FitResult] = {}
    problems: dict[str, DropregError] = {}
    for config in options.configs:
        get_console().rule(config, style="dim")
        try:
            results[config] = DropregCLI(["fit", "--config", config, *args[cut + 1 :]]).fit_summary.result
        except DropregError as error:  # the other runs may have taken hours
            problems[config] = error
            get_console().print(f"failed: {error}", highlight=False, markup=False)
    if not results:
        raise InvalidArgumentError("every run failed, as said above.")
    if options.json:
        failed = {config: {"problem": str(error)} for config, error in problems.items()}
        print(json.dumps({config: asdict(result) for config, result in results.items()} | failed, indent=2))
    else:
        get_console().print(_table(results, problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dropreg compare",
        usage="dropreg compare FILE FILE ... [--json] [-- OPTIONS]",
        description="Run fit with each configuration file in turn and print one table of results.",
        epilog="Options after -- go to every run:  dropreg compare a.yaml b.yaml -- --seed_everything 2",
    )
    parser.add_argument("configs", nargs="+", metavar="FILE", help="Configuration file; the first is the reference.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    return parser


def _table(results: dict[str, FitResult], problems: dict[str, DropregError]) -> Table:
    reference = next(iter(results.values()))
    tests = list(dict.fromkeys(name for result in results.values() for name in result.test))
    table = Table(title="Comparison", title_justify="left")
    table.add_column("configuration", overflow="fold")
    for heading in (f"best {reference.metric}", "epoch", *tests, "ms per step", "wall-clock", "ratio"):
        table.add_column(heading, justify="right")
    for config, result in results.items():
        table.add_row(
            config,
            f"{result.best:.2f}",
            f"{result.best_epoch}/{result.epochs}",
            *(f"{result.test[name]:.2f}" if name in result.test else "" for name in tests),
            f"{result.ms_per_step:.1f}",
            f"{result.seconds:.1f} s",
            f"{result.seconds / reference.seconds:.2f}",
        )
    for config in problems:
        table.add_row(config, "failed")
    return table
