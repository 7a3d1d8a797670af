"""``dropreg diagnose``: on one batch, how far are the estimates from the explicit effect of dropout?"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.step import look_at_first_step
from lightning_dropreg.curvature import CURVATURES
from lightning_dropreg.errors import DropregError, InvalidArgumentError
from lightning_dropreg.functional import dropout_loss, explicit_penalty, plain_loss
from lightning_dropreg.isolation import Isolation

__all__ = ["main"]

# "exact" takes one backward pass per output: too slow for a vocabulary.
ESTIMATORS = ("antithetic", "forward", "double_backward")


class Row(NamedTuple):
    """One estimate: its mean over draws and the standard error of that mean."""

    name: str
    mean: float = math.nan
    error: float = math.nan
    problem: str = ""


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.

    Raises:
        InvalidArgumentError: If there are too few draws for a standard error.
    """
    cli = DropregCLI(["diagnose", *args], description=__doc__, add_options=_add_options)
    draws, curvature = cli.config["draws"], cli.config["curvature"]
    if draws < 2:
        raise InvalidArgumentError(f"--draws {draws}: at least 2 are needed for a standard error.")
    rows = look_at_first_step(cli, lambda model, closure: _diagnose(model, closure, draws, curvature))
    if cli.config["json"]:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    where = f"checkpoint {cli.config['ckpt_path']}" if cli.config["ckpt_path"] else "the initial weights"
    table = Table(title="Explicit effect of dropout on one batch", title_justify="left")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± std. error", justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        numbers = ("", "") if row.problem else (f"{row.mean:.5f}", f"{row.error:.5f}")
        table.add_row(row.name, *numbers, escape(row.problem))
    get_console().print(table)
    get_console().print(
        f"At {where}; {draws} draws each. R_approx is the second-order part of the true effect.", highlight=False
    )


def _add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=32, help="Draws of the noise for each estimate, at least 2.")
    parser.add_argument("--curvature", choices=list(CURVATURES), default="loss_hessian", help="Curvature in R_approx.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def _diagnose(model: LightningModule, closure: Callable[[], Tensor], draws: int, curvature: str) -> list[Row]:
    noise = torch.Generator().manual_seed(0)  # the global generator is set back before every draw
    with Isolation(model) as isolation:
        # Every draw starts from the same hidden state, batch statistics and random numbers.
        clean = isolation.run(lambda: plain_loss(closure).item())

        def true_effect() -> float:
            return isolation.run(lambda: dropout_loss(closure, generator=noise).item()) - clean

        def estimate(estimator: str) -> float:
            return isolation.run(
                lambda: explicit_penalty(
                    closure, curvature=curvature, estimator=estimator, generator=noise, module=model
                )
            ).item()

        rows = [_row("true: mean loss with dropout - loss", true_effect, draws)]
        rows += [_row(f"R_approx, {name}", partial(estimate, name), draws) for name in ESTIMATORS]
    return rows


def _row(name: str, draw: Callable[[], float], draws: int) -> Row:
    try:
        values = torch.tensor([draw() for _ in range(draws)], dtype=torch.float64)
    except DropregError as error:
        return Row(name, problem=str(error))
    return Row(name, values.mean().item(), values.std().item() / math.sqrt(draws))
