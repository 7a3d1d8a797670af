"""Derivatives at dropout sites beside finite steps of the function itself; `derivatives` judges by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.estimators.curvature import FULL, OF_OUTPUTS, element_weights
from lightning_dropreg.estimators.double_backward import directional_derivative
from lightning_dropreg.interception.sites import Rule, Site
from lightning_dropreg.passes import Closure, Directions, Off, Pass, PerturbSome, Tangent, Tap, run_pass
from lightning_dropreg.passes.gradients import leaves_below

__all__ = ["TOLERANCE", "VECTORS", "Comparison", "FiniteSteps"]

TOLERANCE = 0.05
"""Relative difference from which on a derivative is another; trusted finite steps are far closer."""
VECTORS = 3
"""Along so many random directions outputs are looked at."""
_STEPS = {torch.float64: 1e-4, torch.float32: 1e-2}
_ENTRIES = 4096  # of a tensor's gradient, about so many are compared
_WIDE_STEP = 0.1  # where activations have few digits


@dataclass
class Comparison:
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


class _TangentAtSome(Tangent):
    """What `PerturbSome` does, as a tangent."""

    def __init__(self, directions: Directions, group: Sequence[int]) -> None:
        super().__init__(directions)
        self.group = group
        self.met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        position, self.met = self.met, self.met + 1
        dual = super().__call__(site, h)
        return dual if position in self.group else h.view_as(h)


class _Seen(NamedTuple):
    """What is compared, and the gradients of some of it."""

    values: Tensor
    gradients: list[Tensor]


class FiniteSteps:
    """The user's step with its derivatives by one estimator, and its finite steps.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        estimator: Name of the estimator.
        curvature: Of the penalty, or None for noise alone.
        mask: ``"as_model"`` or ``"elementwise"``.
        key: Seed of the directions.
        gradients: Of how many of the numbers that are compared the gradients are compared, too.
    """

    def __init__(
        self, closure: Closure, estimator: str, curvature: str | None, mask: str, key: int, gradients: int
    ) -> None:
        self.key = key
        self.followed = gradients
        self.closure = closure
        self.estimator = estimator
        self.curvature = curvature
        self.mask = mask
        self.record = curvature in OF_OUTPUTS
        self._ends: dict[float, list[_Seen]] = {}  # of steps at all sites
        seen = self._pass(Off())
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
        for n in range(VECTORS if self.record else 0):
            generator = torch.Generator().manual_seed(key + n)
            self.vectors.append([torch.randn(v.shape, generator=generator).to(v) for v in values])
        self.trained = [leaf for leaf in leaves_below(seen.loss, *values) if leaf.requires_grad]
        self.plain = self._of(self.scalars(seen), gradients)

    def scalars(self, done: Pass) -> list[Tensor]:
        """What is compared: the outputs along some random directions, or the loss."""
        if not self.record:
            return [done.loss]
        outputs = [done.losses[n].outputs for n in self.counting]
        return [torch.stack([(v * z).sum() for v, z in zip(each, outputs, strict=True)]).sum() for each in self.vectors]

    def of_sites(self, groups: int) -> Iterator[Comparison]:
        """Site by site (in so many groups, where there are more): the change of what is compared.

        Yields:
            One comparison for each group.
        """
        count = len(self.sites)
        width = -(-count // groups)
        by_gradient = self._gradients() if self.estimator != "forward" and width < count else None
        centre, floor = self.plain.values, 100 * self.digits * self.size / self.step
        for start in range(0, count, width):
            group = range(start, min(start + width, count))
            differences, bends = [], []
            for step in (self.step, self.step / 2):
                plus, minus = (each.values for each in self._pair(step, group))
                differences.append((plus - minus) / (2 * step))
                bends.append((plus + minus - 2 * centre) / (2 * step))
            # of a smooth function a bend goes to 0 with the step, at a kink it stays: what it is at step 0
            kink = float((2 * bends[1] - bends[0]).norm())
            if len(group) == count:
                derivative = self._slope.values
            else:
                derivative = self._tangent(group) if by_gradient is None else by_gradient[:, list(group)].sum(1)
            large, small = differences
            yield Comparison(derivative, large, small, floor, group, kink)

    def of_all(self) -> Comparison:
        """All sites together: the gradient of the change in everything trained, and the second derivative."""
        ends = []
        for step in (self.step, self.step / 2):
            plus, minus = (each.gradients for each in self._pair(step, range(len(self.sites))))
            ends.append([(a - b) / (2 * step) for a, b in zip(plus, minus, strict=True)])
        comparisons = []
        for derivative, large, small, plain in zip(self._slope.gradients, *ends, self.plain.gradients, strict=True):
            floor = 100 * self.digits / self.step * float(plain.norm())
            comparisons.append(Comparison(derivative, large, small, floor))
        if self.curvature == FULL:
            comparisons.append(self._second())
        return max(comparisons, key=lambda each: (each.wrong, each.difference))

    def _directions(self) -> Directions:
        return Directions(self.key, self.mask)  # the same in every pass

    def _pass(self, rule: Rule) -> Pass:
        return run_pass(self.closure, rule, record_losses=self.record)

    def _pair(self, step: float, group: range) -> list[_Seen]:
        """What a step one way and the other shows at some sites; of all together, the gradients too."""
        if step in self._ends and len(group) == len(self.sites):
            return self._ends[step]
        found = []
        for sign in (1, -1):
            scalars = self.scalars(self._pass(PerturbSome(self._directions(), sign * step, group)))
            found.append(self._of(scalars, self.followed if len(group) == len(self.sites) else 0))
            del scalars  # one graph at a time
        if len(group) == len(self.sites):
            self._ends[step] = found
        return found

    def _of(self, scalars: Sequence[Tensor], followed: int) -> _Seen:
        """The values, and the gradients of the first of them."""
        values = torch.stack([scalar.detach().double().cpu() for scalar in scalars])
        return _Seen(
            values, [self._gradient_of(scalar) for scalar in scalars[: self.followed if followed is None else followed]]
        )

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

    @cached_property
    def _slope(self) -> _Seen:
        """The change of what is compared by the estimator's derivatives, for all sites together."""
        if self.estimator == "forward":
            with forward_ad.dual_level():
                scalars = self.scalars(self._pass(Tangent(self._directions())))
                return self._of(list(map(_tangent_of, scalars)), self.followed)
        tap = Tap(self._directions(), draw=True)
        scalars = self.scalars(self._pass(tap))
        return self._of([directional_derivative(each, tap) for each in scalars], self.followed)

    def _second(self) -> Comparison:
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
        size = self.size + float(self.plain.gradients[0].norm())
        return Comparison(estimate(own, step), large, small, 100 * self.digits * size / step**2)

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
