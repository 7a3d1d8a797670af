"""Whether a step does the same thing when it is called again: run twice without dropout from the same state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.errors import DropregError, NotRepeatableError
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.passes import Closure, Off, Pass, run_pass
from lightning_dropreg.passes.batches import is_array

__all__ = ["Trace", "compare_runs"]

State = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Trace:
    """What one run gave and left."""

    loss: Tensor
    elements: list[Tensor]
    losses: list[str]
    sites: list[tuple[str, float, tuple[int, ...]]]
    state: State

    @classmethod
    def of(cls, done: Pass, state: State) -> Trace:
        """Take down what a pass, its losses recorded, gave, and the state it would leave; its graph is not held."""
        return cls(
            done.loss.detach(),
            [loss.elements.detach() for loss in done.losses],
            [loss.name for loss in done.losses],
            [(site.kind, site.p, tuple(site.shape)) for site in done.sites],
            state,
        )


def compare_runs(
    closure: Closure,
    state: Callable[[], State],
    name: str,
    moving: Mapping[str, Any],
    put_back: Sequence[str] = (),
    runs: Sequence[Callable[[], Trace]] = (),
) -> list[Measured]:
    """Run a step twice without dropout and compare loss, elements of the losses, sites, and what is left.

    Args:
        closure: Runs the step from the same state every time, leaving no trace.
        state: Returns what the last run would leave: one dict for each module or object.
        name: Of the step, for messages.
        moving: What the step can reach and nobody can put back, by place.
        put_back: Places of random generators of the step's own that it draws from and that are put back.
        runs: Make the two runs, under another rule for dropout; by default they are made without dropout.

    Returns:
        What was found of ``repeatable`` and ``state_put_back``.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout())
        >>> calls = []
        >>> def step():
        ...     calls.append(1)
        ...     return net(torch.ones(3, 2)).square().mean() * len(calls)
        >>> compare_runs(step, lambda: [], "step", {})[0].outcome
        'error'
    """
    one, other = runs or [lambda: _trace(closure, state)] * 2
    first = one()
    try:
        second = other()
    except Exception as error:
        if isinstance(error, (DropregError, torch.OutOfMemoryError)):
            raise
        problem = _refusal(name, f"the second time it raised {type(error).__name__}: {error}", moving)
        problem.__cause__ = error
        return [Measured("repeatable", outcome="error", problem=problem)]
    size, tolerance = _difference(first, second), _tolerance(first.loss)
    text = _said(first, second, size, tolerance)
    if text:
        return [Measured("repeatable", size, tolerance, "error", problem=_refusal(name, text, moving))]
    note, outcome = "two runs: loss, elements and sites", "holds"
    if put_back:
        note, outcome = f"{note}; put back: {', '.join(put_back)}", "right value"
    found = [Measured("repeatable", size, tolerance, outcome, note)]
    left = [
        name
        for a, b in zip(first.state, second.state, strict=False)
        for name in a.keys() | b.keys()
        if name not in a or name not in b or _differs(a[name], b[name], tolerance)
    ]
    if left:
        told = (
            f"{name} leaves something else in {', '.join(sorted(set(left)))} when it is called again with the same "
            "batch from the same state. What is left after a batch is that of its first run."
        )
        return [*found, Measured("state_put_back", outcome="warning", note=told)]
    return [*found, Measured("state_put_back", note=f"the same in {len(first.state)} modules and objects")]


def _trace(closure: Closure, state: Callable[[], State]) -> Trace:
    return Trace.of(run_pass(closure, Off(), record_losses=True, need_sites=False, problems=[]), state())


def _said(first: Trace, second: Trace, size: float, tolerance: float) -> str:
    """What is not the same, in words; empty if nothing."""
    if first.losses != second.losses:
        return f"it computed the losses {first.losses} and then {second.losses}"
    if first.sites != second.sites:
        return f"it reached {len(first.sites)} dropout sites and then {len(second.sites)}, or others"
    if not size <= tolerance:
        return f"its loss was {float(first.loss):.6g} and then {float(second.loss):.6g}, or its elements differ"
    return ""


def _refusal(name: str, text: str, moving: Mapping[str, Any]) -> NotRepeatableError:
    suspects = ", ".join(f"{place} ({type(value).__name__})" for place, value in list(moving.items())[:8])
    found = (
        f" It can reach what moves on and cannot be put back: {suspects}."
        if suspects
        else " Nothing that it can reach is known to move on: look for random numbers of the system's or a device's, "
        "files, counters outside of the module, or a foreign object."
    )
    return NotRepeatableError(
        f"{name} does something else when it is called again with the same batch, from the same state, with the "
        f"same noise in place of dropout: {text}. Passes over one batch are compared with one another, so they must "
        f"differ in the dropout alone.{found} Fetch what is new in on_train_batch_start, or in the data loader, so "
        "that the step only uses it; a random generator kept on the module is put back for every pass."
    )


def _difference(first: Trace, second: Trace) -> float:
    pairs = [(first.loss, second.loss), *zip(first.elements, second.elements, strict=False)]
    return max(_relative(a, b) for a, b in pairs)


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    off = torch.where(same, 0.0, a - b).norm() / a.nan_to_num(0.0, 0.0, 0.0).norm().clamp_min(1e-300)
    return float(off.nan_to_num(float("inf")))


def _tolerance(loss: Tensor) -> float:
    """Rounding, which on some devices comes out otherwise every time."""
    return float(torch.finfo(loss.dtype).eps ** 0.5)


def _differs(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two values of an attribute show that something else was done; clocks, and foreign objects, do not."""
    if a is b:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.detach(), b.detach()
        plain = a.layout == b.layout == torch.strided and not (a.is_nested or b.is_nested)
        return plain and (a.shape != b.shape or not _relative(a, b) <= tolerance)
    if is_array(a) and is_array(b):
        return bool(a.shape != b.shape or a.tobytes() != b.tobytes())
    if type(a) is not type(b):
        return False
    if isinstance(a, (bool, int, str, bytes)):
        return bool(a != b)
    if type(a) in (list, tuple) and len(a) <= 256:
        return len(a) != len(b) or any(map(_differs, a, b, [tolerance] * len(a)))
    if type(a) is dict and len(a) <= 256:
        return a.keys() != b.keys() or any(_differs(a[key], b[key], tolerance) for key in a)
    return False
