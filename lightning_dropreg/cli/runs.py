"""The runs of ``dropreg compare`` on disk: each is made once, kept, and known by what it was made of."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import get_console

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.config import layers, read_file
from lightning_dropreg.cli.machine import describe_machine
from lightning_dropreg.cli.summary import FitSummary

__all__ = ["Setting", "data_of", "finished", "kept"]

_DISPLAY = ("enable_model_summary", "enable_progress_bar", "log_every_n_steps", "logger", "default_root_dir")
"""Keys of the trainer that change what is shown and where it is kept, and no number."""

_SHORT = 8
"""So much of a fingerprint tells runs apart."""


@dataclass(frozen=True)
class Setting:
    """What is run under one name.

    Attributes:
        name: The name.
        file: Configuration file.
        options: Options of its own.
        plain: Whether the regularizers of this package are left out: what remains is the model's own dropout.
        monitor: The validation metric to judge by; None for what the file's checkpoint callback watches, else a loss.
        mode: ``"max"`` if a higher value of it is better.
        mixin: Settings of the model's mixins that replace its own, by the attribute's name.
    """

    name: str
    file: str
    options: tuple[str, ...] = ()
    plain: bool = False
    monitor: str | None = None
    mode: str = "min"
    mixin: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fingerprint(self, seed: int, shared: Sequence[str]) -> str:
        """Return what tells a run from those of other files, options and seeds."""
        files = [_without_display(read_file(file)) if Path(file).is_file() else file for file in layers(self.file)]
        more = [self.plain, self.monitor, self.mode, self.mixin]
        made_of = [files, seed, _that_count([*self.options, *shared]), more]
        return hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()


def _without_display(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes no number."""
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        return config
    return {**config, "trainer": {key: value for key, value in trainer.items() if key not in _DISPLAY}}


def _that_count(options: Sequence[str]) -> list[str]:
    """Options without what changes no number, written `--key=value` or `--key value`."""
    names = {f"--trainer.{key}" for key in _DISPLAY}
    before = ["", *options]
    return [
        option
        for previous, option in zip(before, options, strict=False)
        if option.partition("=")[0] not in names and not (previous in names and not option.startswith("--"))
    ]


def finished(out: Path, setting: Setting, seed: int, shared: Sequence[str]) -> dict[str, Any]:
    """Return the record of a run: the kept one if it was made of the same, else that of a new fit.

    Args:
        out: Where the runs are.
        setting: What is to be run.
        seed: The seed.
        shared: Options of all settings.

    Returns:
        The record: result, machine, resolved configuration, and what it was made of.
    """
    folder, fingerprint = out / setting.name / f"seed-{seed}", setting.fingerprint(seed, shared)
    _make_room(folder, fingerprint)
    record, resume = folder / "result.json", folder / "resume.ckpt"
    started = folder / "fingerprint.txt"
    if record.is_file():
        before: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if before["fingerprint"] == fingerprint:
            get_console().print("finished before", style="dim")
            return before
    goes_on = resume.is_file() and started.is_file() and started.read_text(encoding="utf-8") == fingerprint
    if not goes_on:
        resume.unlink(missing_ok=True)
        started.write_text(fingerprint, encoding="utf-8")
    arguments = ["fit", "--config", setting.file, "--seed_everything", str(seed), *setting.options, *shared]
    if goes_on:
        get_console().print("going on after the last whole epoch", style="dim")
        arguments += ["--ckpt_path", str(resume)]
    summary = FitSummary(resume, setting.monitor, setting.mode)
    cli = DropregCLI(arguments, summary=summary, plain=setting.plain, mixin=setting.mixin)
    made = {
        "fingerprint": fingerprint,
        "setting": {**asdict(setting), "file": str(Path(setting.file).resolve())},
        "result": asdict(cli.fit_summary.result),
        "machine": describe_machine(cli.model),
        "config": cli.resolved_config(),
    }
    part = record.with_suffix(".part")
    part.write_text(json.dumps(made, indent=2), encoding="utf-8")
    part.replace(record)  # whole or not at all
    resume.unlink(missing_ok=True)
    return made


def kept(
    out: Path, known: Iterable[tuple[str, int]], shared: Sequence[str], data: object
) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
    """Find the other finished runs of a folder.

    Args:
        out: Where the runs are.
        known: Names and seeds of those that are known.
        shared: Options of all settings, as they are now.
        data: What the known runs were trained on, see `data_of`.

    Yields:
        Name, seed and record of each; None for a record that is not to be compared: it was made with other options,
        from a file that has changed since, on other data, or judged by another metric.
    """
    for path in sorted(out.glob("*/seed-*/result.json")):
        name, seed = path.parent.parent.name, path.parent.name.removeprefix("seed-")
        if not seed.lstrip("-").isdigit() or (name, int(seed)) in set(known):
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        made = dict(record.get("setting", {}))
        setting = Setting(**{**made, "options": tuple(made["options"])}) if made else None
        same = (
            setting is not None
            and setting.fingerprint(int(seed), shared) == record["fingerprint"]
            and data_of(record) == data
        )
        yield name, int(seed), record if same else None


def data_of(record: dict[str, Any]) -> object:
    """Return what makes runs comparable: the metric, and the class of the data, else that of the model."""
    metric = record["result"]["metric"]
    for part in ("data", "model"):
        if found := record["config"].get(part):
            return metric, found.get("class_path", found) if isinstance(found, dict) else found
    return metric, None


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
