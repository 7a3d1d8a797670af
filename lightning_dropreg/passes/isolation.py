"""Repeating a training step within one batch, so that the batch leaves the traces of one step.

A step has side effects: batch-norm statistics, a hidden state kept as an attribute, metrics, random numbers. When it
is run several times for one batch, every run must start from the same state (or the runs could not be compared) and
the state must advance once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_dropreg.errors import UnsupportedModuleError
from lightning_dropreg.passes.holders import STRUCTURE, Holders, ModuleState
from lightning_dropreg.passes.randomness import RandomState
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.passes.structure import Structure

__all__ = ["Isolation"]

T = TypeVar("T")

# Of larger buffers only those that were written to are averaged.
_LARGE = 1 << 16


class Isolation:
    """Gives every run of a step the same random and module state, and settles what state is left in the end.

    The first run is the one whose random numbers count. Module state is that of the first run; with ``mean=True``,
    what is a floating-point tensor (batch-norm statistics, a hidden state, a metric) becomes the mean of all runs': for
    an antithetic pair that is the state of the model without dropout up to second order, as in the paper's experiments.

    Args:
        module: The module whose state is kept: buffers, attributes that are tensors, numbers, plain containers of
            them, or metrics, and what it is made of (`lightning_dropreg.passes.structure`). None keeps only the random
            state.
        mean: Whether floating-point state is averaged over the runs.
        late: Collects buffers, other than those of norms, with what makes means of them, to be added when no autograd
            graph holds them any more. None writes at once, and torch says so in the backward if a graph does.
        reach: What else is put back: generators and plain objects; by default those that `module` holds.
        before: The holders of the state in the batch before, of the same module; None if there was none.

    Attributes:
        holders: What holds the state, once it was entered.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> x = torch.randn(4, 2)
        >>> with Isolation(layer) as isolation:
        ...     for _ in range(3):
        ...         y = isolation.run(lambda: layer(x))
        >>> int(layer.num_batches_tracked)
        1
    """

    holders: Holders

    def __init__(
        self,
        module: nn.Module | None,
        mean: bool = False,
        late: list[tuple[Tensor, Tensor]] | None = None,
        reach: Reach | None = None,
        before: Holders | None = None,
    ) -> None:
        if reach is None:
            reach = Reach({} if module is None else {"self": module})
        self._reach = reach
        self._module = module
        self._before = before if before is not None and before.reach is reach else None
        self._late = late
        self._end_structure: Structure | None = None
        self._mean = mean
        self._original: list[ModuleState] = []
        self._versions: dict[int, int] = {}
        self._start: list[ModuleState] = []
        self._start_random: RandomState | None = None
        self._ends: list[list[ModuleState]] = []
        self._end_random: RandomState | None = None
        self._untouched = True
        self._stands = False  # as the one run that counts has left everything
        self._memos: tuple[dict[int, Any], dict[int, Any]] = {}, {}  # of the start, and of the last run

    def __enter__(self) -> Isolation:
        """Remember the state in which every run starts."""
        before = self._before
        self.holders = self._before = Holders(self._module, self._reach) if before is None else before.again()
        self._original = self.holders.states
        self._versions = {
            id(buffer): buffer._version
            for number in self.holders.others
            for buffer in self._original[number].buffers.values()
            if buffer is not None and _numel(self.holders.all[number], buffer) > _LARGE and not buffer.is_inference()
        }
        self._memos = self._reach.still.in_start(), {}
        self._start = self.holders.copies(self._original, self._memos[0])
        self._start_random = RandomState(self._reach.generators())
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the state of one step."""
        self.settle()

    def run(
        self, step: Callable[[], T], trace: bool = True, cuts: Sequence[Callable[[], None]] = (), alone: bool = False
    ) -> T:
        """Call `step`, starting from the state at the beginning of the batch.

        Args:
            step: The step; called with no arguments.
            trace: Whether this run counts for the state that is left in the end.
            cuts: A run that did the work of several leaves the state that each of these makes of its own.
            alone: Whether it is to be the only one that counts, so that its state stands as it is. Nothing of the
                user's may run until the next run, or the end.

        Returns:
            What `step` returned.
        """
        if self._stands:
            self._note_end()
        # the first run that counts works on the objects themselves, the others on copies
        first = trace and not self._ends
        if not (trace and self._untouched):
            self.holders.structure.restore()
            self.holders.install(self._original if first else self._from_start())
            assert self._start_random is not None
            self._start_random.restore()
        self._untouched = False
        try:
            result = step()
        except BaseException:
            cuts = ()
            raise
        finally:
            self._reach.still.after_run(first, self._memos[0])
            self._stands = trace and alone and not cuts and not self._ends
            if trace and not self._stands:
                self._note_end(cuts)
        return result

    def _note_end(self, cuts: Sequence[Callable[[], None]] = ()) -> None:
        assert self._start_random is not None
        self._stands = False
        self._end_random = self._end_random or self._start_random.again()
        self._end_structure = self._end_structure or self._structure_now()
        self._ends += self._cut(cuts) if cuts else [self.holders.now()]

    def _from_start(self) -> list[ModuleState]:
        self._memos = self._memos[0], self._reach.still.in_run()
        return self.holders.copies(self._start, self._memos[1])

    def note_what_is_still(self) -> list[str]:
        """Find out, after a run aside, which large tensors it left alone, so that passes share them from now on.

        Returns:
            Where tensors are that it writes to past autograd, though it did not when it was looked at before.
        """
        norms = [m for m in self.holders.modules if isinstance(m, nn.modules.batchnorm._NormBase)]
        of_kernels = {id(buffer) for norm in norms for buffer in norm._buffers.values()}
        return [self.holders.place_of(t) for t in self._reach.still.note(*self._memos, of_kernels)]

    def _cut(self, cuts: Sequence[Callable[[], None]]) -> list[list[ModuleState]]:
        whole, ends = self.holders.now(), []
        for cut in cuts:
            # buffers are the same objects in all: others hold on to them
            copied = self.holders.copies(whole)
            self.holders.install([ModuleState(a.buffers, b.attributes) for a, b in zip(whole, copied, strict=True)])
            cut()
            ends.append(self.holders.now())
        return ends

    def drew_randomness(self) -> bool:
        """Whether the last run drew from the global random states."""
        return self._start_random is not None and not self._start_random.is_current()

    def drawn_generators(self) -> list[str]:
        """Return the places of the generators of the step's own that the last run drew from."""
        return [] if self._start_random is None else self._start_random.moved(own=True)

    def outcome(self, cuts: Sequence[Callable[[], None]] = ()) -> list[dict[str, Any]]:
        """Return what the last run would leave of every module, by name, had it counted; `cuts` as in `run`."""
        ends = self._cut(cuts) if cuts else [self.holders.now()]
        memo: dict[tuple[int, ...], Any] = {}
        states = ends[0] if len(ends) == 1 else [ModuleState.mean(e, memo) for e in zip(*ends, strict=True)]
        return [
            {**state.buffers, **{name: value for name, value in state.attributes.items() if name not in STRUCTURE}}
            for state in states
        ]

    def restart(self) -> None:
        """Forget the runs so far: the next one is the first."""
        self._stands = False
        for original, start in zip(self._original, self._from_start(), strict=True):
            for name, buffer in original.buffers.items():
                before = start.buffers[name]
                if buffer is not None and before is not None:
                    buffer.detach().copy_(before)  # the very objects are kept, as in `ModuleState.mean`
            original.attributes = start.attributes
        self.holders.structure.restore()
        self._ends, self._end_random, self._end_structure = [], None, None

    def settle(self) -> None:
        """Put the state that one step leaves in place: nothing has happened if no run counted."""
        self._memos = self._memos[0], {}
        if self._stands:
            return
        (self._end_structure or self.holders.structure).restore()
        if self._ends:
            memo: dict[tuple[int, ...], Any] = {}
            if self._mean and len(self._ends) > 1:
                columns = list(zip(*self._ends, strict=True))
                buffers = {id(buffer) for state in self._ends[0] for buffer in state.buffers.values()}
                self._ends = [[ModuleState.mean(ends, memo, buffers) for ends in columns]]
                for module, ends in zip(self.holders.modules, columns, strict=False):
                    self._average_buffers(module, ends)
            self.holders.install(self._ends[0])
        else:
            self.holders.install(self._original)
        random_state = self._end_random or self._start_random
        assert random_state is not None
        random_state.restore()

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Run further steps (with ``trace=False``) after `settle` and put everything back as it is now."""
        assert self._start_random is not None
        current, current_random = self.holders.now(), self._start_random.again()
        structure = self._structure_now()
        try:
            yield
        finally:
            structure.restore()
            self.holders.install(current)
            current_random.restore()

    def _average_buffers(self, module: nn.Module, ends: Sequence[ModuleState]) -> None:
        """Let the buffers that a module is left with be the means; others hold on to them (DDP, to broadcast them)."""
        for name, first in ends[0].buffers.items():
            values = [end.buffers.get(name) for end in ends]
            if first is None or not first.is_floating_point() or (first.requires_grad and first.is_leaf):
                continue
            if any(value is None or value.shape != first.shape or value is first for value in values[1:]):
                continue
            if first.numel() > _LARGE and self._versions.get(id(first)) == first._version:
                continue  # nothing was written to it, and it is no statistic of a kernel's
            with torch.no_grad():
                mean = torch.stack([value for value in values if value is not None]).mean(0)
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
                first.data.copy_(mean)  # in training no backward reads it
            elif self._late is not None:
                self._late.append((first, (mean - first.detach()).nan_to_num(0.0, 0.0, 0.0)))  # masks hold infinities
            elif not torch.equal(mean, first):
                first.detach().copy_(mean)

    def _structure_now(self) -> Structure:
        before = self.holders.structure
        return before if before.is_current() else Structure(self.holders.modules)


def _numel(module: nn.Module, buffer: Tensor) -> int:
    if isinstance(buffer, UninitializedBuffer):
        raise UnsupportedModuleError(
            f"{type(module).__name__} makes its buffers in its first forward, and the first step runs several times. "
            "Run one batch through the model before training."
        )
    return buffer.numel()
