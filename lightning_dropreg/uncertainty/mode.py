"""Dropout as in training, everything else as in evaluation."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lightning_dropreg.errors import InvalidArgumentError, UnsupportedModuleError
from lightning_dropreg.nn import EmbeddingDropout, LockedDropout, WeightDrop
from lightning_dropreg.nn.weight_drop import DropConnect
from lightning_dropreg.numerics.context import modes_kept
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS, NORM_LAYERS

__all__ = ["check_training", "dropout_mode"]

# what does something else than dropping in training mode
_OTHERS = (*NORM_LAYERS, nn.RReLU)
# what only drops in training mode
_DROPOUTS = (
    *DROPOUT_LAYERS,
    nn.RNNBase,
    nn.MultiheadAttention,
    DropConnect,
    EmbeddingDropout,
    LockedDropout,
    WeightDrop,
)
_WAYS = ("all", "dropout")


@contextmanager
def dropout_mode(module: nn.Module, training: str | Sequence[str] = "all") -> Iterator[None]:
    """Turn on the dropout of `module`, and put every mode back afterwards.

    Batch norm keeps its statistics and neither uses nor learns those of the batch, whatever is asked for.

    Args:
        module: The model.
        training: Which of its modules are in training mode. ``"all"``: all but batch and instance norm, so that
            functional dropout with ``training=self.training`` drops too; ``"dropout"``: only layers that do nothing
            but drop in training mode (torch's dropout layers, recurrent layers and attention, and those of this
            package), so that a branch ``if self.training:`` of the model's own does what it does in evaluation; or a
            list of patterns of paths (``["encoder.*"]``), for a model that has both.

    Yields:
        Nothing.

    Raises:
        UnsupportedModuleError: If a pattern matches nothing.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()
        >>> with dropout_mode(net):
        ...     print(net[0].training, net[1].training)
        False True
        >>> net[1].training
        False
    """
    check_training(training)
    chosen = _chosen(module, training)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with modes_kept(module):
        try:
            for child in module.modules():
                child.training = child in chosen and not isinstance(child, _OTHERS)
            # a transformer layer in evaluation mode would run past the dropout in it
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def check_training(training: object) -> None:
    """Refuse what `dropout_mode` does not understand."""
    words = isinstance(training, str) and training in _WAYS
    if not words and not (
        isinstance(training, (list, tuple)) and training and all(isinstance(path, str) for path in training)
    ):
        raise InvalidArgumentError(
            f"training={training!r} must be one of {', '.join(_WAYS)}, or a list of patterns of paths of modules."
        )


def _chosen(module: nn.Module, training: str | Sequence[str]) -> set[nn.Module]:
    if training == "all":
        return set(module.modules())
    if training == "dropout":
        return {child for child in module.modules() if isinstance(child, _DROPOUTS)}
    found: set[nn.Module] = set()
    for pattern in training:
        matched = [child for path, child in module.named_modules() if fnmatch.fnmatchcase(path, pattern)]
        if not matched:
            raise UnsupportedModuleError(f"training: no module of {type(module).__name__} has a path like {pattern!r}.")
        found.update(matched)
    return found
