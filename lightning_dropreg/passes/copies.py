"""Copies of state, and means of several states: tensors, arrays and plain containers of them."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

__all__ = ["ATOMS", "CONTAINERS", "ITERATORS", "SMALL", "copy_of", "is_copied", "mean_of"]

SMALL = 256
"""Longer containers are data (a vocabulary): what is added to them is undone, what is in them is not looked at."""
ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device})
CONTAINERS = frozenset({list, dict, set, deque, defaultdict, Counter, OrderedDict})
ITERATORS: frozenset[type] = frozenset({type(iter([])), type(iter(())), type(iter(range(0)))})
"""Iterators of which a copy goes on by itself from the same place."""


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and type(value).__module__ in {"builtins", "collections"}


def is_copied(kind: type) -> bool:
    """Whether values of this type are copied; everything else is shared."""
    return (
        issubclass(kind, (Tensor, list, set, deque, tuple))
        or kind in ITERATORS
        or (issubclass(kind, dict) and kind.__module__ in {"builtins", "collections"})
        or kind.__module__ == "numpy"
    )


def copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """Copy tensors, arrays and plain containers; everything else is shared."""
    if type(value) in ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)][1]
    copied = value
    if isinstance(value, Tensor):
        # parameters and other leaves that are trained are not state of a batch
        copied = value if value.is_leaf and value.requires_grad else _of_same_memory(value, memo)
    elif isinstance(value, (list, set, deque)) or _is_dict(value):
        copied = value.copy() if type(value).__module__ in {"builtins", "collections"} else value
        memo[id(value)] = (value, copied)  # before its contents, where it holds itself
        if copied is not value and len(value) <= SMALL and not isinstance(value, set):
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                if type(v) not in ATOMS:  # of which lists of data are full
                    copied[k] = copy_of(v, memo)
    elif isinstance(value, tuple) and len(value) <= SMALL:
        items = [copy_of(v, memo) for v in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            copied = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif type(value) in ITERATORS:
        copied = copy.copy(value)
    elif type(value).__module__ == "numpy" and hasattr(value, "copy"):
        copied = value.copy()
    memo[id(value)] = (value, copied)  # the original too, so that its id stays its own
    return copied


def _of_same_memory(value: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy of a tensor; of a view of what was copied before, the same view of that copy."""
    base = value._base
    known = None if base is None or base.layout is not torch.strided else memo.get(id(base))
    if known is None or base is None or known[1] is base or known[1].stride() != base.stride():
        return value.clone()
    offset = value.storage_offset() - base.storage_offset()
    view: Tensor = known[1].as_strided(value.shape, value.stride(), offset + known[1].storage_offset())
    return view


def mean_of(values: list[Any], memo: dict[tuple[int, ...], Any], buffers: Collection[int] = ()) -> Any:
    """The mean of tensors within equal containers, but of `buffers` (ids) and their views; else the first value."""
    first = values[0]
    key = tuple(map(id, values))
    if type(first) in ATOMS or any(type(v) is not type(first) or v is first for v in values[1:]):
        return first
    if key not in memo:
        memo[key] = (values, first)  # where a container holds itself
        memo[key] = (values, _mean_of_distinct(values, memo, buffers))
    return memo[key][1]


def _mean_of_distinct(values: list[Any], memo: dict[tuple[int, ...], Any], buffers: Collection[int]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if id(first) in buffers or id(first._base) in buffers:
            return first
        same = first.is_floating_point() and all(v.shape == first.shape for v in values)
        trained = first.is_leaf and first.requires_grad
        if not same or trained or all(torch.equal(first, value) for value in values[1:]):
            return first  # which other tensors may be views of
        return sum(values[1:], first) / len(values)
    if not (_is_dict(first) or isinstance(first, (list, tuple))) or len(first) > SMALL:
        return first
    held = first.values() if isinstance(first, dict) else first
    if all(type(each) in ATOMS for each in held) or any(len(v) != len(first) for v in values):
        return first
    if isinstance(first, dict):
        if any(v.keys() != first.keys() for v in values):
            return first
        for k in first:
            first[k] = mean_of([v[k] for v in values], memo, buffers)
        return first
    items = [mean_of(list(column), memo, buffers) for column in zip(*values, strict=True)]
    if isinstance(first, list):
        first[:] = items
        return first
    if all(a is b for a, b in zip(items, first, strict=True)):
        return first
    return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
