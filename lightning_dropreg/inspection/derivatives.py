"""Whether the derivative that autograd gives at a dropout site is that of the function that is computed.

`forward`, `double_backward` and `exact` follow tangents or gradients; a finite step sees the function itself. They part
where a gradient stops (``torch.no_grad``, ``.detach()``, a number taken out and put back in), where a hook or a custom
function scales or reverses it, and where a backward is written that is another's. Then these estimators would be wrong
without a word, so they are compared once: site by site the change of the outputs (of the loss, where only noise is
wanted), for all sites together the gradient of that change, and with ``curvature="full"`` the second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_dropreg.errors import DropregError, UnsupportedOperationError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.estimators.antithetic import check_pair_of_steps
from lightning_dropreg.estimators.curvature import FULL, OF_OUTPUTS, element_weights
from lightning_dropreg.estimators.double_backward import directional_derivative
from lightning_dropreg.inspection.assumptions import Measured
from lightning_dropreg.interception.sites import Rule, Site
from lightning_dropreg.passes import Closure, Directions, Off, Pass, Perturb, Tangent, Tap, run_pass
from lightning_dropreg.passes.gradients import leaves_below

__all__ = ["Compared", "compare_derivatives", "measure", "measure_targets"]

TOLERANCE = 0.05
"""Relative difference from which on a derivative is another; trusted finite steps are far closer."""
_KEY = 0  # of directions that nobody trains with
_STEPS = {torch.float64: 1e-4, torch.float32: 1e-2}
_VECTORS = 3
_ENTRIES = 4096  # of a tensor's gradient, about so many are compared
_WIDE_STEP = 0.1  # where activations have few digits


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
    groups: int = 48,
    attempts: int = 3,
) -> Compared:
    """Compare the derivatives that an estimator follows with finite steps.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        estimator: Name of the estimator; ``"antithetic"`` takes finite steps itself.
        curvature: Of the penalty, or None for noise alone.
        mask: ``"as_model"`` or ``"elementwise"``.
        names: What the sites are called, in order, for the message.
        groups: In how many groups of sites they are looked at; of fewer sites every one by itself.
        attempts: Along how many directions at most: where a kink lies too near, another tells.

    Returns:
        The largest relative difference, and the error to raise if that is too large; the sites are all where it cannot
        be told which.
    """
    name = "derivative_is_of_the_function"
    if estimator == "antithetic":
        return Compared(Measured(name, note="antithetic takes finite steps itself"))
    try:
        for attempt in range(attempts):
            step = _Step(closure, estimator, curvature, mask, _KEY + attempt)
            if not step.sites:
                return Compared(Measured(name, note="no site is reached"))
            found = list(step.of_sites(groups))
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


@dataclass
class _Comparison:
    """A derivative and two finite steps, as vectors."""

    derivative: Tensor
    large: Tensor
    small: Tensor
    floor: float
    sites: range = range(0)
    kink: float = 0.0
    """By how much slopes differ on both sides of where we stand (ReLU): half of it is in a step from side to side."""

    @property
    def size(self) -> float:
        """The larger of both."""
        return max(float(self.derivative.norm()), float(self.small.norm()))

    @property
    def error(self) -> float:
        """How far the finite steps can be trusted."""
        return 4 * float((self.large - self.small).norm()) + self.kink + self.floor

    @property
    def difference(self) -> float:
        """Relative difference of derivative and finite step."""
        return float((self.derivative - self.small).norm()) / self.size if self.size > self.error else 0.0

    @property
    def trusted(self) -> bool:
        """Whether the finite steps agree well enough to judge by."""
        return self.error < TOLERANCE * self.size

    @property
    def undecided(self) -> bool:
        """Whether there is something to judge and the finite steps do not agree well enough."""
        return self.floor < self.size and not self.trusted

    @property
    def wrong(self) -> bool:
        """Whether the derivative is another's."""
        off = float((self.derivative - self.small).norm())
        return math.isfinite(off) and off > TOLERANCE * self.size + self.error

    @property
    def reason(self) -> str:
        """What the figures look like."""
        along = float((self.derivative * self.small).sum() / self.small.square().sum().clamp_min(1e-300))
        apart = float((self.derivative - along * self.small).norm())
        if float(self.derivative.norm()) < 1e-3 * float(self.small.norm()):
            return "it is 0, though the function changes; the gradient stops on the way (torch.no_grad, .detach())"
        if len(self.small) > 1 and apart < 1e-2 * float(self.derivative.norm()):
            return (
                f"it is {along:.3g} times as large; a hook or a custom autograd function scales or reverses gradients "
                "on the way, or a part of the way is detached (a target)"
            )
        return (
            "it is another; a part of the way is detached (a target, a straight-through estimator), or a hook or a "
            "custom autograd function has a backward of its own (gradient reversal or scaling)"
        )


class _PerturbSome(Perturb):
    """All sites get directions, and some act; the others do nothing."""

    def __init__(self, directions: Directions, step: float, group: Sequence[int]) -> None:
        super().__init__(directions, step)
        self.group = group
        self.met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        position, self.met = self.met, self.met + 1
        perturbed = super().__call__(site, h)
        return perturbed if position in self.group else h.view_as(h)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return super().again(index, h) if index in self.group else h.view_as(h)


class _TangentAtSome(Tangent):
    """The same as a tangent."""

    def __init__(self, directions: Directions, group: Sequence[int]) -> None:
        super().__init__(directions)
        self.group = group
        self.met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        position, self.met = self.met, self.met + 1
        dual = super().__call__(site, h)
        return dual if position in self.group else h.view_as(h)


class _Step:
    """The user's step with its derivatives by one estimator, and its finite steps."""

    def __init__(self, closure: Closure, estimator: str, curvature: str | None, mask: str, key: int) -> None:
        self.key = key
        self.closure = closure
        self.estimator = estimator
        self.curvature = curvature
        self.mask = mask
        self.record = curvature in OF_OUTPUTS
        seen = self._pass(Perturb(self._directions(), 1e-3))
        self.sites: Sequence[Site] = seen.sites
        self.counting: list[int] = []  # numbers of the losses that the returned one depends on
        if self.record:
            weights = element_weights(seen.loss, seen.losses)
            self.counting = [n for n, w in enumerate(weights) if bool((w != 0).any())]
        values = [seen.losses[n].outputs for n in self.counting] if self.record else [seen.loss]
        dtype = max((v.dtype for v in values), key=lambda each: torch.finfo(each).eps)
        self.digits = torch.finfo(dtype).eps
        self.step = _WIDE_STEP if seen.in_bfloat16 else _STEPS.get(dtype, _WIDE_STEP)
        self.size = max(float(v.detach().double().norm()) for v in values)
        self.vectors: list[list[Tensor]] = []  # along which outputs are looked at
        for n in range(_VECTORS if self.record else 0):
            generator = torch.Generator().manual_seed(key + n)
            self.vectors.append([torch.randn(v.shape, generator=generator).to(v) for v in values])
        self.trained = [leaf for leaf in leaves_below(seen.loss, *values) if leaf.requires_grad]

    def scalars(self, done: Pass) -> list[Tensor]:
        """What is compared: the outputs along some random directions, or the loss."""
        if not self.record:
            return [done.loss]
        outputs = [done.losses[n].outputs for n in self.counting]
        return [torch.stack([(v * z).sum() for v, z in zip(each, outputs, strict=True)]).sum() for each in self.vectors]

    def of_sites(self, groups: int) -> Iterator[_Comparison]:
        """Site by site (in so many groups, where there are more): the change of what is compared.

        Yields:
            One comparison for each group.
        """
        count = len(self.sites)
        width = -(-count // groups)
        by_gradient = None if self.estimator == "forward" else self._gradients()
        centre, floor = self._values(self._pass(Off())), 100 * self.digits * self.size / self.step
        for start in range(0, count, width):
            group = range(start, min(start + width, count))
            differences, bends = [], []
            for step in (self.step, self.step / 2):
                plus, minus = (self._values(self._pass(rule)) for rule in self._pair(step, group))
                differences.append((plus - minus) / (2 * step))
                bends.append((plus + minus - 2 * centre) / (2 * step))
            # of a smooth function a bend goes to 0 with the step, at a kink it stays: what it is at step 0
            kink = float((2 * bends[1] - bends[0]).norm())
            derivative = self._tangent(group) if by_gradient is None else by_gradient[:, list(group)].sum(1)
            large, small = differences
            yield _Comparison(derivative, large, small, floor, group, kink)

    def of_all(self) -> _Comparison:
        """All sites together: the gradient of the change in everything trained, and the second derivative."""
        derivatives = [self._gradient_of(slope) for slope in self._slopes()]
        ends = [self._gradient_differences(step) for step in (self.step, self.step / 2)]
        comparisons = []
        for derivative, large, small, plain in zip(derivatives, *ends, self._plain_gradients(), strict=True):
            floor = 100 * self.digits / self.step * float(plain.norm())
            comparisons.append(_Comparison(derivative, large, small, floor))
        if self.curvature == FULL:
            comparisons.append(self._second())
        return max(comparisons, key=lambda each: (each.wrong, each.difference))

    def _directions(self) -> Directions:
        return Directions(self.key, self.mask)  # the same in every pass

    def _pass(self, rule: Rule) -> Pass:
        return run_pass(self.closure, rule, record_losses=self.record)

    def _pair(self, step: float, group: Sequence[int]) -> Iterator[Rule]:
        return (_PerturbSome(self._directions(), sign * step, group) for sign in (1, -1))

    def _values(self, done: Pass) -> Tensor:
        return torch.stack(self.scalars(done)).detach().double().cpu()

    def _gradients(self) -> Tensor:
        """``<d scalar / d tap_i, r_i>``, one row for each scalar and one column for each site."""
        tap = Tap(self._directions(), draw=True)
        rows = []
        for scalar in self.scalars(self._pass(tap)):
            found: Sequence[Tensor | None] = [None] * len(tap.taps)
            if scalar.requires_grad:
                found = torch.autograd.grad(scalar, tap.taps, retain_graph=True, allow_unused=True)
            rows.append(
                [0.0 if g is None else float((g * r).double().sum()) for g, r in zip(found, tap.draws, strict=True)]
            )
        return torch.tensor(rows, dtype=torch.float64)

    def _tangent(self, group: Sequence[int]) -> Tensor:
        with forward_ad.dual_level():
            scalars = self.scalars(self._pass(_TangentAtSome(self._directions(), group)))
            return torch.stack([_tangent_of(scalar) for scalar in scalars]).detach().double().cpu()

    def _slopes(self) -> Iterator[Tensor]:
        """The change of what is compared by the estimator's derivatives, with a graph, for all sites together."""
        if self.estimator == "forward":
            with forward_ad.dual_level():
                for scalar in self.scalars(self._pass(Tangent(self._directions()))):
                    yield _tangent_of(scalar)
        else:
            tap = Tap(self._directions(), draw=True)
            for scalar in self.scalars(self._pass(tap)):
                yield directional_derivative(scalar, tap)

    def _plain_gradients(self) -> list[Tensor]:
        return [self._gradient_of(scalar) for scalar in self.scalars(self._pass(Off()))]

    def _gradient_differences(self, step: float) -> list[Tensor]:
        pair = self._pair(step, range(len(self.sites)))
        plus, minus = (list(map(self._gradient_of, self.scalars(self._pass(rule)))) for rule in pair)
        return [(a - b) / (2 * step) for a, b in zip(plus, minus, strict=True)]

    def _second(self) -> _Comparison:
        """Half the second derivative of the loss and its gradient."""

        def estimate(name: str, step: float) -> Tensor:
            estimated = ESTIMATORS[name](
                self.closure, curvature=FULL, noise=False, step_size=step, mask=self.mask, key=self.key
            ).penalty
            assert estimated is not None
            return torch.cat([estimated.detach().double().reshape(1).cpu(), self._gradient_of(estimated)])

        own = "double_backward" if self.estimator == "exact" else self.estimator  # the same derivatives
        step = max(self.step, 1e-3) * 10 if self.step > 1e-3 else 1e-3
        large, small = (estimate("antithetic", each) for each in (step, step / 2))
        size = self.size + float(self._plain_gradients()[0].norm())
        return _Comparison(estimate(own, step), large, small, 100 * self.digits * size / step**2)

    def _gradient_of(self, scalar: Tensor) -> Tensor:
        """Gradient in what is trained, as one vector; of large tensors some entries."""
        if not self.trained:
            return torch.zeros(1, dtype=torch.float64)
        found: Sequence[Tensor | None] = [None] * len(self.trained)
        if scalar.requires_grad:
            found = torch.autograd.grad(scalar, self.trained, retain_graph=True, allow_unused=True)
        parts = []
        for leaf, gradient in zip(self.trained, found, strict=True):
            every = max(1, leaf.numel() // _ENTRIES)
            part = torch.zeros(()).expand(leaf.numel()) if gradient is None else gradient.detach().to_dense().flatten()
            parts.append(part[::every].double().cpu())
        return torch.cat(parts)


def _tangent_of(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    return torch.zeros_like(primal) if tangent is None else tangent


def _called(site: Site) -> str:
    return site.name or f"with p={site.p:g} and shape {site.shape} ({site.kind})"
