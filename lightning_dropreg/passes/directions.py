"""The random directions in which the sites of a batch are perturbed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dropreg.errors import InconsistentPassesError, UnsupportedSiteError
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.noise import KeyedGenerators, random_signs

__all__ = ["SAME_EVERY_TIME", "Directions"]

SAME_EVERY_TIME = (
    "The training step must do the same thing every time it is called with the same batch; what it decides at random "
    "must be drawn from torch's, numpy's or Python's global random state, which is put back between passes."
)
"""What a step must keep to, for messages."""


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
        self.key = key
        self.mask = mask
        self._generators = KeyedGenerators(key)
        self._sites: list[Site] = []
        self._drawn: dict[int, Tensor] = {}
        self._next = 0
        self._complete = False

    def shape_of(self, site: Site) -> tuple[int, ...]:
        """Return the shape of the noise at `site`."""
        return site.mask_shape if self.mask == "as_model" else site.shape

    def rewind(self) -> None:
        """Start the next pass: the sites get the directions they got in the first.

        Raises:
            InconsistentPassesError: If the pass that ended reached fewer sites than the one before it.
        """
        if self._next != len(self._sites):
            raise InconsistentPassesError(
                f"The first pass over this batch reached {len(self._sites)} dropout sites, a later one {self._next}. "
                f"{SAME_EVERY_TIME}"
            )
        self._next = 0
        self._complete = True

    def at(self, position: int) -> Tensor:
        """Return the direction of site number `position`, which was drawn before."""
        return self._drawn[position]

    def meet(self, site: Site) -> int:
        """Go on to the next site, whose direction may be drawn elsewhere (in a compiled graph).

        Returns:
            Its number.

        Raises:
            InconsistentPassesError: If an earlier pass met another site at this place.
        """
        position, self._next = self._next, self._next + 1
        if position < len(self._sites):
            first = self._sites[position]
            if (first.p, first.shape, first.kind) != (site.p, site.shape, site.kind):
                raise InconsistentPassesError(
                    f"Dropout site number {position} was {first} in the first pass over this batch and {site} in a "
                    f"later one. {SAME_EVERY_TIME}"
                )
            return position
        if self._complete:
            raise InconsistentPassesError(
                f"The first pass over this batch reached {len(self._sites)} dropout sites, a later one also {site}. "
                f"{SAME_EVERY_TIME}"
            )
        self._sites.append(site)
        return position

    def draw(self, site: Site, like: Tensor) -> Tensor:
        """Return the direction of the next site.

        Returns:
            Tensor of shape ``shape_of(site)``, entries ``±sqrt(c)``, float32 or float64.

        Raises:
            InconsistentPassesError: If an earlier pass met another site at this place.
        """
        position = self.meet(site)
        direction = self._drawn.get(position)
        if direction is None:
            # a seed for every site: a compiled graph draws it without knowing what the others draw
            direction = self._sample(site, noise_dtype(like.dtype), self._generators.at(position, like.device))
            self._drawn[position] = direction
        return direction

    def _sample(self, site: Site, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        try:
            return random_signs(self.shape_of(site), dtype, generator, math.sqrt(site.variance))
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise UnsupportedSiteError(
                f"A dropout with p={site.p} of a tensor of shape {site.shape} is called inside "
                "torch.vmap(randomness='different'), which makes noise of its own for every slice that no later pass "
                "could repeat. Call the dropout outside of vmap, on the whole tensor; MiniBatchDropout may keep it."
            ) from error
