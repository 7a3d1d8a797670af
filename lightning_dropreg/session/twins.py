"""The same class in the two packages that Lightning is shipped as: ``lightning.pytorch`` and ``pytorch_lightning``.

Libraries still import the older name, whose classes are other objects than those of the newer one. What this package
asks of a Trainer and a module is the same in both, so it must only not mistake the one's classes for strangers.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["is_a", "twins"]

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def twins(kind: type) -> tuple[type, ...]:
    """Return a class of ``lightning.pytorch`` and the class of that name in ``pytorch_lightning``, if that is in use.

    Returns:
        One or two classes, for `isinstance`.

    Example:
        >>> from lightning import Callback
        >>> twins(Callback)[0] is Callback
        True
    """
    home = kind.__module__
    for one, other in (_NAMES, _NAMES[::-1]):
        if home == one or home.startswith(f"{one}."):
            twin = getattr(sys.modules.get(other + home[len(one) :]), kind.__name__, None)
            return (kind,) if twin is None or twin is kind else (kind, twin)
    return (kind,)


def is_a(instance: Any, *kinds: type) -> bool:
    """Tell whether something is an instance of a class of Lightning, whichever package it comes from."""
    return any(isinstance(instance, twins(kind)) for kind in kinds)
