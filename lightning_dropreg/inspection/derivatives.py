"""Whether the derivative that autograd gives at a dropout site is that of the function that is computed.

`forward`, `double_backward` and `exact` follow tangents or gradients; a finite step sees the function itself. They part
where a gradient stops (``torch.no_grad``, ``.detach()``, a number taken out and put back in), where a hook or a custom
function scales or reverses it, and where a backward is written that is another's. Then these estimators would be wrong
without a word, so they are compared once: site by site the change of the outputs (of the loss, where only noise is
wanted), for all sites together the gradient of that change, and with ``curvature="full"`` the second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dropreg.errors import DropregError, UnsupportedOperationError
from lightning_dropreg.estimators.antithetic import check_pair_of_steps
from lightning_dropreg.estimators.curvature import OF_OUTPUTS
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.inspection.finite_steps import TOLERANCE, VECTORS, FiniteSteps
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Closure

__all__ = ["Compared", "compare_derivatives", "measure", "measure_targets"]

_KEY = 0  # of directions that nobody trains with
_GROUPS = 48  # of sites that are looked at together; of fewer, every one by itself
_ATTEMPTS = 3  # along other directions: where a kink lies too near, another tells


def measure_targets(closure: Closure, step_size: float = 1e-3) -> Measured:
    """Find out whether targets and weights of the losses stand still when the dropout noise changes.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        step_size: Step at the sites.

    Returns:
        What was found.
    """
    try:
        check_pair_of_steps(closure, step_size, "as_model", _KEY)
    except DropregError as problem:
        return Measured("fixed_target", outcome="error", problem=problem)
    return Measured("fixed_target", note="the same in two passes with opposite noise")


def measure(
    closure: Closure, estimator: str, *, curvature: str | None, mask: str = "as_model", names: Sequence[str] = ()
) -> list[Measured]:
    """Measure what an estimator takes for granted about derivatives and targets.

    Args:
        closure: See `compare_derivatives`, as for the others.
        estimator: See there.
        curvature: See there.
        mask: See there.
        names: See there.

    Returns:
        What was found.
    """
    targets = [measure_targets(closure)] if curvature in OF_OUTPUTS else []
    return [*targets, compare_derivatives(closure, estimator, curvature=curvature, mask=mask, names=names).measured]


@dataclass
class Compared:
    """What came of comparing derivatives: the figures, and the numbers of the sites where they are another's."""

    measured: Measured
    sites: Sequence[int] = ()


def compare_derivatives(
    closure: Closure,
    estimator: str,
    *,
    curvature: str | None,
    mask: str = "as_model",
    names: Sequence[str] = (),
    again: bool = False,
) -> Compared:
    """Compare the derivatives that an estimator follows with finite steps.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        estimator: Name of the estimator; ``"antithetic"`` takes finite steps itself.
        curvature: Of the penalty, or None for noise alone.
        mask: ``"as_model"`` or ``"elementwise"``.
        names: What the sites are called, in order, for the message.
        again: Whether they were compared before, on another batch: then all sites together, along one direction, and
            the gradient of one vector, in six passes.

    Returns:
        The largest relative difference, and the error to raise if that is too large; the sites are all where it cannot
        be told which.
    """
    name = "derivative_is_of_the_function"
    if estimator == "antithetic":
        return Compared(Measured(name, note="antithetic takes finite steps itself"))
    try:
        for attempt in range(1 if again else _ATTEMPTS):
            step = FiniteSteps(closure, estimator, curvature, mask, _KEY + attempt, gradients=1 if again else VECTORS)
            if not step.sites:
                return Compared(Measured(name, note="no site is reached"))
            found = list(step.of_sites(1 if again else _GROUPS))
            if any(each.wrong for each in found) or not any(each.undecided for each in found):
                break
        whole = step.of_all()
    except (DropregError, RuntimeError, NotImplementedError) as error:  # the estimator will say so itself
        return Compared(Measured(name, note=f"not compared: {str(error).partition(chr(10))[0]}"))
    wrong = [each for each in found if each.wrong]
    # a value that no gradient follows has no part in the noise, which is a gradient
    if curvature is None and not whole.wrong and whole.trusted:
        wrong = []
    differences = [each.difference for each in (*found, whole) if each.trusted]
    worst = max(differences, default=0.0)
    if not wrong and not whole.wrong:
        return Compared(Measured(name, min(worst, TOLERANCE), TOLERANCE, note=f"{estimator} against finite steps"))
    at = [index for each in wrong for index in each.sites] or list(range(len(step.sites)))
    called = ", ".join((names[n] if n < len(names) else "") or _called(step.sites[n]) for n in at)
    reason = (
        wrong[0].reason
        if wrong
        else "the change has another gradient, since a part of the way is detached, a custom autograd function has a "
        "backward that cannot be differentiated, or a hook changes gradients"
    )
    problem = UnsupportedOperationError(
        f"The derivative that autograd gives at dropout site {called} is not that of the function that the step "
        f"computes, which estimator={estimator!r} needs: {reason}. Use estimator='antithetic', which takes finite "
        "steps of the function itself."
    )
    return Compared(Measured(name, worst, TOLERANCE, "error", problem=problem), at)


def _called(site: Site) -> str:
    return site.name or f"with p={site.p:g} and shape {site.shape} ({site.kind})"
