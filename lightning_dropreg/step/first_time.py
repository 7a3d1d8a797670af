"""What a closure is checked for the first time that it comes; a fit checks the same before its first step."""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.errors import KinkedNetworkWarning
from lightning_dropreg.estimators.counts import Counting, Rows
from lightning_dropreg.estimators.rows import draw_rows
from lightning_dropreg.inspection.derivatives import measure
from lightning_dropreg.inspection.first_step import check_masks_of_rows, inspect_step
from lightning_dropreg.inspection.kinks import OF_CURVATURE, told
from lightning_dropreg.inspection.rows import batch_norms, measure_rows
from lightning_dropreg.passes import Closure, Off, run_pass
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.step.plan import Plan

__all__ = ["check_first_time"]


def check_first_time(
    plan: Plan,
    closure: Closure,
    module: nn.Module | None,
    isolation: Isolation,
    on: Callable[[Tensor], Closure],
    count: int,
) -> Counting | None:
    """Refuse what a plan cannot be right for, where a closure comes with such a plan for the first time.

    Args:
        plan: What to do.
        closure: What the user passed.
        module: The module that was passed along.
        isolation: Lets runs leave no trace; entered.
        on: Makes what runs on the rows of given numbers, leaving no trace.
        count: Number of rows in the batch.

    Returns:
        How the elements of some rows find what they count in the whole batch; None if no rows are drawn.
    """
    known = _known(closure, module)

    def run() -> Tensor:
        return isolation.run(closure, trace=False)

    _check_derivatives(plan, known, run)
    if plan.on_rows and count > 1:
        norms = [] if module is None else batch_norms(module)
        _check_rows(plan, known, run, on, count, norms, isolation)
    _check_kinks(plan, known, run)
    return next((each for each in known if isinstance(each, Counting)), None)


def _check_derivatives(plan: Plan, known: set[object], run: Closure) -> None:
    """Compare what autograd says with finite steps, the first time that a closure comes with these settings."""
    for followed in plan.followed:
        if followed not in known:
            estimator, curvature, mask = followed
            for found in measure(run, estimator, curvature=curvature, mask=mask):
                if found.problem is not None:
                    raise found.problem
            known.add(followed)


def _check_rows(
    plan: Plan,
    known: set[object],
    run: Closure,
    on: Callable[[Tensor], Closure],
    count: int,
    norms: Sequence[str],
    isolation: Isolation,
) -> None:
    """Refuse rows of which some do not stand for all, and noise that rows share; the first time."""
    noise = plan.noise.estimation if plan.noise is not None else None
    shared = noise is not None and noise.batch_fraction is not None
    if ("rows", shared) in known:
        return
    for _, fraction in sorted(plan.on_rows):
        drawn = Rows(draw_rows(count, fraction, 0, 0)[0], count)
        found = measure_rows(run, on, drawn, noise=noise is not None, norms=norms, draws=isolation.drew_randomness)
        if found.problem is not None:
            raise found.problem
        known.add(found.counting)
    if noise is not None and shared:
        whole = run_pass(run, Off(), name_sites=True, need_sites=False)
        check_masks_of_rows(whole.sites, on(torch.arange(count // 2)), noise.mask)
    known.add(("rows", shared))


def _check_kinks(plan: Plan, known: set[object], run: Closure) -> None:
    """Warn of second differences across kinks, the first time."""
    if plan.curvature_of_finite_steps is None or "kinks" in known:
        return
    known.add("kinks")
    kinks = inspect_step(run, need_losses=False, quiet=True)[0].kinks
    if kinks:
        text = f"There are kinks behind the dropout: {told(kinks)}. {OF_CURVATURE}"
        warnings.warn(text, KinkedNetworkWarning, stacklevel=5)


_checked: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], set[object]]] = weakref.WeakKeyDictionary()


def _known(closure: Closure, module: nn.Module | None) -> set[object]:
    """Return what was found right about a closure before, to be added to.

    A lambda that is made anew for every batch is the same closure if it has the same code and captures the same modules
    and functions, for the same module if that is given; the data it captures are another batch's.

    Returns:
        What was checked.
    """
    try:
        code, *captured = _captured(closure)
        key = (*captured, None if module is None else weakref.ref(module))
        return _checked.setdefault(code, {}).setdefault(key, set())
    except (TypeError, ValueError, RecursionError):  # an object that cannot be remembered
        return set()


def _captured(value: Any) -> tuple[Any, ...]:
    """What a function does, as its code and everything that it captures but data; others are what they are."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return (value,)
    if isinstance(value, (Tensor, list, tuple, dict, set)):
        return (type(value),)  # data: another batch's
    if isinstance(value, types.MethodType):
        return (value.__func__.__code__, weakref.ref(value.__self__))
    if not isinstance(value, types.FunctionType):
        return (weakref.ref(value),) if not isinstance(value, types.BuiltinFunctionType) else (value,)
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    inside = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return (value.__code__, *(_captured(each) for each in inside))
