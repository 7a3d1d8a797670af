"""``dropreg audit``: dropout that does not do what it should, found on the first batch."""

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.markup import escape
from rich.table import Table

from lightning_dropreg.auditing import SEVERITIES, Finding, Findings, audit
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.step import FirstStep, look_at_first_batch

__all__ = ["main", "show_findings"]

_COLOURS = {"error": "red", "warning": "yellow", "note": "blue"}


def main(args: Sequence[str]) -> int:
    """Run the command; 1 if there is an error among the findings, else 0."""
    cli = DropregCLI(
        ["audit", *args],
        description="Measure on the first batch whether dropout does what it should: reached, off in evaluation, with "
        "the right rate and scale, with a new mask every time, and say what was looked at. The exit status is 1 if an "
        "error is found.",
        add_options=_add_options,
    )
    found = look_at_first_batch(cli, lambda first: _audit(first, cli))
    if cli.config["json"]:
        print(json.dumps([finding.as_dict() for finding in found], indent=2))
    else:
        show_findings(found, type(cli.model).__name__)
    return int(any(finding.severity == "error" for finding in found))


def _add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def _audit(first: FirstStep, cli: DropregCLI) -> Findings:
    with first.trainer.precision_plugin.train_step_context():
        return audit(first.model, first.args[0], validation_batch=_validation_batch(first, cli))


def _validation_batch(first: FirstStep, cli: DropregCLI) -> Any:
    source: Any = cli.datamodule if cli.datamodule is not None else cli.model
    try:
        loader = source.val_dataloader()
        batch = next(iter(loader[0] if isinstance(loader, (list, tuple)) else loader))
    except Exception:  # a configuration without validation data is audited without
        return None
    return first.trainer.strategy.batch_to_device(batch)


def show_findings(found: Sequence[Finding], name: str) -> None:
    """Print findings as a table, and below it what was looked at."""
    console = get_console()
    counts = ", ".join(
        f"{n} {severity}{'s' * (n != 1)}"
        for severity in SEVERITIES
        for n in [sum(finding.severity == severity for finding in found)]
    )
    if found:
        table = Table(title=f"Dropout in {name}", title_justify="left", show_lines=True)
        table.add_column("finding", no_wrap=True)
        table.add_column("where, evidence, repair", overflow="fold")
        for finding in found:
            colour = _COLOURS[finding.severity]
            table.add_row(
                f"[{colour}]{finding.severity}[/]\n{finding.id}",
                f"[bold]{escape(finding.where)}[/]\n{escape(finding.evidence)}\n-> {escape(finding.repair)}",
            )
        console.print(table)
    console.print(f"{name}: {counts}.", highlight=False)
    if isinstance(found, Findings):
        console.print(f"{found.coverage}", highlight=False, markup=False)
