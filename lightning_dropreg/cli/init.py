"""``dropreg init``: write the quickstart's configuration, for who has no clone of the repository."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich import get_console

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["QUICKSTART", "main"]

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
"""The configuration that the package brings along."""


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.

    Raises:
        InvalidArgumentError: If the file is there already, or cannot be written.
    """
    file = _parser().parse_args(args).file
    if file.exists():
        raise InvalidArgumentError(f"{file} is there already, and is left as it is. Name another file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(QUICKSTART.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{file} cannot be written: {error.strerror}.") from error
    get_console().print(
        f"{file} trains a small LSTM language model with Algorithm 2 on Python's own manual (nothing to download;\n"
        f"needs the extra: pip install 'lightning-dropreg[text]').\n"
        f"  dropreg inspect --config {file}   what is in a step, and what the callbacks do with it\n"
        f"  dropreg fit --config {file}       train it: about two minutes\n"
        "Put your own model and data in their place (class_path), and keep the callbacks.",
        highlight=False,
        soft_wrap=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dropreg init",
        description="Write the quickstart's configuration into a file, to be run and then changed.",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, default=Path("quickstart.yaml"), help="Where to; quickstart.yaml by default."
    )
    return parser
