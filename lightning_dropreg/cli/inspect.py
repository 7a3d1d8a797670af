"""``dropreg inspect``: which dropout sites does a training step reach?"""

import json
from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.table import Table

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.step import look_at_first_step
from lightning_dropreg.functional import find_sites
from lightning_dropreg.sites import Site

__all__ = ["main"]


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.
    """
    cli = DropregCLI(
        ["inspect", *args],
        description="List the dropout sites that the first training step of a configuration reaches.",
        add_options=_add_options,
    )
    sites = look_at_first_step(cli, lambda model, closure: find_sites(closure, module=model))
    if cli.config["json"]:
        print(json.dumps([_as_dict(site) for site in sites], indent=2))
    else:
        _print(sites, cli.model)


def _add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def _as_dict(site: Site) -> dict[str, object]:
    return {
        "name": site.name,
        "drop_prob": site.p,
        "shape": list(site.shape),
        "mask_shape": list(site.mask_shape),
        "kind": site.kind,
    }


def _print(sites: Sequence[Site], model: LightningModule) -> None:
    name = type(model).__name__
    if not sites:
        get_console().print(f"No dropout with a positive drop probability is reached in {name}.training_step.")
        return
    table = Table(title=f"{len(sites)} dropout sites in {name}.training_step", title_justify="left")
    for heading in ("site", "drop prob.", "shape", "mask shape", "kind"):
        table.add_column(heading, justify="right" if heading == "drop prob." else "left", overflow="fold")
    for site in sites:
        table.add_row(site.name, f"{site.p:g}", _shape(site.shape), _shape(site.mask_shape), site.kind)
    get_console().print(table)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
