"""What holds for the length of a ``with``: values of context variables, and attributes of objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

from torch import nn

__all__ = ["holding", "modes_kept", "nothing", "patched"]

T = TypeVar("T")


class holding(Generic[T]):  # as in contextlib; a generator would take three times as long
    """Gives a context variable a value for the length of a ``with``."""

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable, self._value = variable, value

    def __enter__(self) -> None:
        """Set it."""
        self._token: Token[T] = self._variable.set(self._value)

    def __exit__(self, *exception: object) -> None:
        """Give it back the one that it had."""
        self._variable.reset(self._token)


@contextmanager
def patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes of objects, given with name and value each, and put back what was there."""
    before = [(target, name, name in target.__dict__, target.__dict__.get(name)) for target, name, _ in patches]
    try:
        for target, name, value in patches:
            target.__dict__[name] = value
        yield
    finally:
        for target, name, had, value in reversed(before):
            if had:
                target.__dict__[name] = value
            else:
                target.__dict__.pop(name, None)


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing, in the place of a method."""


@contextmanager
def modes_kept(*roots: nn.Module) -> Iterator[None]:
    """Put back which modules are in training mode, of these and all below them."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
