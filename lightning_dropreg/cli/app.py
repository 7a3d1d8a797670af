"""The LightningCLI behind every sub-command."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console
from yaml import safe_load  # type: ignore[import-untyped]

from lightning_dropreg.cli import COMMANDS
from lightning_dropreg.cli.config import ConfigParser, LayeredConfigFile
from lightning_dropreg.cli.mistakes import check_checkpoint
from lightning_dropreg.cli.progress import FitProgress
from lightning_dropreg.cli.summary import FitSummary, print_result
from lightning_dropreg.mixins import without_mixins
from lightning_dropreg.session.base import RegularizerCallback

__all__ = ["DropregCLI"]

AddOptions = Callable[[Any], object]
"""Adds options to a parser, or to a group of them."""


class DropregCLI(LightningCLI):
    """Builds trainer, model and data from configuration files and options, and runs a command of Lightning's.

    Args:
        args: Arguments, starting with the name of the command: ``fit``, ``validate``, ``test`` or
            ``predict``. Any other command gets what ``fit`` gets, so that the same files serve it, and runs
            itself what is built here.
        description: What the other command does, for its help.
        add_options: Adds the other command's own options to its parser.
        summary: What measures a fit; with a ``resume_file``, its best checkpoint is tested where there is a test.
        plain: Whether this package's regularizers are left out, those of mixins too.
        mixin: Settings of mixins that replace the model's, by the attribute's name.
    """

    def __init__(
        self,
        args: Sequence[str],
        description: str | None = None,
        add_options: AddOptions | None = None,
        summary: FitSummary | None = None,
        plain: bool = False,
        mixin: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        _quiet()
        self._plain, self._mixin = plain, mixin or {}
        self._add_options = add_options
        self.fit_summary = summary or FitSummary()
        command, *options = args
        self._command = command
        by_lightning = command in self.subcommands()
        super().__init__(
            save_config_callback=SaveConfigCallback if by_lightning else None,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=1,
            parser_kwargs={"prog": "dropreg", command: {"description": f"{COMMANDS[command].capitalize()}."}}
            if by_lightning
            else {"prog": f"dropreg {command}", "description": description},
            args=list(args) if by_lightning else options,
            run=by_lightning,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose configuration files may build on one another."""
        if kwargs.get("prog") != "dropreg":  # of which the names of the commands' own parsers are made
            kwargs.setdefault("usage", f"dropreg {self._command} --config FILE [--config FILE ...] [--KEY VALUE ...]")
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_epoch is a mistake, not max_epochs
        parser: LightningArgumentParser = ConfigParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=LayeredConfigFile,
            help="Configuration file; a later one changes earlier ones.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that Lightning does not have."""
        parser.add_argument(
            "--base",
            type=str | list[str] | None,
            default=None,
            help="In a file: another file that this one changes, or several, the later ones changing the earlier.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether fit ends with a test of the best checkpoint.",
        )
        parser.add_argument(
            "--accept_checkpoint_settings",
            type=bool,
            default=False,
            help="Whether this package's callbacks go on from a checkpoint of other settings, or of plain dropout.",
        )
        if self._add_options is not None:
            parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
            group = parser.add_argument_group(f"dropreg {self._command}")
            self._add_options(group)
            groups: Any = parser._action_groups
            groups.insert(1, groups.pop(groups.index(group)))  # before the options that every command has

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; Lightning's own method would warn that the process has some too."""
        self.config = parser.parse_args(cast(list[str], args))
        check_checkpoint(self.config.get(f"{self.config.get('subcommand')}.ckpt_path"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a trainer from the configuration, with our progress bar unless it has another or none."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        given = config.get("callbacks") or []
        callbacks: list[Callback] = [given] if isinstance(given, Callback) else list(given)
        if self._plain:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RegularizerCallback)]
        bar = config.get("enable_progress_bar") is not False and not config.get("barebones")
        if bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(FitProgress())
        if self._get(self.config_init, "accept_checkpoint_settings", default=False):
            for callback in callbacks:
                if isinstance(callback, RegularizerCallback):
                    callback.accept_checkpoint_settings = True
        return super().instantiate_trainer(**{**kwargs, "callbacks": [*callbacks, self.fit_summary]})

    def resolved_config(self) -> dict[str, Any]:
        """Return the configuration with all defaults, as plain values."""
        command = getattr(self, "subcommand", None)
        config = self.config if command is None else self.config[command]
        resolved: dict[str, Any] = safe_load(self._parser(command).dump(config))
        return resolved

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Fit as the trainer does."""
        for name, options in self._mixin.items():
            setattr(model, name, {**getattr(model, name), **options})
        with without_mixins(model) if self._plain else nullcontext():
            self.trainer.fit(model, **kwargs)

    def after_fit(self) -> None:
        """Test if asked to, and print how the fit went."""
        result = self.fit_summary.result
        if self._get(self.config, "test_after_fit") or (self.fit_summary.resume_file and self._has_test()):
            [metrics] = self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=result.checkpoint or None, verbose=False
            )
            result.test = dict(metrics)
            self.fit_summary.result = result  # the test gave it back the state that it had in the best checkpoint
        if self.trainer.is_global_zero:
            print_result(result, get_console())

    def _has_test(self) -> bool:
        source = self.model if self.datamodule is None else self.datamodule
        return is_overridden("test_step", self.model) and is_overridden("test_dataloader", source)

    def after_predict(self) -> None:
        """Say what became of the predictions."""
        batches = self.trainer.predict_loop.predictions
        get_console().print(
            f"{len(batches)} batches predicted; a BasePredictionWriter callback would keep them.",
            highlight=False,
        )


def _quiet() -> None:
    # What hardware there is not, which products exist, that 0 workers are few: not on every run.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`tensorboardX` has been removed.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")  # every epoch has a line of ours
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")  # Lightning itself, under torch 2.13
