"""Dropout as in training, everything else as in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["dropout_mode"]

# what does something else than dropping in training mode
_OTHERS = (nn.modules.batchnorm._NormBase, nn.RReLU)


@contextmanager
def dropout_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` into training mode, batch and instance norm excepted, and put every mode back afterwards.

    Batch norm keeps its statistics and neither uses nor learns those of the batch.

    Args:
        module: The model.

    Yields:
        Nothing.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()
        >>> with dropout_mode(net):
        ...     print(net[0].training, net[1].training)
        False True
        >>> net[1].training
        False
    """
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = not isinstance(child, _OTHERS)
        yield
    finally:
        for child, training in modes:
            child.training = training
