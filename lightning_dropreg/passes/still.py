"""Large tensors that a step was seen not to write to: its passes share them, instead of getting copies each.

A data set kept on the module as ``self.data``, a table of positions, a causal mask: copies of them for every pass may
cost more than the pass. Whether a step writes to them is seen by value, at the looks. In between a write through torch
shows in the tensor's version, and then what it held is there to start from again. A write past autograd (``.data``, a
view in numpy) shows in nothing but the values, at the next look.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGE", "Still"]

LARGE = 1 << 12
"""Smaller tensors are copied faster than looked after."""

Memo = dict[int, tuple[Any, Any]]
"""What was copied, by its id, and its copy."""


class Still:
    """Tensors that are shared by the passes over a batch, and what they held when they were looked at.

    Args:
        before: Those of the look before.

    Example:
        >>> data, still = torch.zeros(LARGE), Still()
        >>> copied = data.clone()
        >>> still.note({id(data): (data, copied)}, {id(copied): (copied, copied.clone())}, [])
        []
        >>> still.in_start()[id(data)][1] is copied, still.in_run()[id(copied)][1] is data
        (True, True)
        >>> _ = data.add_(1)
        >>> still.in_run()
        {}
    """

    def __init__(self, before: Still | None = None) -> None:
        self._before = {} if before is None else {id(tensor): tensor for tensor, _ in before._unchanged()}
        self._known: list[tuple[weakref.ref[Tensor], int, Tensor]] = []

    def note(self, in_start: Memo, in_run: Memo, but: Collection[int]) -> list[Tensor]:
        """Find out, after a run from copies, which tensors it did not write to.

        Args:
            in_start: Of the state in which runs start.
            in_run: Of the state in which the last run started.
            but: The ids of those that kernels write to when they please.

        Returns:
            Tensors that were shared until now and are written to past autograd.
        """
        self._known, moving = [], []
        for tensor, held in list(in_start.values()):
            if tensor is held or not isinstance(tensor, Tensor) or id(tensor) in but or not _is_plain(tensor):
                continue
            used = in_run.get(id(held), (None, held))[1]
            if used is held:  # not used, or not copied
                continue
            if _equal(used, held) and _equal(tensor, held):
                if used._version == 0:
                    self._known.append((weakref.ref(tensor), tensor._version, held))
            elif used._version == 0 and id(tensor) in self._before:
                moving.append(tensor)
        self._before = {}
        return moving

    def in_start(self) -> Memo:
        """Return what takes the place of copies in the state in which runs start: what the tensors hold."""
        return {id(tensor): (tensor, held) for tensor, held in self._unchanged()} if self._known else {}

    def in_run(self) -> Memo:
        """Return what takes the place of copies in a run: the tensors themselves."""
        return {id(held): (held, tensor) for tensor, held in self._unchanged()} if self._known else {}

    def after_run(self, counts: bool, started: Mapping[int, Any]) -> None:
        """Go on to copy what a run has written to.

        Args:
            counts: Whether the run was the one whose state stays; else the tensors are put back.
            started: The memo of the state in which the runs of this batch start, which tells those that they share.
        """
        if len(self._known) == sum(1 for _ in self._unchanged()):
            return
        with torch.no_grad():
            for ref, version, held in self._known:
                tensor = ref()
                if tensor is not None and tensor._version != version and not counts and id(tensor) in started:
                    tensor.data.copy_(held)
        self._known = [known for known in self._known if _unchanged(known[0](), known[1])]

    def _unchanged(self) -> Iterator[tuple[Tensor, Tensor]]:
        for ref, version, held in self._known:
            tensor = ref()
            if tensor is not None and _unchanged(tensor, version):
                yield tensor, held


def _unchanged(tensor: Tensor | None, version: int) -> bool:
    return tensor is not None and tensor._version == version


def _is_plain(tensor: Tensor) -> bool:
    if tensor.numel() < LARGE or tensor.grad_fn is not None or tensor.is_inference():
        return False
    return tensor.layout is torch.strided and not tensor.is_nested and type(tensor) is Tensor


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
