"""Whether a loss is a mean over the rows of a batch, as ``batch_fraction`` supposes."""

from __future__ import annotations

from lightning_dropreg.errors import UnsupportedModuleError

__all__ = ["check_mean_over_rows"]


def check_mean_over_rows(whole: float, first: float, second: float, fraction: float) -> None:
    """Refuse a loss that adds up its rows.

    The two parts of a batch average to the loss of the whole, each weighted with its share of the rows, if the loss is
    a mean; they add up to it if the loss is a sum. Of a sum, some of the rows give a penalty that is too small by
    their fraction, and a noise with too small a covariance.

    Args:
        whole: Loss of the batch.
        first: Loss of some of its rows.
        second: Loss of the others.
        fraction: Share of the first part in the rows.

    Raises:
        UnsupportedModuleError: If the parts add up to the whole and do not average to it.

    Example:
        >>> check_mean_over_rows(2.0, 1.0, 3.0, 0.5)
    """
    as_mean = abs(fraction * first + (1 - fraction) * second - whole)
    as_sum = abs(first + second - whole)
    if as_sum < 0.1 * abs(whole) and 2 * as_sum < as_mean:
        raise UnsupportedModuleError(
            f"The loss adds up over the rows of the batch ({whole:.4g} for all, {first:.4g} and {second:.4g} for the "
            "parts of it), and batch_fraction estimates on some of the rows, which is right for a mean over them. Use "
            "reduction='mean' (and a learning rate to match), set batch_dim to the dimension of the rows, or "
            "batch_fraction=None."
        )
