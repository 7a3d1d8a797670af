"""What happens at the dropout sites of a pass.

Every algorithm of the paper is a composition of forward passes that differ only in the rule applied at the sites:
`Off` (the model without dropout), `Perturb` (``h (1 + step r)``), `Tangent` (the same to first order, in dual
numbers), `Tap` (a handle on each site for back-propagation) and `Drop` (dropout itself).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_dropreg.interception.sites import RepeatableRule, Rule, Site
from lightning_dropreg.numerics.context import holding
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.dual import make_dual
from lightning_dropreg.numerics.noise import KeyedGenerators, fold_key
from lightning_dropreg.passes.directions import Directions
from lightning_dropreg.passes.traced import TracedDrop, TracedOff, TracedPerturb

__all__ = [
    "Drop",
    "Off",
    "Perturb",
    "PerturbSome",
    "Tangent",
    "Tap",
    "TappedTangent",
    "draws_of_dropout",
    "focus",
    "focused",
]


class Off:
    """No dropout."""

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        return h

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return h

    def traced(self, first: int, count: int) -> TracedOff:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        return TracedOff()

    def meet(self, site: Site) -> None:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""

    def strong(self, first: int) -> Off:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        return Off()


class Perturb:
    """``h (1 + step r)`` with the batch's directions ``r``."""

    def __init__(self, directions: Directions, step: float) -> None:
        self.directions = directions
        self.step = step

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        return self._perturbed(h, self.directions.draw(site, h))

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return self._perturbed(h, self.directions.at(index))

    def anew(self) -> Perturb:
        """Return what does the same in a pass of its own."""
        return Perturb(Directions(self.directions.key, self.directions.mask), self.step)

    def _perturbed(self, h: Tensor, direction: Tensor) -> Tensor:
        perturbed = h * torch.rsub(direction, 1, alpha=-self.step)  # 1 + step r at once
        return perturbed if perturbed.dtype == h.dtype else perturbed.to(h.dtype)

    def traced(self, first: int, count: int) -> TracedPerturb | None:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        if type(self) is not Perturb or type(self.directions) is not Directions:
            return None  # other noise
        return TracedPerturb(self.directions.key, self.step, self.directions.mask)

    def meet(self, site: Site) -> None:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        self.directions.meet(site)

    def strong(self, first: int) -> Perturb:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        return Perturb(Directions(0, self.directions.mask), 1.0)


class PerturbSome(Perturb):
    """``h (1 + step r)`` at some sites, no dropout at the others.

    Args:
        directions: The batch's directions, drawn for all the sites so that they are those of `Perturb`.
        step: Size of the step.
        group: Numbers of the sites, in the order in which they are reached.
    """

    def __init__(self, directions: Directions, step: float, group: Collection[int]) -> None:
        super().__init__(directions, step)
        self.group = group
        self._met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        position, self._met = self._met, self._met + 1
        perturbed = super().__call__(site, h)
        return perturbed if position in self.group else h.view_as(h)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return super().again(index, h) if index in self.group else h.view_as(h)


class Tangent:
    """``h`` with the tangent ``h r``: forward-mode dual numbers."""

    def __init__(self, directions: Directions) -> None:
        self.directions = directions

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        primal, tangent = forward_ad.unpack_dual(h)
        push = (primal * self.directions.draw(site, h)).to(h.dtype)
        return make_dual(primal, push if tangent is None else tangent + push)


class Tap:
    """``h (1 + t)`` with ``t = 0``: the derivative in ``t`` is ``J_i`` times ``h_i``, summed over a shared mask.

    Args:
        directions: The directions of the batch.
        draw: Whether they are drawn.
        thrice: Whether the pass will be differentiated three times; torch's formulas of some norms are wrong for that.

    Attributes:
        taps: The ``t`` of each site, in order.
        sites: The sites.
        draws: Directions ``r`` for the sites, drawn in the same order as in the other passes; empty without.
    """

    def __init__(self, directions: Directions, draw: bool = False, thrice: bool = False) -> None:
        self.directions = directions
        self.draw = draw
        self.thrice = thrice
        self.taps: list[Tensor] = []
        self.sites: list[Site] = []
        self.draws: list[Tensor] = []

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        shape = self.directions.shape_of(site)
        tap = torch.zeros(shape, dtype=noise_dtype(h.dtype), device=h.device, requires_grad=True)
        self.taps.append(tap)
        self.sites.append(site)
        if self.draw:
            self.draws.append(self.directions.draw(site, h))
        return (h * (1 + tap)).to(h.dtype)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return (h * (1 + self.taps[index])).to(h.dtype)


class TappedTangent(Tangent):
    """`Tangent` and `Tap` in one: the tangents at ``h (1 + t)``, to be differentiated in ``t``.

    Attributes:
        taps: The ``t`` of each site, in order.
        draws: Their directions ``r``.
    """

    def __init__(self, directions: Directions) -> None:
        super().__init__(directions)
        self.taps: list[Tensor] = []
        self.draws: list[Tensor] = []

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.mode.Rule`."""
        primal, tangent = forward_ad.unpack_dual(h)
        direction = self.directions.draw(site, h)
        tap = torch.zeros_like(direction, requires_grad=True)
        self.taps.append(tap)
        self.draws.append(direction)
        push = primal * direction if tangent is None else primal * direction + tangent * (1 + tap)
        return make_dual((primal * (1 + tap)).to(h.dtype), push.to(h.dtype))


class Drop:
    """Dropout itself, with masks drawn from generators of our own so that the global random state is not touched.

    Args:
        key: Seed of the masks.
        mirrored: Whether the masks are the antithetic counterparts of those that the key gives otherwise: made from
            ``1 - u`` where those are made from the uniform numbers ``u``.
    """

    def __init__(self, key: int, mirrored: bool = False) -> None:
        self.key = key
        self.mirrored = mirrored
        self.sites: list[Site] = []

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        self.sites.append(site)
        return self.again(len(self.sites) - 1, h)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        site = self.sites[index]
        # a seed for every site, so that no mask need be kept
        generator = KeyedGenerators(fold_key(self.key, index)).on(h.device)
        shape = tuple(site.mask_shape)
        # faster on a CPU than bernoulli_; 24 random bits are more than a drop probability has
        uniform = torch.rand(shape, generator=generator, dtype=torch.float32, device=h.device)
        kept = uniform < 1 - site.p if self.mirrored else uniform >= site.p
        return h * kept.to(h.dtype).div_(1 - site.p)

    def traced(self, first: int, count: int) -> TracedDrop:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        return TracedDrop(self.key, self.mirrored)

    def meet(self, site: Site) -> None:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        self.sites.append(site)

    def strong(self, first: int) -> Drop:
        """See `lightning_dropreg.interception.sites.TraceableRule`."""
        return Drop(0, self.mirrored)


def draws_of_dropout(key: int, k: int, antithetic: bool) -> list[Drop]:
    """Return the rules of `k` draws of dropout.

    Args:
        key: Seed of the batch.
        k: Number of draws; even, if `antithetic`.
        antithetic: Whether every second draw has the counterparts of the masks of the one before. With drop probability
            1/2 these are the complements, and the two draws deviate from the model without dropout in exactly opposite
            directions; with another q the correlation of a mask and its counterpart is ``-min(q, 1-q) / max(q, 1-q)``.

    Returns:
        The rules.
    """
    if antithetic:
        return [Drop(fold_key(key, j // 2), mirrored=j % 2 == 1) for j in range(k)]
    return [Drop(fold_key(key, j)) for j in range(k)]


class _Focus:
    """A rule that acts at one site of the pass; the others do nothing."""

    def __init__(self, rule: Rule, index: int) -> None:
        self.rule = rule
        self.index = index
        self._met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        position, self._met = self._met, self._met + 1
        return self.rule(site, h) if position == self.index else h.view_as(h)


class _RepeatableFocus(_Focus):
    """The same for a rule that can do the same thing again."""

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return self.rule.again(0, h) if index == self.index else h.view_as(h)  # type: ignore[attr-defined]


_focus: ContextVar[int | None] = ContextVar("focus", default=None)


def focus(index: int) -> AbstractContextManager[None]:
    """Let only site number `index` be a dropout site in the passes run inside, to see what it needs by itself."""
    return holding(_focus, index)


def focused(rule: Rule) -> Rule:
    """Return `rule`, or one that does the same at the site in `focus` only."""
    index = _focus.get()
    if index is None:
        return rule
    return (_RepeatableFocus if isinstance(rule, RepeatableRule) else _Focus)(rule, index)
