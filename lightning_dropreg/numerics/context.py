"""Context variables: what holds for everything that runs inside a ``with``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["holding"]

T = TypeVar("T")


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Give a context variable a value for the length of a ``with``."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
