"""What the user's step is called with: whole again in every run over a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dropreg.errors import NotRepeatableError
from lightning_dropreg.numerics.context import patched
from lightning_dropreg.numerics.torch_private import hidden_from_modes
from lightning_dropreg.passes.batches import batch_tensors, fresh_batch, walk_batch

__all__ = ["Arguments", "StepCall"]


class StepCall(NamedTuple):
    """The user's step, and what the Trainer calls it with."""

    step: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """Call it, as the Trainer would."""
        return self.step(*self.args, **self.kwargs)


class Arguments:
    """The arguments of one call of ``training_step``, for as many calls as it takes.

    Every run gets containers and arrays of its own, so that what it assigns, pops or appends is not there in the next.
    The run that counts first gets the very objects that the Trainer passed, so that other callbacks find in the batch
    what the step left there.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], copies: bool, name: str) -> None:
        self.copies = copies
        self._name = name
        self._original: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self.tensors: list[Tensor] = []
        self._kept = fresh_batch((args, kwargs), copies, self.tensors)
        self._marks = [] if copies else [_mark(tensor) for tensor in self.tensors]
        self._was_called = False

    @property
    def batch(self) -> Any:
        """The batch as it was."""
        return self._kept[0][0]

    def call(self, step: Callable[..., Any], original: bool = False, batch: Any = None) -> tuple[Any, list[str]]:
        """Call a step.

        Args:
            step: The step.
            original: Whether it gets the Trainer's own objects, if nothing got them before.
            batch: Another batch in the place of the batch.

        Returns:
            What it returned, and which tensors it changed in place, if these were copies.

        Raises:
            NotRepeatableError: If an earlier run has changed a tensor in place that was not copied.
        """
        self._check()
        if original and self._original is not None:
            (args, kwargs), self._original = self._original, None
            return step(*args, **kwargs), []
        args, kwargs = self._kept if batch is None else ((batch, *self._kept[0][1:]), self._kept[1])
        args, kwargs = fresh_batch((args, kwargs), self.copies)
        given = batch_tensors((args, kwargs)) if self.copies and batch is None else []
        marks = [_mark(tensor) for tensor in given]
        output = step(*args, **kwargs)
        return output, self._places(
            _mark(tensor) != mark or not _equal(tensor, kept)
            for tensor, mark, kept in zip(given, marks, self.tensors, strict=False)
        )

    def copying(self) -> AbstractContextManager[None]:
        """Copy tensors for the runs inside, which so show what they write past autograd."""
        self._check()
        return patched((self, "copies", True))

    def _places(self, wanted: Iterable[bool]) -> list[str]:
        """Where the tensors are of which this is true."""
        numbers = [number for number, each in enumerate(wanted) if each]
        leaves = [path for path, leaf in walk_batch(self._kept) if isinstance(leaf, Tensor)] if numbers else []
        return [_place(leaves[number]) for number in numbers]

    def _check(self) -> None:
        if self.copies or not self._was_called:
            self._was_called = True
            return
        with hidden_from_modes():
            moved = [_mark(tensor) != mark for tensor, mark in zip(self.tensors, self._marks, strict=True)]
        if any(moved):
            changed = self._places(moved)
            raise NotRepeatableError(
                f"{self._name} has changed {', '.join(changed)} in place, and it runs several times for a batch, so "
                "that the next run would get another batch. In the first batch it did not, or every run would have "
                "got a copy. Change a copy: x = x.clone() before, or x = x * 2 instead of x.mul_(2)."
            )


def _place(path: str) -> str:
    for prefix, name in (("[0][0]", "batch"), ("[1]['batch']", "batch"), ("[0]", "arguments"), ("[1]", "arguments")):
        if path.startswith(prefix):
            return name + path[len(prefix) :]
    return path


def _mark(tensor: Tensor) -> tuple[object, ...]:
    """What shows that a tensor was changed in place, or that it got other data."""
    if tensor.is_inference():  # without a version
        return (tensor.shape,)
    version = tensor._version
    if tensor.layout is not torch.strided or tensor.is_nested or type(tensor) is not Tensor:
        return version, tensor.layout
    return version, tensor.data_ptr(), tensor.shape


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the contents are the same: what is written past autograd (``.data``, ``numpy()``) leaves no mark."""
    try:
        a, b = a.detach(), b.detach()
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))
    except (RuntimeError, NotImplementedError, TypeError):  # of a kind that cannot be compared
        return True
