"""The progress bar: loss and penalty while training, one line per finished epoch, validation in it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    CustomTimeColumn,
    ProcessingSpeedColumn,
    RichProgressBarTheme,
)
from rich import get_console
from rich.progress import BarColumn, TimeRemainingColumn

__all__ = ["FitProgress"]

# Short name, and the logged names it stands for, the first that exists winning: of the last step, and of an epoch.
# R is the penalty before its strength.
SHOWN = {
    "loss": ("train_loss_step", "train_loss", "dropreg/loss", "loss"),
    "penalty R": ("dropreg/explicit_penalty",),
}
SHOWN_OF_EPOCH = {
    "loss": ("dropreg/loss_epoch", "train_loss_epoch", "train_loss", "loss"),
    "penalty R": ("dropreg/explicit_penalty_epoch",),
    "val ppl": ("val_ppl",),
    "val loss": ("val_loss",),
}
_REFRESH_PER_SECOND = 5
_BAR_WIDTH = 8
_WIDE = (CustomTimeColumn, ProcessingSpeedColumn)


class FitProgress(RichProgressBar):
    """Lightning's rich progress bar, showing what matters here, under a line for every finished epoch.

    Where the output is no terminal (a file, a pipe, a CI log) only the lines are printed.
    """

    def __init__(self) -> None:
        super().__init__(
            refresh_rate=_REFRESH_PER_SECOND,
            theme=RichProgressBarTheme(metrics_format=".4g", metrics_text_delimiter="  "),
        )
        if not get_console().is_terminal:
            self.disable()
        self._epoch_start = 0.0
        self._metrics: dict[str, float] = {}
        self._read_at = 0.0

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Keep the columns before the metrics short, so that all fits into a terminal of 80 characters."""
        kept = [c for c in super().configure_columns(trainer) if not isinstance(c, _WIDE)]
        for column in kept:
            if isinstance(column, BarColumn):
                column.bar_width = _BAR_WIDTH
        return [*kept, TimeRemainingColumn(compact=True, elapsed_when_finished=True)]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the bar shows, read only as often as it is drawn: reading makes a GPU wait for its queue."""
        now = time.monotonic()
        if now - self._read_at > 1 / _REFRESH_PER_SECOND:
            self._metrics = shown_metrics(trainer)
            self._read_at = now
        return dict(self._metrics)

    def _get_train_description(self, current_epoch: int) -> str:
        # Counted from 1, as in the lines and in the result. Should Lightning rename this: from 0.
        return f"Epoch {_of(current_epoch + 1, self.trainer)}"

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._epoch_start = time.monotonic()
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line."""
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        metrics = "".join(f"  {name} {value:9.4g}" for name, value in shown_metrics(trainer, SHOWN_OF_EPOCH).items())
        seconds = time.monotonic() - self._epoch_start
        get_console().print(
            f"epoch {_of(trainer.current_epoch + 1, trainer):>7}{metrics}  {seconds:5.1f} s",
            highlight=False,
            soft_wrap=True,
        )


def _of(epoch: int, trainer: Trainer) -> str:
    return f"{epoch}/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else str(epoch)


def shown_metrics(trainer: Trainer, shown: Mapping[str, Sequence[str]] = SHOWN) -> dict[str, float]:
    """Read the metrics of `shown`, names by short name, that have been logged."""
    logged = trainer.callback_metrics
    found = {short: next((n for n in names if n in logged), None) for short, names in shown.items()}
    if found.get("val ppl"):
        found.pop("val loss")
    return {short: float(logged[name]) for short, name in found.items() if name}
