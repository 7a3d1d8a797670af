"""What a training step logs when it runs several times for one batch: once, the mean over the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

__all__ = ["LogCollector"]


class LogCollector:
    """Holds back ``module.log(...)`` during the runs of one batch and replays it afterwards.

    Without it, a value logged with ``reduce_fx="sum"`` would count once per run.

    Args:
        module: The module whose logging is collected.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._runs: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._last: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def run(self, keep: bool) -> Iterator[None]:
        """Collect the calls of one run.

        Args:
            keep: Whether they will be replayed, or are dropped.

        Yields:
            Nothing.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._last = calls

        def log(*args: Any, **kwargs: Any) -> None:
            # values without their graphs, which would otherwise live as long as the batch
            calls.append((tuple(_detached(arg) for arg in args), {k: _detached(v) for k, v in kwargs.items()}))

        own = self._module.__dict__.get("log")
        self._module.__dict__["log"] = log
        try:
            yield
        finally:
            if own is None:
                self._module.__dict__.pop("log", None)
            else:
                self._module.__dict__["log"] = own
        if keep:
            self._runs.append(calls)

    def forget(self) -> None:
        """Drop what was kept."""
        self._runs.clear()

    def last(self, instead: Mapping[Tensor, Tensor] | None = None, share: float = 1.0) -> list[Any]:
        """Return what the last run logged, kept or not.

        Args:
            instead: See `replay`.
            share: See `replay`.

        Returns:
            The calls.
        """
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
