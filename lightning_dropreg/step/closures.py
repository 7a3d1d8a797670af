"""One batch without a Trainer: runs a closure as often as asked, with the traces of one run."""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_instance
from lightning_dropreg.errors import KinkedNetworkWarning
from lightning_dropreg.estimators import Pairs
from lightning_dropreg.estimators.counts import Counting, Counts, Rows
from lightning_dropreg.estimators.layout import Layout
from lightning_dropreg.estimators.rows import draw_rows
from lightning_dropreg.inspection.choice import chosen_estimator
from lightning_dropreg.inspection.derivatives import measure
from lightning_dropreg.inspection.first_step import check_masks_of_rows, inspect_step
from lightning_dropreg.inspection.kinks import OF_CURVATURE
from lightning_dropreg.inspection.rows import batch_norms, measure_rows
from lightning_dropreg.interception.mode import constants_marked
from lightning_dropreg.numerics.noise import draw_key, of_this_rank
from lightning_dropreg.passes import Closure, Off, run_pass
from lightning_dropreg.passes.gradients import Scaler
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.passes.last_site import follow
from lightning_dropreg.step.plan import Plan
from lightning_dropreg.step.share import StepResult

__all__ = ["ClosureRunner", "OnRows", "carry_out", "check_module"]

OnRows = Callable[[Tensor], Tensor]
"""Runs forward and loss on the rows of the batch with these numbers, and returns the scalar loss."""


class ClosureRunner:
    """A closure that runs forward and loss of one batch (a `lightning_dropreg.step.share.BatchRunner`).

    Args:
        closure: Runs on the whole batch.
        module: The module whose state advances once; None if there is none to keep.
        rows: Runs on some of the rows; None if nothing is estimated on some.
        count: Number of rows in the batch.
        mean: Whether floating-point state becomes the mean of all runs'.
    """

    releases = False
    shares_body = True
    looked_at = False
    scaler: Scaler | None = None

    def __init__(
        self, closure: Closure, module: nn.Module | None, rows: OnRows | None = None, count: int = 0, mean: bool = True
    ) -> None:
        self.isolation = Isolation(module, mean=mean)
        self._closure = closure
        self._rows = rows
        self._count = count
        self.counts = Counts()
        self.counting: Counting | None = None

    def whole(self) -> Tensor:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        return self.isolation.run(follow(self._closure))

    def aside(self) -> Tensor:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        return self.isolation.run(self._closure, trace=False)

    def rows(self, fraction: float, dim: int, key: int) -> tuple[Closure, Rows]:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        drawn, _ = draw_rows(self._count, fraction, 0, key)
        return self.on(drawn), Rows(drawn, self._count)

    def on(self, numbers: Tensor) -> Closure:
        """Return what runs on the rows of these numbers, leaving no trace."""
        on_rows = self._rows
        assert on_rows is not None
        return lambda: self.isolation.run(lambda: on_rows(numbers), trace=False)

    def paired(self, fraction: float, dim: int, key: int, clean: bool = False) -> tuple[Closure, Layout, Pairs] | None:
        """See `lightning_dropreg.step.share.BatchRunner`; where the rows lie is not looked for in every batch anew."""
        return None

    def counts_as(self, returned: Tensor, loss: Tensor) -> None:
        """See `lightning_dropreg.step.share.BatchRunner`."""

    def forget(self) -> None:
        """See `lightning_dropreg.step.share.BatchRunner`."""
        self.isolation.restart()

    def drop_stale_gradients(self) -> None:
        """See `lightning_dropreg.step.share.BatchRunner`."""


def carry_out(
    plan: Plan,
    closure: Closure,
    generator: torch.Generator | None,
    module: nn.Module | None,
    rows: OnRows | None = None,
    batch_size: int | None = None,
    mean: bool = True,
) -> StepResult:
    """Make the passes of a plan over one batch.

    Args:
        plan: What to do.
        closure: Runs on the whole batch.
        generator: Source of the seed of the noise; the global one if None.
        module: The module whose state advances once; None if there is none to keep.
        rows: Runs on some of the rows; None if nothing is estimated on some.
        batch_size: Number of rows in the batch; needed with `rows`.
        mean: Whether the state of the module becomes the mean over the passes; see `ClosureRunner`.

    Returns:
        Total loss and its parts.
    """
    check_module(module)
    if plan.has_choice:
        plan = plan.choosing(chosen_estimator(closure, module, plan.curvature))
    # drawn before the random state is remembered, or the first pass would start from another one
    key = of_this_rank(draw_key(generator))
    runner = ClosureRunner(closure, module, rows, batch_size or 0, mean)
    # a callback looks for unrecognized parts of the loss once, before the first step; here every call does
    with runner.isolation, constants_marked() if plan.needs_losses else nullcontext():
        known = _known(closure, module)
        _check_derivatives(plan, known, runner.aside)
        _check_rows(plan, known, runner, batch_size or 0, module)
        runner.counting = next((each for each in known if isinstance(each, Counting)), None)
        _check_kinks(plan, known, runner.aside)
        return plan.run(runner, key, 0)


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


def _check_derivatives(plan: Plan, known: set[object], aside: Closure) -> None:
    """Compare what autograd says with finite steps, the first time that a closure comes with these settings."""
    for followed in plan.followed:
        if followed not in known:
            estimator, curvature, mask = followed
            for found in measure(aside, estimator, curvature=curvature, mask=mask):
                if found.problem is not None:
                    raise found.problem
            known.add(followed)


def _check_rows(plan: Plan, known: set[object], runner: ClosureRunner, count: int, module: nn.Module | None) -> None:
    """Refuse rows of which some do not stand for all, and noise that rows share; the first time."""
    noise = plan.noise.estimation if plan.noise is not None else None
    shared = noise is not None and noise.batch_fraction is not None
    if not plan.row_dims or count < 2 or ("rows", shared) in known:
        return
    for _, fraction in sorted(plan.on_rows):
        drawn = Rows(draw_rows(count, fraction, 0, 0)[0], count)
        norms = [] if module is None else batch_norms(module)
        draws = runner.isolation.drew_randomness
        found = measure_rows(runner.aside, runner.on, drawn, noise=noise is not None, norms=norms, draws=draws)
        if found.problem is not None:
            raise found.problem
        known.add(found.counting)
    if noise is not None and shared:
        whole = run_pass(runner.aside, Off(), name_sites=True, need_sites=False)
        check_masks_of_rows(whole.sites, runner.on(torch.arange(count // 2)), noise.mask)
    known.add(("rows", shared))


def _check_kinks(plan: Plan, known: set[object], aside: Closure) -> None:
    """Warn of second differences across kinks, the first time."""
    if plan.curvature_of_finite_steps is None or "kinks" in known:
        return
    known.add("kinks")
    kinks = inspect_step(aside, need_losses=False, quiet=True)[0].kinks
    if kinks:
        found = ", ".join(f"{name} ({count})" for name, count in kinks.items())
        warnings.warn(
            f"There are kinks behind the dropout: {found}. {OF_CURVATURE}", KinkedNetworkWarning, stacklevel=4
        )


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


def check_module(module: object) -> None:
    """Refuse what is neither a module nor None."""
    check_instance("module", module, (nn.Module, type(None)), "an nn.Module or None")
