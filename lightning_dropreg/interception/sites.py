"""What a dropout site is.

Dropout at site ``i`` computes ``h_i * (1 + eta_i)`` with ``eta = -1`` with probability ``q`` and ``q/(1-q)``
otherwise: mean 0 and variance ``c = q/(1-q)``. Everything this package does needs only noise with these two
moments, so a site is described by ``q`` and by the shape of its mask.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Site"]


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
