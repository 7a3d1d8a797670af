"""How a fit went: measured by a callback, shown as a table."""

import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["FitResult", "FitSummary", "print_result"]

_METRICS = ("val_ppl", "val_loss")


@dataclass
class FitResult:
    """The outcome of one fit."""

    metric: str | None = None
    """Name of the validation metric; None if nothing was validated."""
    best: float = math.inf
    best_epoch: int = 0
    """Epoch of the best value, counted from 1."""
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Wall-clock of the fit, validation included."""
    ms_per_step: float = math.nan
    """Median milliseconds from the start to the end of a training batch."""
    penalty: float | None = None
    """Mean over the last epoch of the explicit penalty, before its strength."""
    checkpoint: str = ""
    log_dir: str = ""
    test: dict[str, float] = field(default_factory=dict)
    """Test metrics of the best checkpoint, if asked for."""
    history: list[tuple[int, float, float]] = field(default_factory=list)
    """Epoch (from 1), validation metric, and seconds since the start, for every validation."""
    mode: str = "min"
    """``"max"`` if a higher value of the metric is better."""

    def as_good(self, value: float, other: float) -> bool:
        """Return whether one value of the metric is as good as another, or better."""
        return value >= other if self.mode == "max" else value <= other


class FitSummary(Callback):
    """Measures a fit; `result` is complete when training ends.

    Args:
        resume_file: Where to keep a checkpoint of the last whole epoch, for a fit that is killed, and beside it the
            weights of the best epoch, ``best.ckpt``, if no callback keeps them by that metric; None for none.
        monitor: The validation metric to judge by; None for what the checkpoint callback watches, else a loss.
        mode: ``"max"`` if a higher value of `monitor` is better.
    """

    def __init__(self, resume_file: Path | None = None, monitor: str | None = None, mode: str = "min") -> None:
        self.result = FitResult()
        self.resume_file = resume_file
        self.monitor = (monitor, mode)
        self._fit_start = self._step_start = 0.0
        self._step_seconds: list[float] = []
        self._resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        if not self._resumed:
            self.result, self._step_seconds = FitResult(), []
        self._resumed = False
        self.result.log_dir = trainer.log_dir or ""
        self._fit_start = time.monotonic() - self.result.seconds  # a resumed fit goes on

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the step's clock."""
        self._step_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's time."""
        self._step_seconds.append(time.monotonic() - self._step_start)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best value of the validation metric."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.result.metric, self.result.mode = self._metric(trainer)
        value = float(trainer.callback_metrics[self.result.metric]) if self.result.metric else math.nan
        epoch = trainer.current_epoch + 1
        better = math.isfinite(value) and not (self.result.best_epoch and self.result.as_good(self.result.best, value))
        if better:
            self.result.best, self.result.best_epoch = value, epoch
        if self.resume_file is not None and not self._is_kept(trainer) and trainer.strategy.broadcast(better):
            best = self.resume_file.with_name("best.ckpt")
            trainer.save_checkpoint(best, weights_only=True)
            self.result.checkpoint = str(best)
        self.result.seconds = time.monotonic() - self._fit_start
        self.result.history.append((epoch, value, self.result.seconds))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what is needed to go on from here."""
        if self.resume_file is not None:
            unfinished = self.resume_file.with_suffix(".part")
            trainer.save_checkpoint(unfinished)
            unfinished.replace(self.resume_file)  # whole or not at all

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit must know of its beginning.

        The random state too, which Lightning does not keep: dropout goes on as if nothing had happened.
        """
        return {
            "result": asdict(self.result),
            "step_seconds": self._step_seconds,
            "random_state": _get_random_state() if self.resume_file is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the beginning of a resumed fit."""
        self.result = FitResult(**state_dict["result"])
        self._step_seconds = list(state_dict["step_seconds"])
        self._resumed = True
        if state_dict["random_state"] is not None:
            # now, before the data loader's first iteration, which draws from it
            _set_random_state(state_dict["random_state"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the result."""
        result = self.result
        result.seconds = time.monotonic() - self._fit_start
        result.epochs = trainer.current_epoch
        result.steps = len(self._step_seconds)
        result.ms_per_step = 1000 * median(self._step_seconds) if result.steps else math.nan
        if "dropreg/explicit_penalty_epoch" in trainer.callback_metrics:
            result.penalty = float(trainer.callback_metrics["dropreg/explicit_penalty_epoch"])
        keeper = trainer.checkpoint_callback
        if isinstance(keeper, ModelCheckpoint) and (self._is_kept(trainer) or not result.checkpoint):
            result.checkpoint = keeper.best_model_path

    def _metric(self, trainer: Trainer) -> tuple[str | None, str]:
        """The validation metric by which fits are compared, and which of its values are better."""
        logged = trainer.callback_metrics
        losses = [name for name in logged if name.startswith("val") and ("loss" in name or "ppl" in name)]
        wanted = [self.monitor, _watched(trainer), *((name, "min") for name in (*_METRICS, *losses))]
        if self.monitor[0] and self.monitor[0] not in logged:
            raise InvalidArgumentError(f"--monitor {self.monitor[0]} is not logged; there is {', '.join(logged)}.")
        return next(((name, mode) for name, mode in wanted if name in logged), (None, "min"))

    def _is_kept(self, trainer: Trainer) -> bool:
        """Whether a checkpoint callback keeps the best by the same metric."""
        return _watched(trainer)[0] is not None and _watched(trainer) == self._metric(trainer)


def _watched(trainer: Trainer) -> tuple[str | None, str]:
    """What a checkpoint callback watches, and its mode; what training logs is no judge."""
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.monitor and not keeper.monitor.startswith("train"):
        return keeper.monitor, keeper.mode
    return None, "min"


def _get_random_state() -> dict[str, Any]:
    """The global random states, as plain values that a checkpoint can hold."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {**state, "state": {k: np.asarray(v).tolist() for k, v in state["state"].items()}},
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002


def print_result(result: FitResult, console: Console) -> None:
    """Print a result as a table, and below it the paths, unbroken so that they can be copied."""
    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    if result.metric:
        table.add_row(f"best {result.metric}", f"{result.best:.4g}  (epoch {result.best_epoch} of {result.epochs})")
    for name, value in result.test.items():
        table.add_row(name, f"{value:.4g}" + ("  (best checkpoint)" if result.checkpoint else ""))
    table.add_row("wall-clock", f"{result.seconds:.1f} s")
    table.add_row("per step", f"{result.ms_per_step:.1f} ms  (median of {result.steps})")
    if result.penalty is not None:
        table.add_row("penalty R", f"{result.penalty:.4f}  (mean of the last epoch, before its strength)")
    console.print(table)
    for name, path in (("checkpoint", result.checkpoint), ("logs", result.log_dir)):
        if path:
            console.print(f"{name + ':':<11} {path}", highlight=False, soft_wrap=True)
