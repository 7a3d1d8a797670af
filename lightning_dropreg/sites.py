"""What a dropout site is, and the random directions in which it is perturbed.

Dropout at site ``i`` computes ``h_i * (1 + eta_i)`` with ``eta = -1`` with probability ``q`` and ``q/(1-q)``
otherwise: mean 0 and variance ``c = q/(1-q)``. Everything this package does needs only noise with these two
moments, so a site is described by ``q`` and by the shape of its mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dropreg.errors import InconsistentPassesError, InvalidArgumentError

__all__ = ["Directions", "Site", "fold_key", "random_signs"]

_SAME_EVERY_TIME = (
    "The training step must do the same thing every time it is called with the same batch; what it decides at random "
    "must be drawn from torch's, numpy's or Python's global random state, which is put back between passes."
)
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Site:
    """A place where a model drops entries of a tensor.

    Attributes:
        name: Path of the module that drops, or of the module and line that call the functional dropout. Filled in
            by `lightning_dropreg.functional.find_sites`; empty while training, where nobody reads it.
        p: Drop probability ``q``, in ``(0, 1)``.
        shape: Shape of the tensor that is dropped from.
        mask_shape: Shape of the mask, broadcastable to `shape`; 1 where the mask is shared.
        kind: What drops, e.g. ``"dropout"`` or ``"dropout2d"``.
    """

    name: str
    p: float
    shape: tuple[int, ...]
    mask_shape: tuple[int, ...]
    kind: str

    @property
    def variance(self) -> float:
        """Variance ``c = q/(1-q)`` of the dropout noise (the paper prints ``q/(q-1)``, a sign slip)."""
        return self.p / (1.0 - self.p)


def fold_key(*parts: int) -> int:
    """Mix integers into one 63-bit generator seed (splitmix64), so that neighbouring inputs give unrelated noise.

    Args:
        parts: Any integers, for example ``(seed, rank, step, micro_batch)``.

    Returns:
        An integer in ``[0, 2**63)``.

    Example:
        >>> fold_key(1, 0, 0) != fold_key(1, 0, 1)
        True
    """
    state = 0
    for part in parts:
        state = (state + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


class KeyedGenerators:
    """One `torch.Generator` per device, all seeded with one key."""

    def __init__(self, key: int) -> None:
        self.key = key
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator of `device`."""
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.manual_seed(self.key)
            self._generators[device] = generator
        return self._generators[device]


def noise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for a site's noise: at least float32, because ``1 + 0.08`` has three digits in bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_signs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw independent ``+1`` and ``-1`` with probability one half each.

    Every bit of a random integer is one sign: on a CPU, where random numbers are made one after another, this takes a
    twentieth of the time of ``bernoulli_``.

    Args:
        shape: Shape of the result.
        dtype: Its floating-point type.
        generator: Source of the randomness; its device is the result's.

    Returns:
        The signs.

    Example:
        >>> signs = random_signs((2, 3), torch.float32, torch.Generator().manual_seed(1))
        >>> signs.shape, signs.abs().unique()
        (torch.Size([2, 3]), tensor([1.]))
    """
    count, device = math.prod(shape), generator.device
    words = torch.empty(-(-count // 32), 1, dtype=torch.int32, device=device).random_(
        -(2**31), None, generator=generator
    )
    bits = (words >> torch.arange(32, dtype=torch.int32, device=device)).bitwise_and_(1)
    return bits.flatten()[:count].view(tuple(shape)).to(dtype).mul_(2).sub_(1)


class Directions:
    r"""The random directions ``r_i = ±sqrt(c_i)`` of all the sites of one batch, the same in every pass that asks.

    Rademacher signs have the mean and covariance of the dropout noise and the least variance of all such noises in
    the quadratic forms that follow.

    Args:
        key: Seed; the same key gives the same directions.
        mask: ``"as_model"`` draws one value per entry of the site's mask; ``"elementwise"`` one per entry of the
            tensor, as the paper's code does.
    """

    def __init__(self, key: int, mask: str = "as_model") -> None:
        self._generators = KeyedGenerators(key)
        self._mask = mask
        self._drawn: list[tuple[Site, Tensor]] = []
        self._next = 0
        self._complete = False

    def shape_of(self, site: Site) -> tuple[int, ...]:
        """Return the shape of the noise at `site`."""
        return site.mask_shape if self._mask == "as_model" else site.shape

    def rewind(self) -> None:
        """Start the next pass: the sites get the directions they got in the first.

        Raises:
            InconsistentPassesError: If the pass that ended reached fewer sites than the one before it.
        """
        if self._next != len(self._drawn):
            raise InconsistentPassesError(
                f"The first pass over this batch reached {len(self._drawn)} dropout sites, a later one {self._next}. "
                f"{_SAME_EVERY_TIME}"
            )
        self._next = 0
        self._complete = True

    def at(self, position: int) -> Tensor:
        """Return the direction of site number `position`, which was drawn before."""
        return self._drawn[position][1]

    def draw(self, site: Site, like: Tensor) -> Tensor:
        """Return the direction of the next site.

        Args:
            site: The site that was reached.
            like: The tensor that is dropped from; gives device and dtype.

        Returns:
            Tensor of shape ``shape_of(site)``, entries ``±sqrt(c)``, float32 or float64.

        Raises:
            InconsistentPassesError: If an earlier pass met another site at this place.
        """
        position, self._next = self._next, self._next + 1
        if position < len(self._drawn):
            first, direction = self._drawn[position]
            if (first.p, first.shape, first.kind) != (site.p, site.shape, site.kind):
                raise InconsistentPassesError(
                    f"Dropout site number {position} was {first} in the first pass over this batch and {site} in a "
                    f"later one. {_SAME_EVERY_TIME}"
                )
            return direction
        if self._complete:
            raise InconsistentPassesError(
                f"The first pass over this batch reached {len(self._drawn)} dropout sites, a later one also {site}. "
                f"{_SAME_EVERY_TIME}"
            )
        direction = self._sample(site, noise_dtype(like.dtype), self._generators.on(like.device))
        self._drawn.append((site, direction))
        return direction

    def _sample(self, site: Site, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return random_signs(self.shape_of(site), dtype, generator).mul_(math.sqrt(site.variance))


def check_drop_prob(p: float, kind: str) -> None:
    """Refuse a drop probability for which the noise has no finite variance.

    Raises:
        InvalidArgumentError: If `p` is not in ``[0, 1)``.
    """
    try:
        valid = bool(0.0 <= p < 1.0)
    except TypeError:
        valid = False
    if not valid:
        raise InvalidArgumentError(
            f"{kind} was called with drop probability {p}; the variance p/(1-p) of its noise is finite only for "
            "0 <= p < 1. Lower the probability."
        )
