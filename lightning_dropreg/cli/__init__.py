"""The command ``dropreg``: Lightning's four sub-commands and four of our own."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_dropreg.errors import DropregError

__all__ = ["main"]

COMMANDS = {
    "fit": "train a model, and say at the end how it went",
    "validate": "evaluate a model on the validation data",
    "test": "evaluate a model on the test data",
    "predict": "run a model over the data to predict",
    "inspect": "list the dropout sites that a training step reaches",
    "bench": "time one optimization step with each method",
    "compare": "run several configurations and put their results into one table",
    "diagnose": "show what dropout does to a model on one batch, and whether the theory holds there",
}
_LIGHTNING = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0 if all went well, 1 after an error of this package, which is printed without a
        traceback, 2 for an unknown command.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if args is None and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a class_path may name a module beside the configuration, as for `python -m`
    if not argv or argv[0] in {"-h", "--help"}:
        print(_help())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"dropreg: there is no command {argv[0]!r}.\n\n{_help()}", file=sys.stderr)
        return 2
    try:
        if argv[0] in _LIGHTNING:
            from lightning_dropreg.cli.app import DropregCLI

            DropregCLI(argv)
        else:
            import_module(f"lightning_dropreg.cli.{argv[0]}").main(argv[1:])
    except Exception as error:
        ours = _dropreg_error(error)
        if ours is None:
            raise
        print(f"dropreg {argv[0]}: {ours}", file=sys.stderr)
        return 1
    return 0


def _dropreg_error(error: BaseException | None) -> DropregError | None:
    # jsonargparse raises a ValueError of its own from what a class raises when it is built
    while error is not None and not isinstance(error, DropregError):
        error = error.__cause__
    return error


def _help() -> str:
    rows = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
    return (
        "usage: dropreg COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]\n\n"
        f"commands:\n{rows}\n\n"
        "Every command explains its options: dropreg COMMAND --help"
    )
