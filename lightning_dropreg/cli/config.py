"""Configuration files that build on one another, and errors in them that can be read."""

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser
from yaml import YAMLError, safe_load  # type: ignore[import-untyped]

from lightning_dropreg.cli.spelling import ATTRIBUTE, check_keys, nearest, owner
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["ConfigParser", "LayeredConfigFile", "layers", "read_file"]

# What jsonargparse says about its own types, around what it says about the mistake.
_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")


_KEY = re.compile(r'Parser key "([\w.]+)":')
_CLASS = re.compile(r"given class_path '([\w.]+)'")
_EXPECTED = re.compile(r"Expected a <class '([\w.]+)'>")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_REQUIRED = re.compile(r"the following arguments are required: ([\w., ]+)")
_NO_FILE = re.compile(r'Parser key "config": File does not exist: \'(.*)\'')
_OPTION = re.compile(r"(?:Option|[Kk]ey) ['\"]([\w.]+)['\"] is not accepted")
_VALUE = re.compile(r"(?:Given|Got) value: (.*)")
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
_NO_PATH = re.compile(r"Expected a dot import path string: (\S+)|Invalid content in sub-config file (\S+\.py):")
_OTHER_KIND = re.compile(
    r"Expected a path but ([\w.]+) either .*?does not correspond to a subclass of (\w+)", re.DOTALL
)
_FILE = re.compile(r"unrecognized arguments: (\S+\.ya?ml)\b")


def _missing(message: str) -> str | None:
    """Say what is to be given, if something is not, or a file is not there."""
    if found := _NO_FILE.search(message):
        file = Path(found[1])
        return f"--config {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}: no such file."
    if found := ATTRIBUTE.search(message):
        return f"there is no {found[1]}.{found[2]}."
    if found := _FILE.search(message):
        return f"{found[1]}: give a configuration by --config {found[1]}."
    keys, classes = _KEY.findall(message), _CLASS.findall(message)
    if keys and (told := _no_class(message, classes)):
        return f"{keys[-1]}: {told}"
    if keys and classes and (found := _OPTION.search(message)):
        return f"{': '.join(keys)}: {owner(message, found)} takes no {found[1]!r}."
    if found := _REQUIRED.search(message):
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        if keys and classes:
            given = " ".join(f"--{keys[0]}.{name} VALUE" for name in names)
            return f"{keys[0]}: {classes[-1]} needs {' and '.join(names)}: {given}."
        return f"no {' and no '.join(names)} is configured. Give --config FILE (`dropreg init` writes a first one)."
    return None


def _no_class(message: str, classes: list[str]) -> str | None:
    """Say what is wrong with the path of a class, if it leads to none of the right kind."""
    if found := _NO_PATH.search(message):
        return f"{found[1] or found[2]} is no path of a class: write module.Class, as in my_module.MyModel."
    if found := _OTHER_KIND.search(message):
        return f"{found[1]} is no {found[2]}."
    if classes and (found := _NO_MODULE.search(message)):
        if f"{classes[-1]}.".startswith(f"{found[1]}."):
            return f"{classes[-1]}: there is no module {found[1]!r}, neither installed nor in this directory."
        return f"{classes[-1]}: its module cannot be imported: {found[0]}."
    return None


def _wrong_value(message: str) -> str | None:
    """Say in one line which value is of the wrong type, and what was expected, if that is all that is wrong."""
    keys = list(_KEY.finditer(message))
    value = _VALUE.search(message, keys[-1].end()) if keys else None
    if value is None:
        return None
    reasons = message[keys[-1].end() : value.start()].replace("Given value type: <class 'str'>", "")
    types = list(dict.fromkeys(_EXPECTED.findall(reasons)))
    choices = ", ".join(dict.fromkeys(", ".join(_CHOICES.findall(reasons)).split(", ")))
    if choices:
        types = [f"one of {choices}"]
    left = [line.strip(" -.") for line in _CHOICES.sub("", _EXPECTED.sub("", reasons)).splitlines()]
    if not types or any(line and not line.startswith(_NOISE) for line in left) or "is not accepted" in message:
        return None
    where = ": ".join([*[key[1] for key in keys[:-1]], *_CLASS.findall(message)[-1:]])
    wanted = " or ".join("None" if name == "NoneType" else name for name in types)
    return f"{where + ': ' if where else ''}{keys[-1][1]}={value[1]!r} must be {wanted}."


class LayeredConfigFile(ActionConfigFile):
    """A configuration file whose key ``base`` may name another file, or a list of files, that it changes.

    ``--config b.yaml`` with ``base: a.yaml`` in it is the same as ``--config a.yaml --config b.yaml``. The
    path is relative to the file that names it. Keys are merged; a list replaces the other one, or goes on where it
    ended if its key ends in ``+`` (``callbacks+:``).
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply the file's bases, then the file."""
        files = layers(values)
        readable = [file for file in files if Path(file).is_file()]
        check_keys([(file, read_file(file)) for file in readable], parser, cfg.as_dict())
        for layer in files:
            super().__call__(parser, cfg, layer, option_string)  # type: ignore[no-untyped-call]
        # Applied. In a saved copy of the configuration, elsewhere, the relative path would mislead.
        if "base" in cfg:
            cfg["base"] = None


def read_file(file: str) -> dict[str, Any]:
    """Read a configuration file; refuse what is no YAML, or holds something else than keys with values."""
    try:
        content = safe_load(Path(file).read_text(encoding="utf-8"))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        told = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InvalidArgumentError(f"{file}{where}: this is no YAML: {told}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise InvalidArgumentError(f"{file} holds {found}, not keys with values (trainer:, model:, data:).")
    return content


def layers(file: str, above: tuple[str, ...] = ()) -> list[str]:
    """Return a configuration file below the files that it is based on.

    Args:
        file: The file, or something else that a parser understands.
        above: The files that it is the base of.

    Returns:
        The bases, in the order in which they are applied, and `file`.

    Raises:
        InvalidArgumentError: If a base is not there, or a file is its own.
    """
    path = Path(file)
    if not path.is_file():
        return [file]  # the parser knows what else it may be, and what to say if it is nothing
    if file in above:
        raise InvalidArgumentError(f"{file} is its own base: {' -> '.join([*above, file])}.")
    base = read_file(file).get("base")
    if base is None:
        return [file]
    below = []
    for one in base if isinstance(base, list) else [base]:
        if not (path.parent / one).is_file():
            raise InvalidArgumentError(f"{file} says base: {one}, but there is no file {path.parent / one}.")
        below += layers(str(path.parent / one), (*above, file))
    return [*below, file]


_GROUPS = {
    "trainer": "Trainer",
    "model": "model",
    "data": "data",
    "ckpt_path": "checkpoint",
    "return_predictions": "predictions",
    "optimizer": "optimizer, if the model has no configure_optimizers",
    "lr_scheduler": "learning rate scheduler, of that optimizer",
}
"""Titles of the groups of options, by the first word of these."""


class ConfigParser(LightningArgumentParser):
    """Lightning's parser, except that help has short titles and an error is not buried under a page of usage."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help, with our titles: jsonargparse takes the first line of a class's docstring."""
        groups: Any = self._action_groups
        for group in groups:
            names = [name for action in group._group_actions for name in action.option_strings]
            first = names[0].strip("-").partition(".")[0] if names else ""
            group.title = _GROUPS.get(first, group.title)
        text: str = super().format_help(*args, **kwargs)
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2 (an inner parser raises)."""
        if not self.exit_on_error:  # the parser of a class within: the outer one says where, and exits
            super().error(message, ex)
        prog = getattr(ex, "subcommand_parser", self).prog.replace(" [options]", "")
        told = (
            _missing(message)
            or _wrong_value(message)
            or "\n".join(line for line in message.splitlines() if not line.lstrip(" -").startswith(_NOISE))
        )
        meant = nearest(message, self)
        hint = f" Did you mean {meant!r}?" if meant else ""
        sys.stderr.write(f"{prog}: {told}{hint}\n(all options: {prog} --help)\n")
        self.exit(2)
