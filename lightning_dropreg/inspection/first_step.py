"""Looking at a step without training: its sites, its losses, and where a number stopped being finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dropreg.errors import (
    DropregError,
    NoDropoutWarning,
    NonFinitePenaltyError,
    UnsupportedModuleError,
    UnsupportedSiteError,
)
from lightning_dropreg.estimators.curvature import element_weights
from lightning_dropreg.inspection.kinks import find_kinks
from lightning_dropreg.interception.naming import name_caller
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Closure, Directions, Off, Pass, Tap, is_dormant, run_pass
from lightning_dropreg.passes.randomness import RandomState

__all__ = ["all_at_once", "check_finite", "check_masks_of_rows", "inspect_step"]


def inspect_step(
    closure: Closure, need_losses: bool, quiet: bool = False, generators: Sequence[tuple[str, Any]] = ()
) -> tuple[Pass, list[DropregError]]:
    """Run a step once and find everything that would keep it from being regularized.

    Taps at the sites make every way from a site to the loss visible, also from sites on inputs that need no gradient.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        need_losses: Whether its losses must be recognized (for the penalty).
        quiet: Whether to keep silent about what is worth a warning.
        generators: Random generators that the step may draw from beside the global ones, and where they are.

    Returns:
        The pass, its sites named and its kinks counted, and what was found wrong.
    """
    problems: list[DropregError] = []
    taps = Tap(Directions(0))
    with _RandomnessWatch(generators) as watch:
        done = run_pass(
            closure,
            taps,
            record_losses=need_losses,
            name_sites=True,
            written_out=False,
            problems=problems,
        )
    whole = isinstance(done.loss, Tensor) and done.loss.grad_fn is not None
    if whole:
        done.kinks = find_kinks(done.loss, taps.taps)
    for loss in done.losses if whole else ():
        try:
            loss.check()
            element_weights(done.loss, [loss])
        except DropregError as problem:
            problems.append(problem)
    # stochastic depth may draw first and be known for what it is a line later
    known = {_without_line(site.name) for site in done.sites if site.kind == "stochastic_depth"}
    done.unknown = [f"{what} in {place}" for what, place in watch.found if _without_line(place) not in known]
    if quiet:
        return done, problems
    if not done.sites and not problems and not is_dormant():
        warnings.warn(
            "Every dropout that the step reached has drop probability 0, so nothing is regularized until that changes. "
            "Set the probabilities, or let lightning_dropreg.DropProbSchedule raise them.",
            NoDropoutWarning,
            stacklevel=2,
        )
    if watch.retains:
        warnings.warn(
            f"The step calls retain_grad() in {', '.join(watch.retains)}. It runs several times for a batch, and what "
            "the backward leaves there belongs to one of these passes, or to none: do not read it. The gradient in "
            "an intermediate can be had in the step, with torch.autograd.grad(loss, tensor, retain_graph=True).",
            stacklevel=2,
        )
    if done.unknown:
        warnings.warn(
            f"The step draws random numbers that are no dropout this package knows: {'; '.join(done.unknown)}. They "
            "stay as they are and are the same in passes that are compared. If that is a dropout written by hand, let "
            "it call lightning_dropreg.drop, or its effect is neither penalized nor turned into noise.",
            stacklevel=2,
        )
    return done, problems


def all_at_once(problems: Sequence[DropregError], where: str) -> DropregError:
    """Make one error of several, so that nobody has to find them one by one.

    Args:
        problems: At least one.
        where: Where they were found, for the message.

    Returns:
        The only one itself; of several an error of their common type, `UnsupportedModuleError` if they have none.

    Example:
        >>> from lightning_dropreg.errors import NoDropoutSiteError
        >>> print(all_at_once([NoDropoutSiteError("None."), UnsupportedModuleError("Compiled.")], "Net"))
        Net has 2 problems:
          1. None.
          2. Compiled.
    """
    if len(problems) == 1:
        return problems[0]
    types = {type(problem) for problem in problems}
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    kind = types.pop() if len(types) == 1 else UnsupportedModuleError
    return kind("\n".join([f"{where} has {len(problems)} problems:", *lines]))


def check_masks_of_rows(sites: Sequence[Site], on_rows: Closure, mask: str) -> None:
    r"""Refuse to estimate noise on some rows of the batch where rows share a mask.

    Let ``B_b`` be the derivative of row b's gradient in the noise ``r`` of a site (variance c), n the number of rows
    and S a random set of ``m = f n`` of them.

    *Masks of their own.* The noise of the whole batch, ``(1/n) sum_b B_b r_b``, has covariance ``c/n^2 sum_b B_b
    B_b^T``; that of S has on average ``1/f`` times as much, so ``sqrt(f)`` times the noise of S is exact.

    *One mask for all rows* (DropConnect, position embeddings). The noise of the whole batch is ``B r`` with the mean B
    of all ``B_b``. On average over S, that of S has the covariance

    .. math:: c B B^T + \frac{1 - f}{m} \frac{c}{n - 1} \sum_b (B_b - B) (B_b - B)^T,

    that is between 1 (rows alike) and about ``1/f`` times (rows unrelated) as much as it should, by a factor that
    differs from parameter to parameter: no scale mends it. Nor does any other noise ``sum_{b in S} B_b rho_b`` made of
    some of the rows: in a batch whose rows cancel (``B = 0``) it would have to vanish whatever the rows in S are, since
    the others can always make up for them, and so would be zero everywhere. And carrying these sites alone on the whole
    batch costs two passes over it, which bring the noise of all the other sites (and the loss) for nothing.

    (The penalty is a mean over rows for all masks alike.)

    Args:
        sites: The sites that the whole batch reaches, named.
        on_rows: Runs forward and loss on fewer rows and returns the loss.
        mask: ``"as_model"`` or ``"elementwise"``: then rows share what has no rows, such as a weight.

    Raises:
        UnsupportedSiteError: If the noise at a site does not shrink with the rows.
    """
    fewer = run_pass(on_rows, Off(), need_sites=False).sites
    directions = Directions(0, mask)
    shared = [a.name for a, b in zip(sites, fewer, strict=False) if directions.shape_of(a) == directions.shape_of(b)]
    if shared:
        raise UnsupportedSiteError(
            f"All rows of the batch share the noise of {', '.join(shared)} (DropConnect or a position embedding, for "
            "example). Such noise is the same draw for every row, and no noise made of some of the rows has its "
            "covariance; noise on the whole batch costs no more than these sites alone would. Use "
            "ImplicitNoise(batch_fraction=None); ExplicitPenalty may keep its batch_fraction."
        )


class _RandomnessWatch(TorchFunctionMode):
    """Notes what draws random numbers, once everything known is replaced.

    Args:
        generators: Generators of the step's own to look at beside the global ones, with their names.

    Attributes:
        found: The functions, and where each was called.
        retains: Where ``retain_grad`` was called.
    """

    def __init__(self, generators: Sequence[tuple[str, Any]] = ()) -> None:
        super().__init__()
        self._last: Any = "the beginning"
        self.found: dict[tuple[str, str], None] = {}
        self.retains: dict[str, None] = {}
        self._state = RandomState(generators)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`; what drew since the last call was something that torch does not show to modes."""
        self._last = getattr(func, "__name__", func)
        if self._last == "retain_grad":
            self.retains[name_caller()] = None
        self._note(f"something before {self._last}")
        result = func(*args, **(kwargs or {}))
        self._note(str(getattr(func, "__name__", func)))
        return result

    def __exit__(self, *exception: Any) -> None:
        """Look once more: something may have drawn after the last operation."""
        self._note(f"something after {self._last}")
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _note(self, what: str) -> None:
        moved = self._state.moved()
        if moved:
            self._state = self._state.again()
            source = "" if moved == ["torch"] else f" (from {', '.join(moved)})"
            self.found[what + source, name_caller()] = None


def _without_line(name: str) -> str:
    return name.rsplit(":", 1)[0]


class _Watch(Off):
    """No dropout, but a note of the size of each site's activations."""

    def __init__(self) -> None:
        self.largest: list[tuple[Site, float]] = []

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        self.largest.append((site, float(h.detach().abs().max()) if h.numel() else 0.0))
        return h


def check_finite(values: Mapping[str, Tensor | None], closure: Closure, where: str) -> None:
    """Raise if a value is not finite, and say at which site that began.

    On CUDA nothing is checked: reading a value would make every step wait for the device.

    Args:
        values: What to check, by name.
        closure: The step they came from; run again, without dropout, only to find the site.
        where: Which step that was, for the message.

    Raises:
        NonFinitePenaltyError: If a value is NaN or infinite.
    """
    bad = [
        name for name, v in values.items() if v is not None and v.device.type == "cpu" and not math.isfinite(v.item())
    ]
    if not bad:
        return
    watch = _Watch()
    loss = run_pass(closure, watch, name_sites=True, need_sites=False).loss.item()
    broken = [f"{site.name} ({site.kind})" for site, size in watch.largest if not size < float("inf")]
    if broken:
        cause = f"the activations are not finite from site {broken[0]} on"
    elif watch.largest:
        site, size = max(watch.largest, key=lambda pair: pair[1])
        cause = (
            f"the activations are finite at every site; the largest is {size:.3g}, at site {site.name} ({site.kind})"
        )
    else:
        cause = "no site was reached when the step was repeated"
    raise NonFinitePenaltyError(
        f"The {' and the '.join(bad)} became non-finite at {where}: {cause}, and the loss without dropout is "
        f"{loss:.4g}. Lower the learning rate or the strength, clip gradients, or use a smaller step_size."
    )
