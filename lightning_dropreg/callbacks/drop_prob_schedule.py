"""Drop probabilities that change in the course of training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from torch import nn

from lightning_dropreg.checks import SpellsArguments, check_choice, check_count, is_number, is_one_of
from lightning_dropreg.errors import InvalidArgumentError, NoDropoutSiteError
from lightning_dropreg.placing import drop_prob_attributes, matched_drop_probs
from lightning_dropreg.placing.patterns import check_patterns
from lightning_dropreg.session.others import UndoneAtEnd

__all__ = ["DropProbSchedule"]

SCHEDULES = ("early", "late", "linear")
INTERVALS = ("epoch", "step")


class DropProbSchedule(SpellsArguments, UndoneAtEnd):
    r"""Multiplies the drop probabilities of a model's layers by a factor that changes during training.

    | ``schedule`` | factor at time ``t``                                                 |
    |--------------|----------------------------------------------------------------------|
    | ``"early"``  | 1 while ``t < length``, then 0: early dropout, against underfitting  |
    | ``"late"``   | 0 while ``t < length``, then 1: late dropout, against overfitting    |
    | ``"linear"`` | from `start` at ``t = 0`` to `end` at ``t = length``, constant after |
    | a dict       | piecewise linear through ``{t: factor}``, constant before and after  |
    | a function   | what it returns for ``t``                                            |

    ``"linear"`` with ``start=1, end=0`` is the linear early dropout of Liu et al., *Dropout Reduces Underfitting*
    (ICML 2023), which has also the other two. The regularizers of this package follow: their sites have the probability
    of the moment, and where it is 0 the loss is the plain one. When training ends, whether well or badly, the layers
    get back the probabilities that they had.

    Layers are torch's dropout layers, recurrent networks and `nn.MultiheadAttention`, and layers of anyone whose class
    is called ``...Dropout``, ``...DropPath``, ``...StochasticDepth``, ``...WeightDrop`` or ``...DropConnect`` and which
    keep ``p``, ``drop_prob`` or ``prob``. What calls a functional dropout with a probability kept elsewhere needs
    `attributes`.

    Args:
        schedule: ``"early"``, ``"late"`` or ``"linear"``; a dict of times and factors (``{0: 0.0, 2: 1.0, 10: 0.5}``),
            or a function of the time that returns the factor; in YAML the path by which it is imported.
        length: How long the first part of a named schedule lasts, at least 1.
        interval: ``"epoch"`` or ``"step"`` (optimizer steps): unit of `length` and of all times. All but ``"early"``
            and ``"late"`` move with every step either way.
        start: First factor of a linear schedule, at least 0.
        end: Last factor of a linear schedule, at least 0.
        modules: Patterns of the paths of the layers to act on (``["encoder.*"]``), or of layers and the probabilities
            that factor 1 stands for (``{"encoder.*.attn": 0.1, "*.mlp": 0.2}``, as in
            `lightning_dropreg.set_drop_prob`); None for all, with the probabilities that they have.
        attributes: Further names of attributes that hold drop probabilities.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.

    Example:
        >>> schedule = DropProbSchedule("linear", length=4, interval="step")
        >>> [schedule.factor(t) for t in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
        >>> [DropProbSchedule({0: 0.0, 2: 1.0, 10: 0.5}).factor(t) for t in (1, 2, 6, 20)]
        [0.5, 1.0, 0.75, 0.5]
    """

    drops_later = True

    acts_on_training = True

    def __init__(
        self,
        schedule: Callable[[float], float] | Mapping[float, float] | str = "linear",
        length: int = 1,
        interval: str = "epoch",
        start: float = 0.0,
        end: float = 1.0,
        modules: Sequence[str] | Mapping[str, float] | None = None,
        attributes: Sequence[str] = (),
    ) -> None:
        if isinstance(schedule, Mapping):
            _check_points(schedule)
            schedule = {float(time): float(factor) for time, factor in sorted(schedule.items())}
        elif not callable(schedule) and not is_one_of(schedule, SCHEDULES):
            raise InvalidArgumentError(
                f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}, or give a dict of times and "
                "factors, or a function of the time."
            )
        check_choice("interval", interval, INTERVALS)
        check_count("length", length)
        for name, value in (("start", start), ("end", end)):
            if not _is_factor(value):
                raise InvalidArgumentError(f"{name}={value!r} must be a finite number of at least 0.")
        if isinstance(modules, Mapping):
            check_patterns(modules, "modules")
        for name, names in (("modules", None if isinstance(modules, Mapping) else modules), ("attributes", attributes)):
            if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
                raise InvalidArgumentError(f"{name}={names!r} must be a list of strings, also for one.")
        self.schedule = schedule
        self.length = length
        self.interval = interval
        self.start = float(start)
        self.end = float(end)
        self.modules = modules
        self.attributes = tuple(attributes or ())
        self._places: dict[str, tuple[nn.Module, str, float]] = {}  # with the probability at factor 1
        self._before: list[tuple[nn.Module, str, Any]] = []
        self._counts_batches: bool | None = None

    def factor(self, time: float) -> float:
        """Return the factor at `time`, in units of `interval`.

        Raises:
            InvalidArgumentError: If a function of one's own returns what is no factor.
        """
        if isinstance(self.schedule, Mapping):
            return _through(self.schedule, time)
        if callable(self.schedule):
            factor = self.schedule(time)
            if not _is_factor(factor):
                raise InvalidArgumentError(
                    f"The schedule returned {factor!r} for time {time:g}; it must return a finite number of at least 0."
                )
            return float(factor)
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
        if isinstance(self.modules, Mapping):
            self._places = matched_drop_probs(pl_module, self.modules, self.attributes)
        else:
            self._places = {
                f"{path}.{name}" if path else name: (layer, name, float(getattr(layer, name)))
                for path, layer, name in drop_prob_attributes(pl_module, self.modules, self.attributes)
            }
        if not any(p > 0 for _, _, p in self._places.values()):
            where = "" if self.modules is None else f" among the modules {', '.join(self.modules)}"
            count = len(self._places)
            self._places = {}
            raise NoDropoutSiteError(
                f"{type(pl_module).__name__} has no layer with a positive drop probability to schedule{where} "
                f"({count} with probability 0). Name the attribute that holds it (attributes=['dropout_rate']), "
                "or give the layers the probability that the schedule's factor 1 stands for."
            )
        self._counts_batches = None
        self._before = [(layer, name, getattr(layer, name)) for layer, name, _ in self._places.values()]
        if not callable(self.schedule):
            self._check(self._largest())
        self._set(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the probabilities."""
        if self._counts_batches is None:
            self._counts_batches = _epochs_are_ahead(trainer, batch_idx)
        factor = self._set(trainer)
        pl_module.log("dropreg/drop_prob_factor", factor, on_step=True, on_epoch=False, batch_size=1)

    def _largest(self) -> float:
        if isinstance(self.schedule, Mapping):
            return max(self.schedule.values())
        return max(self.start, self.end) if self.schedule == "linear" else 1.0

    def _check(self, factor: float) -> None:
        for place, (_, _, p) in self._places.items():
            if factor * p >= 1:
                raise InvalidArgumentError(
                    f"The schedule would raise {place} from {p} to {factor * p:g}; a drop probability must stay "
                    "below 1. Lower the schedule's factors or the probability."
                )

    def _set(self, trainer: Trainer) -> float:
        factor = self.factor(self._time(trainer))
        self._check(factor)
        for layer, name, p in self._places.values():
            setattr(layer, name, p * factor)
        return factor

    def _time(self, trainer: Trainer) -> float:
        if self.interval == "step":
            return float(trainer.global_step)
        batches, loop = trainer.num_training_batches, trainer.fit_loop
        by_epoch = isinstance(self.schedule, str) and self.schedule != "linear"
        if self._counts_batches:
            return float(loop.total_batch_idx // batches) if by_epoch else loop.total_batch_idx / batches
        if by_epoch or not 0 < batches < float("inf"):
            return float(trainer.current_epoch)
        return trainer.current_epoch + loop.epoch_loop.batch_idx / batches

    def undo(self) -> None:
        """Put the probabilities back."""
        for layer, name, p in self._before:
            setattr(layer, name, p)
        self._places, self._before = {}, []


def _epochs_are_ahead(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a resumed run counts more epochs than its batches make, told by its first batch.

    Lightning takes the epoch in which a run stops at ``max_steps`` for done, and goes on in the middle of the next.

    Returns:
        Whether that is so.
    """
    batches = trainer.num_training_batches
    if not batch_idx or not 0 < batches < float("inf"):
        return False
    ahead = trainer.current_epoch - (trainer.fit_loop.total_batch_idx - batch_idx) / batches
    return ahead > 0 and ahead == int(ahead)


def _is_factor(value: Any) -> bool:
    return is_number(value) and value >= 0


def _check_points(points: Mapping[Any, Any]) -> None:
    if not points or not all(_is_factor(number) for pair in points.items() for number in pair):
        raise InvalidArgumentError(
            f"schedule={dict(points)!r} must have at least one time, and its times and factors must be finite numbers "
            "of at least 0."
        )


def _through(points: Mapping[float, float], time: float) -> float:
    """The value at `time` of the line through sorted points."""
    times = list(points)
    after = bisect_right(times, time)
    if after in {0, len(times)}:
        return points[times[max(after - 1, 0)]]
    left, right = times[after - 1], times[after]
    return points[left] + (points[right] - points[left]) * (time - left) / (right - left)
