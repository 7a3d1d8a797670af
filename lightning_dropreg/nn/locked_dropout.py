"""Dropout with one mask for all time steps."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dropreg.checks import check_drop_prob, check_flags
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.interception.handlers.custom import drop

__all__ = ["LockedDropout"]


class LockedDropout(nn.Module):
    """Dropout of a sequence, its mask shared over time: locked or variational dropout (Gal and Ghahramani, 2016).

    Args:
        p: Drop probability, in ``[0, 1)``.
        batch_first: Whether sequences are ``(batch, time, features)``; otherwise ``(time, batch, features)``.

    Raises:
        InvalidArgumentError: If `p` is outside its range.

    Example:
        >>> import torch
        >>> h = LockedDropout(0.5)(torch.ones(2, 7, 3))
        >>> bool((h == h[:, :1]).all())
        True
    """

    def __init__(self, p: float = 0.5, batch_first: bool = True) -> None:
        super().__init__()
        check_drop_prob(p, "LockedDropout")
        check_flags(batch_first=batch_first)
        self.p = p
        self.batch_first = batch_first

    def forward(self, h: Tensor) -> Tensor:
        """Drop features of whole sequences.

        Args:
            h: Sequences, of shape ``(batch, time, *features)`` or ``(time, batch, *features)``.

        Returns:
            Tensor of the same shape; in evaluation `h` itself.

        Raises:
            InvalidArgumentError: If `h` has no batch and time dimensions.
        """
        if h.ndim < 3:
            raise InvalidArgumentError(
                f"LockedDropout was given a tensor of shape {tuple(h.shape)}; it needs batch, time and features."
            )
        mask_shape = list(h.shape)
        mask_shape[1 if self.batch_first else 0] = 1
        return drop(h, self.p, mask_shape, self.training, kind="locked_dropout")

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}, batch_first={self.batch_first}"
