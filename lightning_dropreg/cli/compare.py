"""``dropreg compare``: run several configurations over several seeds and put their results side by side."""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import get_console
from rich.table import Table

from lightning_dropreg.checks import make_directory, need_matplotlib
from lightning_dropreg.cli.comparison import Column, Comparison, Run
from lightning_dropreg.cli.curves import draw_curves
from lightning_dropreg.cli.runs import Setting, data_of, finished, kept
from lightning_dropreg.cli.summary import FitResult
from lightning_dropreg.cli.vary import choice, varied, verdicts
from lightning_dropreg.errors import CorpusNotFoundError, InvalidArgumentError

__all__ = ["main"]

_OUT = Path("runs/compare")

_NAME = 24
"""A longer name goes below the tables, and a letter stands for it in them."""


def main(args: Sequence[str]) -> None:
    """Run the command."""
    cut = list(args).index("--") if "--" in args else len(args)
    options, shared = _parser().parse_args(args[:cut]), args[cut + 1 :]
    if options.plain and not options.vary:
        raise InvalidArgumentError("--plain goes with --vary: it tries the values with plain dropout.")
    if (options.monitor is None) != (options.mode is None):
        raise InvalidArgumentError("--monitor NAME and --mode min (or max) go together.")
    judged = {"monitor": options.monitor, "mode": options.mode or "min"}
    settings = [replace(each, **judged) for each in _settings(options.configs, options.vary, options.plain)]
    seeds = options.seeds or ([1, 2, 3] if options.vary else [1])
    make_directory("out", options.out)  # before hours of training
    _check_baseline(options.baseline, settings, options.out)
    drawn = options.figure or (options.out / "curves.png").is_file()  # not to be left there when the tables change
    if drawn:
        need_matplotlib()
    if options.vary:
        get_console().print(
            f"{len(settings) * len(seeds)} fits: {len(settings)} settings, {len(seeds)} seeds", style="dim"
        )
    records, problems = _carry_out(settings, seeds, options.out, shared)
    if not records:
        raise InvalidArgumentError("every run failed, as said above.")
    left = []
    for name, seed, record in kept(options.out, records, shared, data_of(next(iter(records.values())))):
        if record is None:
            left.append(f"{name}, seed {seed}")
        else:
            records[name, seed] = record
    runs = [Run(name, seed, FitResult(**record["result"])) for (name, seed), record in records.items()]
    first = [options.baseline] if options.baseline else []
    comparison = Comparison(runs, dict.fromkeys([*first, *(each.name for each in settings), *(r.config for r in runs)]))
    comparison.write(options.out)
    chosen = choice(comparison, options.vary, options.plain) if options.vary else verdicts(comparison)
    if chosen:
        with (options.out / "table.md").open("a", encoding="utf-8") as table:
            table.write("\n" + "\n".join(chosen) + "\n")
    made = {name: {key: record.get(key) for key in ("machine", "config")} for (name, _), record in records.items()}
    made_with = {"command": shlex.join(["dropreg", "compare", *args]), "configurations": made}
    (options.out / "machine.json").write_text(json.dumps(made_with, indent=2), encoding="utf-8")
    figures = draw_curves(comparison, options.out) if drawn else []
    if options.json:
        printed = {"runs": [asdict(run) for run in comparison.runs], "problems": problems, "choice": chosen}
        print(json.dumps(printed, indent=2))
        return
    _print(comparison)
    lines = chosen + [f"failed: {name}: {problem}" for name, problem in problems.items()]
    if left:
        lines.append(f"not in the tables (other options or data, or its file has changed since): {'; '.join(left)}")
    lines += [f"tables, runs and histories: {options.out}", *(f"figure: {path}" for path in figures)]
    for line in lines:
        get_console().print(line, highlight=False, markup=False, soft_wrap=str(options.out) in line)


def _carry_out(
    settings: Sequence[Setting], seeds: Sequence[int], out: Path, shared: Sequence[str]
) -> tuple[dict[tuple[str, int], dict[str, Any]], dict[str, str]]:
    """Make the runs; return the records of those that ended, by name and seed, and what was wrong with the others."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    problems: dict[str, str] = {}
    missing: set[str] = set()
    for seed in seeds:  # seed by seed, so that what there is can be compared at any time
        for setting in settings:
            if setting.name in missing:
                continue
            get_console().rule(f"{setting.name}, seed {seed}", style="dim")
            try:
                records[setting.name, seed] = finished(out, setting, seed, shared)
            except Exception as error:  # the other runs may take or have taken hours
                if _lacks_files(error):
                    if not records:  # and most likely the others want the same files
                        raise
                    missing.add(setting.name)
                problems[f"{setting.name}, seed {seed}"] = f"{type(error).__name__}: {error}"
                get_console().print(f"failed: {error}", highlight=False, markup=False)
    return records, problems


def _lacks_files(error: BaseException | None) -> bool:
    """Whether a corpus is not there, which another seed does not change."""
    while error is not None and not isinstance(error, CorpusNotFoundError):
        error = error.__cause__
    return error is not None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dropreg compare",
        usage="dropreg compare FILE FILE ... [--seeds N N ...] [--baseline NAME]\n"
        "       [--monitor NAME --mode MODE] [--out DIR] [--figure] [--json]\n       [-- OPTIONS]\n"
        "       dropreg compare FILE --vary KEY=VALUE,VALUE,... [--plain] [the same]",
        description="Run fit with each configuration file and seed in turn, test the best checkpoint\n"
        "of each where there is a test, and compare the results. With --vary: run one\n"
        "file with several values of an option and with plain dropout, choose the value\n"
        "by validation, and say how it does in the test against dropout.",
        epilog="Examples; options after -- go to every run:\n\n"
        "  dropreg compare mine.yaml --plain --vary model.init_args.drop_prob=0.1,0.3,0.5\n"
        "  dropreg compare mine.yaml --vary strength=0.5,1,2 -- --trainer.max_epochs 20\n"
        "  dropreg compare mine.yaml --vary ExplicitPenalty.strength=0.5,1,2\n"
        "                            (a callback's option, where several have a strength)\n"
        "  dropreg compare mine.yaml --vary explicit_penalty.strength=0.5,1,2\n"
        "                            (a mixin's)\n"
        "  dropreg compare dropout.yaml mine.yaml --seeds 1 2 3 --figure\n\n"
        "DIR keeps every finished run: it is not repeated, and the tables hold all that\n"
        "are there and were made with the same options; a killed run goes on after its\n"
        "last whole epoch. DIR gets table.md, table.csv, runs.csv and history.csv, and\n"
        "machine.json: command, machine, versions and resolved configurations.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="+", metavar="FILE", help="Configuration file; the first is the reference.")
    parser.add_argument(
        "--vary", metavar="KEY=VALUES", help="Option of one callback, or a key of FILE, and its values, with commas."
    )
    parser.add_argument(
        "--plain", action="store_true", help="With --vary: every value with plain dropout, to tune its rate."
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="Seeds; 1 by default, with --vary 1 2 3.")
    parser.add_argument("--baseline", metavar="NAME", help="What the others are compared with; the first by default.")
    parser.add_argument(
        "--monitor",
        metavar="NAME",
        help="Validation metric to judge by; by default what a ModelCheckpoint watches, else val_ppl or a val loss.",
    )
    parser.add_argument("--mode", choices=["min", "max"], help="max if a higher value of --monitor is better.")
    parser.add_argument(
        "--out", type=Path, default=_OUT, metavar="DIR", help=f"Where results are kept; {_OUT} by default."
    )
    parser.add_argument("--figure", action="store_true", help="Draw curves.png and curves.svg.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    return parser


def _settings(configs: Sequence[str], vary: str | None, plain: bool) -> list[Setting]:
    """What is to be run: a file each, with short names; their folders too where the stems are the same."""
    if vary:
        if len(configs) > 1:
            raise InvalidArgumentError(f"--vary changes one file, not {len(configs)}: {', '.join(configs)}.")
        return varied(configs[0], vary, plain)
    stems = [Path(config).stem for config in configs]
    names = {c: s if stems.count(s) == 1 else str(Path(c).with_suffix("")) for c, s in zip(configs, stems, strict=True)}
    if len(names) != len(configs):
        raise InvalidArgumentError(f"a configuration file is named twice: {', '.join(configs)}.")
    return [Setting(name.replace("/", "_"), config) for config, name in names.items()]


def _check_baseline(baseline: str | None, settings: Sequence[Setting], out: Path) -> None:
    names = [
        *(setting.name for setting in settings),
        *(path.parent.parent.name for path in out.glob("*/seed-*/*.json")),
    ]
    if baseline is not None and baseline not in names:
        raise InvalidArgumentError(f"--baseline {baseline}: there is only {', '.join(dict.fromkeys(names))}.")


def _print(comparison: Comparison) -> None:
    console, names, legend = get_console(), list(comparison.configs), []
    for number, name in enumerate(comparison.configs):
        if len(name) > _NAME:
            names[number] = chr(ord("A") + number % 26) * (1 + number // 26)
            legend.append(f"{names[number]}: {name}")
    for title, columns in comparison.tables():
        console.print(f"\n{title}", style="italic", highlight=False, markup=False)
        for part in _that_fit(columns, console.width - max(map(len, names)) - 4):
            table = Table()
            table.add_column("", no_wrap=True)
            for column in part:
                table.add_column(column.title, justify="right", width=_width(column))
            for row in zip(names, *(column.texts() for column in part), strict=True):
                table.add_row(*row)
            console.print(table)
    for line in legend:
        console.print(line, highlight=False, markup=False)


def _width(column: Column) -> int:
    """So wide that cells stay whole and the title breaks between words only."""
    return max(map(len, [*column.texts(), *column.title.split()]))


def _that_fit(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Columns in groups that are no wider than the terminal."""
    groups: list[list[Column]] = [[]]
    for column in columns:
        if groups[-1] and sum(_width(each) + 3 for each in [*groups[-1], column]) > width:
            groups.append([])
        groups[-1].append(column)
    return groups
