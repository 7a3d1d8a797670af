"""What a training step logs when it runs several times for one batch: once, the mean over the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_dropreg.numerics.context import nothing, patched

__all__ = ["LogCollector"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


class LogCollector:
    """Holds back ``module.log(...)`` during the runs of one batch and replays it afterwards.

    Without it, a value logged with ``reduce_fx="sum"`` would count once per run. A step that reads back what it has
    just logged (``self.trainer.callback_metrics``) finds it; what it prints by ``self.print`` or hands to a logger or
    its ``experiment`` itself comes from the first run that is kept.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._runs: list[list[Call]] = []
        self._last: list[Call] = []
        self._before: dict[str, dict[str, Any]] | None = None

    @contextmanager
    def run(self, keep: bool) -> Iterator[None]:
        """Collect the calls of one run, to be replayed if they are to `keep`."""
        calls: list[Call] = []
        self._last = calls

        def log(*args: Any, **kwargs: Any) -> None:
            # values without their graphs, which would otherwise live as long as the batch
            calls.append((tuple(_detached(arg) for arg in args), {k: _detached(v) for k, v in kwargs.items()}))

        trainer = getattr(self._module, "_trainer", None)
        patches: list[tuple[Any, str, Any]] = [(self._module, "log", log)]
        if trainer is not None:
            read = _Reading(trainer, calls, self._module.log, self._before)
            patches.append((trainer, "_logger_connector", read))
        if self._runs or not keep:
            patches.append((self._module, "print", nothing))
            loggers = getattr(trainer, "loggers", [])
            if loggers:
                patches.append((trainer, "_loggers", [_Quiet(logger) for logger in loggers]))
            for holder in [*loggers, *(getattr(logger, "_experiment", None) for logger in loggers)]:  # kept elsewhere
                names = dir(type(holder)) if hasattr(holder, "__dict__") else ()
                patches += [(holder, name, nothing) for name in names if name.startswith(_WRITERS)]
        with patched(*patches):
            yield
        if keep:
            self._runs.append(calls)

    def remember(self) -> None:
        """Let runs that come after `replay` read what was there before it."""
        trainer = self._module.trainer
        names = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
        self._before = {name: dict(getattr(trainer, name)) for name in names}

    def forget(self) -> None:
        """Drop what was kept."""
        self._runs.clear()

    def last(self, instead: Mapping[Tensor, Tensor] | None = None, share: float = 1.0) -> list[Any]:
        """Return what the last run logged, kept or not; see `replay`."""
        return [_with(call, instead or {}, share) for call in self._last]

    def names(self) -> list[str]:
        """Return the names that the last run logged, kept or not."""
        return [str(_named_value(*call)[0]) for call in self._last]

    def replay(self, instead: Mapping[Tensor, Tensor] | None = None, share: float = 1.0) -> None:
        """Log what the kept runs logged, averaged where it is a number.

        Args:
            instead: Tensors to log in the place of others.
            share: What to multiply a ``batch_size`` by, where the runs had more rows than the batch.
        """
        if instead:
            self._runs = [[_with(call, instead, share) for call in calls] for calls in self._runs]
        if not self._runs:
            return
        first, *others = self._runs
        for position, (args, kwargs) in enumerate(first):
            name, value = _named_value(args, kwargs)
            values = [value]
            for calls in others:
                if position < len(calls) and _named_value(*calls[position])[0] == name:
                    values.append(_named_value(*calls[position])[1])
            rest = {k: v for k, v in kwargs.items() if k not in {"name", "value"}}
            self._module.log(name, _mean(values), *args[2:], **rest)


class _Reading:
    """The connector of a Trainer's logging, that knows what the step has logged in this run; see `LogCollector`."""

    def __init__(
        self,
        trainer: Any,
        calls: list[Call],
        log: Callable[..., None],
        before: Mapping[str, dict[str, Any]] | None,
    ) -> None:
        self._trainer, self._calls, self._log, self._before = trainer, calls, log, before
        self._connector = trainer._logger_connector

    def __getattr__(self, name: str) -> Any:
        """All else is the connector's own."""
        return getattr(self._connector, name)

    callback_metrics = property(lambda self: self._read("callback_metrics", "callback"))
    logged_metrics = property(lambda self: self._read("logged_metrics", "log"))
    progress_bar_metrics = property(lambda self: self._read("progress_bar_metrics", "pbar"))

    def _read(self, name: str, kind: str) -> dict[str, Any]:
        earlier = getattr(self._connector, name) if self._before is None else self._before[name]
        return {**earlier, **self._now(kind)}

    def _now(self, kind: str) -> dict[str, Any]:
        """Log for real what this run has logged so far, into results of its own, and read them."""
        loop = self._trainer.fit_loop.epoch_loop
        results = loop._results
        if not self._calls or self._trainer._results is not results:
            return {}
        scratch = type(results)(training=True)
        for name in ("batch", "batch_size", "dataloader_idx"):
            setattr(scratch, name, getattr(results, name))
        with patched((loop, "_results", scratch), (self._trainer, "_logger_connector", self._connector)):
            for args, kwargs in self._calls:
                self._log(*args, **kwargs)
            found: dict[str, Any] = scratch.metrics(True)[kind]
        return found


_WRITERS = ("add_", "append", "log_", "track", "write")
"""So begin the names of methods of loggers and experiments that write something."""


class _Quiet:
    """Stands for a logger, or for its experiment, in runs of which nothing may be left: it answers, and writes nothing.

    Args:
        of: What it stands for; None if that is not there yet.
        logger: Whether that is the logger, whose experiment must not be made for it.
    """

    def __init__(self, of: Any, logger: bool = True) -> None:
        self.__dict__.update(_of=of, _is_logger=logger)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """That of what it stands for, which a step may ask about."""
        return type(self) if self._of is None else type(self._of)

    def __getattr__(self, name: str) -> Any:
        """What it is asked is answered, what it is told to do is not done."""
        if self._is_logger and name == "experiment":
            return _Quiet(getattr(self._of, "_experiment", None), logger=False)
        value = getattr(self._of, name, self)
        quiet = value is self or (callable(value) and (not self._is_logger or name.startswith(_WRITERS)))
        return self if quiet else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Do nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Quiet:
        """Do nothing."""
        return self

    def __getitem__(self, key: Any) -> _Quiet:
        """Answer with nothing."""
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Do nothing."""


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _with(
    call: tuple[tuple[Any, ...], dict[str, Any]], instead: Mapping[Tensor, Tensor], share: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def exchanged(value: Any) -> Any:
        for old, new in instead.items():
            if isinstance(value, Tensor) and value.numel() == 1 and value.data_ptr() == old.data_ptr():
                return new.detach().reshape(value.shape)
        return value

    args, kwargs = call
    kwargs = {k: exchanged(v) for k, v in kwargs.items()}
    if isinstance(kwargs.get("batch_size"), int):
        kwargs["batch_size"] = round(kwargs["batch_size"] * share)
    return tuple(exchanged(arg) for arg in args), kwargs


def _named_value(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
    name = args[0] if args else kwargs["name"]
    return name, args[1] if len(args) > 1 else kwargs["value"]


def _mean(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.is_floating_point() and all(v.shape == first.shape for v in values):
        return torch.stack([v.detach() for v in values]).mean(0)
    if isinstance(first, float):
        return sum(values) / len(values)
    return first  # metrics, counts: they advance once
