"""Which estimator ``estimator="auto"`` is, on the step at hand.

Antithetic where the network is smooth behind its dropout: two ordinary passes, for anything that has a backward. Where
there are kinks (ReLU, max-pooling), the noise of a finite step is larger than ``xi_approx`` (`inspection.kinks`);
forward mode follows the definition there, at about the same cost, if the operations of the model have its formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_dropreg.errors import DropregError
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.inspection.derivatives import compare_derivatives
from lightning_dropreg.inspection.first_step import inspect_step
from lightning_dropreg.inspection.kinks import noise_excess
from lightning_dropreg.inspection.support import failure
from lightning_dropreg.passes import Closure
from lightning_dropreg.passes.isolation import Isolation

__all__ = ["Choice", "FractionChoice", "choose_estimator", "chosen_estimator", "short", "too_small"]

FEW_ROWS, FEW_EXAMPLES = 8, 32
"""Below either, a quarter of the rows is too few to tell anything of all of them."""
LITTLE_WORK = 10_000_000
"""Rows times parameters, a rough count of multiplications, below which the time of a step does not depend on rows."""


@dataclass(frozen=True)
class Choice:
    """An estimator and why it is that.

    Attributes:
        estimator: ``"antithetic"`` or ``"forward"``.
        reason: Half a sentence.
        excess: Where there are kinks and it is ``"antithetic"`` all the same: how many times as large as ``xi_approx``
            its noise is; None if that was not asked for or cannot be measured.
        compared: What the comparison of forward mode with finite steps gave, where it is taken.
    """

    estimator: str
    reason: str
    excess: float | None = None
    compared: Measured | None = None

    def __str__(self) -> str:
        """Return both as people read it."""
        return f"estimator {self.estimator}: {self.reason}"


@dataclass(frozen=True)
class FractionChoice:
    """What ``batch_fraction="auto"`` is, and why.

    Attributes:
        fraction: A fraction of the rows, in the pass that gives the loss; None for the whole batch.
        reason: Half a sentence.
    """

    fraction: float | None
    reason: str

    def __str__(self) -> str:
        """Return both as people read it."""
        return f"batch_fraction {'None' if self.fraction is None else f'{self.fraction:g}'}: {self.reason}"


def too_small(rows: int, examples: int, parameters: int) -> str:
    """Say why less than the whole batch would save nothing, or tell too little; nothing if neither is so.

    Args:
        rows: Rows of the batch.
        examples: How many examples the loss is a mean of, as far as is known: tokens, where each has a loss.
        parameters: Number of trained parameters.

    Returns:
        Half a sentence, or nothing.

    Example:
        >>> too_small(16, 16, 1_000_000)
        'a batch of 16 rows is small'
        >>> too_small(64, 64, 9_000)
        'the model is so small that fewer rows take as long (64 rows times 9,000 parameters)'
        >>> too_small(20, 700, 1_000_000)
        ''
    """
    if rows < FEW_ROWS or max(rows, examples) < FEW_EXAMPLES:
        return f"a batch of {rows} rows is small"
    if rows * parameters < LITTLE_WORK:
        return f"the model is so small that fewer rows take as long ({rows} rows times {parameters:,} parameters)"
    return ""


def choose_estimator(
    closure: Closure,
    kinks: Mapping[str, int],
    *,
    refused: Callable[[str], Sequence[DropregError]] = lambda _: (),
    noise_of: Sequence[nn.Parameter] = (),
    step_size: float = 0.1,
    mask: str = "as_model",
    curvature: str | None = None,
) -> Choice:
    """Choose between two passes with finite steps and one with dual numbers.

    Args:
        closure: Runs forward and loss and returns the scalar loss, leaving no trace.
        kinks: Operations with a kink behind a dropout site and how often they were found, see
            `lightning_dropreg.inspection.kinks.find_kinks`.
        refused: Says what else speaks against an estimator, by its name.
        noise_of: Parameters in which the excess of the noise is measured, if it is to be.
        step_size: Step of the antithetic pair, for that.
        mask: Mask of the noise, for that.
        curvature: Of the penalty, whose derivatives are compared with finite steps; None for noise alone.

    Returns:
        The choice, the same for the same model.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> print(choose_estimator(lambda: net(torch.ones(4, 3)).square().mean(), {"relu": 1}))
        estimator forward: there are kinks behind the dropout (relu)
        >>> print(choose_estimator(lambda: net(torch.ones(4, 3)).square().mean(), {}))
        estimator antithetic: the network is smooth behind its dropout
    """
    if not kinks:
        return Choice("antithetic", "the network is smooth behind its dropout")
    found = f"there are kinks behind the dropout ({', '.join(kinks)})"
    against = next(map(str, refused("forward")), "") or failure(closure, "forward")
    compared = None if against else compare_derivatives(closure, "forward", curvature=curvature).measured
    if compared is not None and compared.problem is None:
        return Choice("forward", found, compared=compared)
    against = against or str(compared and compared.problem)
    excess = noise_excess(closure, noise_of, step_size=step_size, mask=mask) if noise_of else None
    return Choice("antithetic", f"{found}, but forward mode is not possible: {short(against)}", excess)


def short(reason: str) -> str:
    """Return what was found, without the advice that follows."""
    return reason.partition(" Use ")[0].rstrip(".")


def chosen_estimator(closure: Closure, module: nn.Module | None = None, curvature: str | None = None) -> str:
    """Return the name of the estimator that ``estimator="auto"`` stands for on a step.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        module: A module whose state must not advance.
        curvature: See `choose_estimator`.

    Returns:
        ``"antithetic"`` or ``"forward"``.
    """
    with Isolation(module) as isolation:

        def run() -> Tensor:
            return isolation.run(closure, trace=False)

        seen, _ = inspect_step(run, need_losses=False, quiet=True)
        return choose_estimator(run, seen.kinks, curvature=curvature).estimator
