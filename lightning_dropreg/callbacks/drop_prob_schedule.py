"""Drop probabilities that change in the course of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn

from lightning_dropreg.checks import check_count
from lightning_dropreg.errors import InvalidArgumentError, NoDropoutSiteError
from lightning_dropreg.placing import drop_prob_attributes

__all__ = ["DropProbSchedule"]

SCHEDULES = ("early", "late", "linear")
INTERVALS = ("epoch", "step")


class DropProbSchedule(Callback):
    r"""Multiplies the drop probabilities of a model's layers by a factor that changes during training.

    | ``schedule`` | factor at time ``t``                                                 |
    |--------------|----------------------------------------------------------------------|
    | ``"early"``  | 1 while ``t < length``, then 0: early dropout, against underfitting  |
    | ``"late"``   | 0 while ``t < length``, then 1: late dropout, against overfitting    |
    | ``"linear"`` | from `start` at ``t = 0`` to `end` at ``t = length``, constant after |

    ``"linear"`` with ``start=1, end=0`` is the linear early dropout of Liu et al., *Dropout Reduces Underfitting*
    (ICML 2023), which has also the other two. The regularizers of this package follow: their sites have the probability
    of the moment, and where it is 0 the loss is the plain one. When training ends, whether well or badly, the layers
    get back the probabilities that they had.

    Layers are torch's dropout layers, recurrent networks and `nn.MultiheadAttention`, and layers of anyone whose class
    is called ``...Dropout``, ``...DropPath``, ``...StochasticDepth``, ``...WeightDrop`` or ``...DropConnect`` and which
    keep ``p``, ``drop_prob`` or ``prob``. What calls a functional dropout with a probability kept elsewhere needs
    `attributes`.

    Args:
        schedule: ``"early"``, ``"late"`` or ``"linear"``.
        length: How long the first part lasts, at least 1.
        interval: ``"epoch"`` or ``"step"`` (optimizer steps): unit of `length`. A linear schedule moves with every step
            either way.
        start: First factor of a linear schedule, at least 0.
        end: Last factor of a linear schedule, at least 0.
        modules: Patterns of the paths of the layers to act on (``["encoder.*"]``); None for all.
        attributes: Further names of attributes that hold drop probabilities.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.

    Example:
        >>> schedule = DropProbSchedule("linear", length=4, interval="step")
        >>> [schedule.factor(t) for t in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    drops_later = True

    acts_on_training = True

    def __init__(
        self,
        schedule: str = "linear",
        length: int = 1,
        interval: str = "epoch",
        start: float = 0.0,
        end: float = 1.0,
        modules: Sequence[str] | None = None,
        attributes: Sequence[str] = (),
    ) -> None:
        if schedule not in SCHEDULES:
            raise InvalidArgumentError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
        if interval not in INTERVALS:
            raise InvalidArgumentError(f"interval={interval!r} is unknown; choose one of {', '.join(INTERVALS)}.")
        check_count("length", length)
        for name, value in (("start", start), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InvalidArgumentError(f"{name}={value!r} must be a finite number of at least 0.")
        for name, names in (("modules", modules), ("attributes", attributes)):
            if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
                raise InvalidArgumentError(f"{name}={names!r} must be a list of strings, also for one.")
        self.schedule = schedule
        self.length = length
        self.interval = interval
        self.start = float(start)
        self.end = float(end)
        self.modules = modules
        self.attributes = tuple(attributes or ())
        self._places: list[tuple[nn.Module, str, float]] = []

    def factor(self, time: float) -> float:
        """Return the factor at `time`, in units of `interval`."""
        if self.schedule == "early":
            return float(time < self.length)
        if self.schedule == "late":
            return float(time >= self.length)
        return self.start + (self.end - self.start) * min(time / self.length, 1.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers.

        Raises:
            NoDropoutSiteError: If there is none.
            InvalidArgumentError: If a probability would reach 1.
        """
        found = list(drop_prob_attributes(pl_module, self.modules, self.attributes))
        self._places = [(layer, name, float(getattr(layer, name))) for _, layer, name in found]
        if not any(p > 0 for _, _, p in self._places):
            where = "" if self.modules is None else f" among the modules {', '.join(self.modules)}"
            raise NoDropoutSiteError(
                f"{type(pl_module).__name__} has no layer with a positive drop probability to schedule{where} "
                f"({len(found)} with probability 0). Name the attribute that holds it (attributes=['dropout_rate']), "
                "or give the layers the probability that the schedule's factor 1 stands for."
            )
        largest = max(self.start, self.end) if self.schedule == "linear" else 1.0
        for (path, _, name), (_, _, p) in zip(found, self._places, strict=True):
            if largest * p >= 1:
                raise InvalidArgumentError(
                    f"The schedule would raise {path}.{name} from {p} to {largest * p:g}; a drop probability must stay "
                    "below 1. Lower start, end or the probability."
                )
        self._set(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the probabilities."""
        factor = self._set(trainer)
        pl_module.log("dropreg/drop_prob_factor", factor, on_step=True, on_epoch=False, batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the probabilities back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the probabilities back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the probabilities back."""
        self._restore()

    def _set(self, trainer: Trainer) -> float:
        factor = self.factor(self._time(trainer))
        for layer, name, p in self._places:
            setattr(layer, name, p * factor)
        return factor

    def _time(self, trainer: Trainer) -> float:
        if self.interval == "step":
            return float(trainer.global_step)
        if self.schedule != "linear":
            return float(trainer.current_epoch)
        batches = trainer.num_training_batches
        done = trainer.fit_loop.epoch_loop.batch_idx / batches if 0 < batches < float("inf") else 0.0
        return trainer.current_epoch + done

    def _restore(self) -> None:
        for layer, name, p in self._places:
            setattr(layer, name, p)
        self._places = []
