"""``dropreg inspect``: what is in a training step, which estimators can treat it, and what callbacks would do."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.markup import escape
from rich.table import Table

from lightning_dropreg.callbacks import ExplicitPenalty, ImplicitNoise, MiniBatchDropout
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.step import FirstStep, look_at_first_batch
from lightning_dropreg.errors import DropregError, LossNotRecognizedError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.inspection.assumptions import Measured, report
from lightning_dropreg.inspection.kinks import EXCESS, REMEDY
from lightning_dropreg.inspection.support import LossSupport, SiteSupport, Support
from lightning_dropreg.session.arguments import StepCall
from lightning_dropreg.session.base import RegularizerCallback
from lightning_dropreg.session.preview import NOISE_EXCESS, look, rehearse
from lightning_dropreg.step.description import describe

__all__ = ["main"]

_LETTERS = dict(zip(ESTIMATORS, "AFDE", strict=True))


@dataclass
class Outlook:
    """What some callbacks would do: their plan in words, and what came of it on the first batch."""

    callbacks: list[str]
    plan: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    warning: str = ""
    refused: str = ""
    assumptions: list[dict[str, object]] = field(default_factory=list)


@dataclass
class Findings:
    """All that the command tells; `configured`: whether the outlook is that of callbacks which are there."""

    support: Support
    configured: bool
    problems: list[str]
    outlooks: list[Outlook]


def main(args: Sequence[str]) -> None:
    """Run the command."""
    cli = DropregCLI(
        ["inspect", *args],
        description="List the dropout sites and losses of a configuration's first training step, which estimators "
        "can treat them, everything that stands in the way, and what its callbacks would do (those of this "
        "package; without any: what each of them would do). p is the drop probability, q in the paper.",
        add_options=_add_options,
    )
    configured: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    found = look_at_first_batch(cli, lambda first: _look(first, configured))
    if cli.config["json"]:
        print(json.dumps(_as_dict(found), indent=2))
    else:
        _print(found, cli.model)


def _add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")


def _look(first: FirstStep, configured: Sequence[Any]) -> Findings:
    ours = [callback for callback in configured if isinstance(callback, RegularizerCallback)] + first.callbacks
    each: list[RegularizerCallback] = [ExplicitPenalty(), ImplicitNoise(), MiniBatchDropout()]
    groups = [ours] if ours else [[callback] for callback in each]
    support, problems = look(first.trainer, first.model, StepCall(first.step, first.args, {}))
    if any(callback.penalty is not None and callback.penalty.curvature == FULL for callback in ours):
        # in nobody's way then
        problems = [problem for problem in problems if not isinstance(problem, LossNotRecognizedError)]
    return Findings(
        support,
        bool(ours),
        [str(problem) for problem in problems],
        [_outlook(first, group, support.kinks) for group in groups],
    )


def _outlook(first: FirstStep, callbacks: list[RegularizerCallback], kinks: Mapping[str, int]) -> Outlook:
    outlook, measured = Outlook([type(callback).__name__ for callback in callbacks]), list[Measured]()
    methods = list(outlook.callbacks)
    try:
        plan = callbacks[0].plan(cast(Trainer, SimpleNamespace(callbacks=callbacks)))
        outlook.plan = describe(plan)
        call = StepCall(first.step, first.args, {})
        outlook.values, plan, choices = rehearse(first.trainer, first.model, plan, call, measured)
        methods += [f"estimator {name}" for name in plan.estimators] + ["batch_fraction"] * bool(plan.on_rows)
        methods += ["batch_fraction in one pass"] * (plan.in_one_pass is not None)
        methods += ["compiled parts"] * any(each.name == "compiled" for each in measured)
        methods += ["MiniBatchDropout at the last site"] * (plan.sites == "last")
        outlook.plan = [*(f"{each[0].upper()}{each[1:]}." for each in choices), *describe(plan)]
        excess = outlook.values.get(NOISE_EXCESS, 1.0)
        if excess > EXCESS:
            found = ", ".join(kinks) or "in a custom function, perhaps"
            outlook.warning = f"The noise is {excess:.2f} times as large as xi_approx: kinks ({found}). {REMEDY}"
    except DropregError as error:
        outlook.refused = str(error)
    outlook.assumptions = report(methods, measured, bool(outlook.refused))
    return outlook


def _as_dict(found: Findings) -> dict[str, object]:
    support = found.support
    return {
        "sites": [
            {
                "name": each.site.name,
                "drop_prob": each.site.p,
                "shape": list(each.site.shape),
                "mask_shape": list(each.site.mask_shape),
                "kind": each.site.kind,
                **_estimators(each.refused, {}),
            }
            for each in support.sites
        ],
        "losses": [
            {"name": each.name, "outputs_shape": list(each.shape), **_estimators(each.refused, support.untried)}
            for each in support.losses
        ],
        "configured": found.configured,
        "kinks": dict(support.kinks),
        "problems": found.problems,
        "plans": [vars(outlook) for outlook in found.outlooks],
    }


def _estimators(refused: Mapping[str, str], untried: Mapping[str, str]) -> dict[str, object]:
    return {
        "estimators": [name for name in ESTIMATORS if name not in refused and name not in untried],
        "refused": dict(refused),
        "untried": dict(untried),
    }


class _Notes:
    """Numbers the reasons that are told below the tables, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def letters(self, refused: Mapping[str, str], untried: Mapping[str, str]) -> str:
        """Return the letters of the estimators that can, and the numbers of the reasons why others cannot."""
        can = [letter for name, letter in _LETTERS.items() if name not in refused and name not in untried]
        return " ".join([*can, *dict.fromkeys(self._number(text) for text in (refused | untried).values())])  # type: ignore[operator]

    def _number(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def _print(found: Findings, model: LightningModule) -> None:
    console, step, notes = get_console(), f"{type(model).__name__}.training_step", _Notes()
    if found.support.sites:
        console.print(_site_table(found.support.sites, step, notes))
    else:
        console.print(f"No dropout with a positive drop probability is reached in {step}.", highlight=False)
    if found.support.losses:
        console.print(_loss_table(found.support.losses, found.support.untried, step, notes))
    if notes.texts or found.support.sites:
        legend = ", ".join(f"{letter} {name}" for name, letter in _LETTERS.items())
        console.print(f"Estimators: {legend}.", highlight=False)
    for number, text in enumerate(notes.texts, 1):
        console.print(escape(f"[{number}] {_short(text)}"), highlight=False)
    if found.problems:
        console.print("\n[bold red]In the way[/]")
        for number, problem in enumerate(found.problems, 1):
            console.print(escape(f"{number}. {problem}"), highlight=False)
    if not found.configured:
        console.print(
            "\nNo callback of this package is configured. What each method would do, if it were the only one:",
            highlight=False,
        )
    for outlook in found.outlooks:
        _print_outlook(outlook, found.problems)


def _print_outlook(outlook: Outlook, problems: Sequence[str]) -> None:
    console = get_console()
    console.print(f"\n[bold]{' and '.join(outlook.callbacks)}[/]")
    measured = [row for row in outlook.assumptions if row["outcome"] != "not measured"]
    if measured:
        console.print(_assumption_table(measured))
        others = [str(row["name"]) for row in outlook.assumptions if row not in measured]
        if others:
            console.print(f"Not measured on this batch: {', '.join(others)}.", highlight=False)
    if outlook.refused:  # and so the plan will not be carried out
        known = [str(number) for number, problem in enumerate(problems, 1) if problem in outlook.refused]
        reason = f"see {', '.join(known)} above." if known else escape(_short(outlook.refused))
        console.print(f"[red]Refused:[/] {reason}", highlight=False)
        return
    for sentence in outlook.plan:
        console.print(escape(f"- {sentence}"), highlight=False)
    if outlook.values:
        values = ", ".join(f"{name} {value:.4g}" for name, value in outlook.values.items())
        console.print(f"- On the first batch: {values}.", highlight=False)
    if outlook.warning:
        console.print(f"[yellow]- {escape(outlook.warning)}[/]", highlight=False)


def _site_table(sites: Sequence[SiteSupport], step: str, notes: _Notes) -> Table:
    count = "1 dropout site" if len(sites) == 1 else f"{len(sites)} dropout sites"
    table = Table(title=f"{count} in {step}", title_justify="left")
    for heading in ("site", "p", "shape", "mask shape", "kind", "estimators"):
        table.add_column(heading, justify="right" if heading == "p" else "left", overflow="fold")
    for each in sites:
        site = each.site
        row = site.name, f"{site.p:g}", _shape(site.shape), _shape(site.mask_shape), site.kind
        table.add_row(*map(escape, row), escape(notes.letters(each.refused, {})))
    return table


def _loss_table(losses: Sequence[LossSupport], untried: Mapping[str, str], step: str, notes: _Notes) -> Table:
    table = Table(title=f"Losses in {step}", title_justify="left")
    for heading in ("loss", "outputs", "estimators"):
        table.add_column(heading, overflow="fold")
    for each in losses:
        table.add_row(each.name, _shape(each.shape), escape(notes.letters(each.refused, untried)))
    return table


def _assumption_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """What is assumed of the step; the whole of it is in docs/guarantees.md."""
    table = Table(title="What is assumed of the step, measured on its first batch", title_justify="left")
    for heading in ("assumption", "outcome", "what was found"):
        table.add_column(heading, no_wrap=heading == "assumption", overflow="fold")
    for row in rows:
        value, limit = row["value"], row["tolerance"]
        found = str(row["note"])
        if limit:
            found += f": {value:.2g} (at most {limit:.2g})"
        elif value:
            found += f" ({value:.2g})"
        table.add_row(str(row["name"]), str(row["outcome"]), escape(_short(found)))
    return table


def _short(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder=" …")


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
