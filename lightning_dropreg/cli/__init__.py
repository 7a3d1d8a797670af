"""The command ``dropreg``: Lightning's four sub-commands and our own."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

from lightning_dropreg.cli.mistakes import message_of

__all__ = ["main"]

COMMANDS = {
    "init": "write a first configuration, the quickstart or for your own model",
    "fit": "train a model, and say at the end how it went",
    "validate": "evaluate a model on the validation data",
    "test": "evaluate a model on the test data",
    "predict": "run a model over the data to predict",
    "inspect": "list the dropout sites that a training step reaches",
    "audit": "find dropout that does not do what it should",
    "bench": "time one optimization step with each method",
    "compare": "run several configurations and put their results into one table",
    "diagnose": "measure what dropout does on a batch, and whether the theory holds",
}
_LIGHTNING = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0 if all went well; 1 after an error of this package, or of Lightning about how it was set up,
        which is printed without a traceback; 2 for an unknown command.
    """
    try:
        status = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, as in `dropreg inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(args: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if args is None else args)
    if args is None and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a class_path may name a module beside the configuration, as for `python -m`
    if not argv or argv[0] in {"-h", "--help"}:
        print(_help())
        return 0 if argv else 2
    if argv[0] in {"-V", "--version"}:
        print(_versions())
        return 0
    if argv[0] not in COMMANDS:
        close = get_close_matches(argv[0], COMMANDS, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        print(f"dropreg: there is no command {argv[0]!r}.{meant}\n\n{_help()}", file=sys.stderr)
        return 2
    try:
        if argv[0] in _LIGHTNING:
            from lightning_dropreg.cli.app import DropregCLI

            DropregCLI(argv)
        else:
            status: int | None = import_module(f"lightning_dropreg.cli.{argv[0]}").main(argv[1:])
            return status or 0
    except BrokenPipeError:
        raise
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        print(f"dropreg {argv[0]}: {message}", file=sys.stderr)
        return 1
    return 0


def _versions() -> str:
    names = ("lightning-dropreg", "torch", "lightning")
    return ", ".join(f"{name} {version(name)}" for name in names)


def _help() -> str:
    rows = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
    return (
        "usage: dropreg COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]\n\n"
        f"commands:\n{rows}\n\n"
        "A first run:  dropreg init && dropreg fit --config quickstart.yaml\n"
        "Every command explains its options: dropreg COMMAND --help"
    )
