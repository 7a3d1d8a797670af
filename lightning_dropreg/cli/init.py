"""``dropreg init``: write a first configuration, the quickstart's or one for a model of one's own."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from rich import get_console

from lightning_dropreg.cli.config import ConfigParser
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["QUICKSTART", "main"]

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
"""The configuration that the package brings along."""
_OWN = """\
# What will be done, on the first batch:
#   dropreg inspect --config {file}
# Train:
#   dropreg fit --config {file}
# Which strength, and was it worth it?
#   dropreg compare {file} --vary strength=0.5,1,2
trainer:
  max_epochs: 20
  callbacks:
    # In the place of dropout, at the model's own rates:
    - class_path: lightning_dropreg.ExplicitPenalty
      init_args:
        strength: 1.0
    # If validation_step logs val_loss, let fit keep the best epoch
    # (compare does so by itself):
    # - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    #   init_args: {{monitor: val_loss}}
{parts}"""


def main(args: Sequence[str]) -> None:
    """Run the command."""
    options, more = _parser().parse_known_args(args)
    if more and not options.model:
        raise InvalidArgumentError(f"{more[0]} is unknown without --model (`dropreg init --help`).")
    file = options.file or Path("mine.yaml" if options.model else "quickstart.yaml")
    if file.exists():
        raise InvalidArgumentError(f"{file} is there already, and is left as it is. Name another file.")
    text = QUICKSTART.read_text(encoding="utf-8")
    if options.model:
        text = _OWN.format(file=file, parts=_parts(options.model, options.data, more))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{file} cannot be written: {error.strerror}.") from error
    get_console().print(_told(file, options.model), highlight=False, soft_wrap=True)


def _parts(model: str, data: str | None, more: Sequence[str]) -> str:
    """The sections of one's own classes, with their arguments and defaults."""
    parser = ConfigParser(prog="dropreg init")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
    given = [f"--model={model}", *([f"--data={data}"] if data else []), *more]
    text: str = parser.dump(parser.parse_args(given))
    return text.replace("data: null\n", "").rstrip("\n") + "\n"


def _told(file: Path, model: str | None) -> str:
    if model:
        return (
            f"{file} trains {model}:\nExplicitPenalty in the place of its dropout.\n"
            f"What will be done, on the first batch:\n  dropreg inspect --config {file}\n"
            f"Train it:\n  dropreg fit --config {file}\n"
            f"Which strength, and was it worth it?\n  dropreg compare {file} --vary strength=0.5,1,2"
        )
    return (
        f"{file} trains a small LSTM language model with Algorithm 2 on\n"
        "Python's own manual (nothing to download; needs the extra:\n"
        "pip install 'lightning-dropreg[text]').\n"
        f"What will be done, on the first batch:\n  dropreg inspect --config {file}\n"
        f"Train it, about two minutes:\n  dropreg fit --config {file}\n"
        "For a model of your own:\n  dropreg init --model your_module.YourModel --data your_module.YourData"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dropreg init",
        usage="dropreg init [FILE]\n       dropreg init [FILE] --model CLASS [--data CLASS] [--model.KEY VALUE ...]",
        description="Write a first configuration into a file, to be run and then changed: the quickstart's, or one for"
        " your own LightningModule and LightningDataModule, with their arguments and ExplicitPenalty.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="Where to; quickstart.yaml or mine.yaml by default."
    )
    parser.add_argument("--model", metavar="CLASS", help="Path of a LightningModule, as in my_module.MyModel.")
    parser.add_argument("--data", metavar="CLASS", help="Path of a LightningDataModule, if the model has no loaders.")
    return parser
