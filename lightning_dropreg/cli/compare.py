"""``dropreg compare``: run several configurations over several seeds and put their results side by side."""

import argparse
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import get_console
from rich.table import Table

from lightning_dropreg.checks import make_directory
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.comparison import Comparison, Run
from lightning_dropreg.cli.config import layers
from lightning_dropreg.cli.curves import draw_curves
from lightning_dropreg.cli.machine import describe_machine
from lightning_dropreg.cli.summary import FitResult
from lightning_dropreg.diagnostics.figures import need_matplotlib
from lightning_dropreg.errors import CorpusNotFoundError, InvalidArgumentError

__all__ = ["main"]

_NAME = 32
"""A name of so many characters stays in one piece, in a terminal of 80."""
_SHORT = 8
"""So much of a fingerprint tells runs apart."""


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.

    Raises:
        InvalidArgumentError: If every run fails, or a file is named twice.
    """
    cut = list(args).index("--") if "--" in args else len(args)
    options = _parser().parse_args(args[:cut])
    names = _names(options.configs)
    make_directory("out", options.out)  # before hours of training
    if options.figure:
        need_matplotlib()
    problems: dict[str, str] = {}
    runs: list[Run] = []
    made_with: dict[str, Any] = {"command": shlex.join(["dropreg", "compare", *args]), "configurations": {}}
    missing: set[str] = set()
    for seed in options.seeds:  # seed by seed, so that what there is can be compared at any time
        for config, name in names.items():
            if config in missing:
                continue
            get_console().rule(f"{name}, seed {seed}", style="dim")
            folder = options.out / name / f"seed-{seed}"
            try:
                record = _finished(folder, config, seed, args[cut + 1 :])
                runs.append(Run(name, seed, FitResult(**record["result"])))
                made_with["configurations"].setdefault(name, {k: record.get(k) for k in ("machine", "config")})
            except Exception as error:  # the other runs may take or have taken hours
                if _lacks_files(error):
                    if not runs:  # and most likely the others want the same files
                        raise
                    missing.add(config)
                problems[f"{name}, seed {seed}"] = f"{type(error).__name__}: {error}"
                get_console().print(f"failed: {error}", highlight=False, markup=False)
    if not runs:
        raise InvalidArgumentError("every run failed, as said above.")
    comparison = Comparison(runs, list(names.values()))
    comparison.write(options.out)
    (options.out / "machine.json").write_text(json.dumps(made_with, indent=2), encoding="utf-8")
    figures = draw_curves(comparison, options.out) if options.figure else []
    if options.json:
        print(json.dumps({"runs": [asdict(run) for run in runs], "problems": problems}, indent=2))
        return
    _print(comparison, problems)
    get_console().print(
        f"table, runs and histories: {options.out}" + "".join(f"\nfigure: {path}" for path in figures),
        highlight=False,
        soft_wrap=True,
    )


def _lacks_files(error: BaseException | None) -> bool:
    """Whether a corpus is not there, which another seed does not change."""
    while error is not None and not isinstance(error, CorpusNotFoundError):
        error = error.__cause__
    return error is not None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dropreg compare",
        usage="dropreg compare FILE FILE ... [--seeds N N ...] [--out DIR] [--figure] [--json] [-- OPTIONS]",
        description="Run fit with each configuration file and seed in turn and compare the results. Finished runs\n"
        "are kept in DIR and not repeated, those made with other options too; a killed one goes on after its last\n"
        "whole epoch.",
        epilog="Example, from a clone of the repository; options after -- go to every run:\n\n"
        "  dropreg compare configs/quickstart_dropout.yaml configs/quickstart.yaml \\\n"
        "    --seeds 1 2 3 --figure -- --trainer.max_epochs 3\n\n"
        "DIR gets table.md, table.csv, runs.csv and history.csv, and machine.json: command, machine, versions\n"
        "and resolved configurations. 'difference / sd': of the means to the first, in pooled standard deviations\n"
        "over seeds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="+", metavar="FILE", help="Configuration file; the first is the reference.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="Seeds; 1 by default.")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="Where results are kept.")
    parser.add_argument("--figure", action="store_true", help="Draw curves.png and curves.svg.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    return parser


def _names(configs: Sequence[str]) -> dict[str, str]:
    """Short names of the files; their folders too where the stems are the same."""
    stems = [Path(config).stem for config in configs]
    names = {c: s if stems.count(s) == 1 else str(Path(c).with_suffix("")) for c, s in zip(configs, stems, strict=True)}
    if len(names) != len(configs):
        raise InvalidArgumentError(f"a configuration file is named twice: {', '.join(configs)}.")
    return {config: name.replace("/", "_") for config, name in names.items()}


def _finished(folder: Path, config: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """Return the record of a run: the kept one if it is of the same configuration, else that of a new fit."""
    fingerprint = _fingerprint(config, seed, options)
    _make_room(folder, fingerprint)
    record, resume = folder / "result.json", folder / "resume.ckpt"
    started = folder / "fingerprint.txt"
    if record.is_file():
        kept: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if kept["fingerprint"] == fingerprint:
            get_console().print("finished before", style="dim")
            return kept
    goes_on = resume.is_file() and started.is_file() and started.read_text(encoding="utf-8") == fingerprint
    if not goes_on:
        resume.unlink(missing_ok=True)
        started.write_text(fingerprint, encoding="utf-8")
    arguments = ["fit", "--config", config, "--seed_everything", str(seed), *options]
    if goes_on:
        get_console().print("going on after the last whole epoch", style="dim")
        arguments += ["--ckpt_path", str(resume)]
    cli = DropregCLI(arguments, resume_file=resume)
    made = {
        "fingerprint": fingerprint,
        "result": asdict(cli.fit_summary.result),
        "machine": describe_machine(cli.model),
        "config": cli.resolved_config(),
    }
    part = record.with_suffix(".part")
    part.write_text(json.dumps(made, indent=2), encoding="utf-8")
    part.replace(record)  # whole or not at all
    resume.unlink(missing_ok=True)
    return made


def _make_room(folder: Path, fingerprint: str) -> None:
    """Put a run that was made with other options aside, and take out again one that was put aside before."""

    def aside(mark: str) -> Path:
        return folder.with_name(f"{folder.name}.{mark[:_SHORT]}")

    started = folder / "fingerprint.txt"
    before = started.read_text(encoding="utf-8") if started.is_file() else ""
    worth_keeping = (folder / "result.json").is_file() or (folder / "resume.ckpt").is_file()
    if worth_keeping and before != fingerprint:
        place = aside(before or "unknown")
        folder.rename(place)
        get_console().print(f"a run made with other options is kept in {place}", highlight=False, soft_wrap=True)
    if not folder.exists() and aside(fingerprint).is_dir():
        aside(fingerprint).rename(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _fingerprint(config: str, seed: int, options: Sequence[str]) -> str:
    content = [Path(file).read_text(encoding="utf-8") if Path(file).is_file() else file for file in layers(config)]
    return hashlib.sha256(json.dumps([content, seed, list(options)]).encode()).hexdigest()


def _print(comparison: Comparison, problems: dict[str, str]) -> None:
    rows = comparison.rows()
    cut = rows[0].index("time")
    # two tables, since one would be wider than a terminal
    for title, columns in (("Comparison", range(cut)), ("Time", [0, *range(cut, len(rows[0]))])):
        table = Table(title=title, title_justify="left")
        for number in columns:
            whole = not number and max(len(row[0]) for row in rows) <= _NAME
            table.add_column(rows[0][number], justify="right" if number else "left", overflow="fold", no_wrap=whole)
        for row in rows[1:]:
            table.add_row(*(row[number] for number in columns))
        get_console().print(table)
    for name, problem in problems.items():
        get_console().print(f"failed: {name}: {problem}", highlight=False, markup=False)
