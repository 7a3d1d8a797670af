"""Several draws of dropout at the last site only, with one pass through the body of the model.

Multi-sample dropout (Inoue, 2019) puts k masks on the last dropout layer, and the head behind it runs k times. In a
step that nobody prepared, what comes before the last site is found by watching: a `TorchFunctionMode` on top of
everything writes down what every call of a torch function returned, up to the last site. When the step runs again,
these calls return what they returned before, tensors with their graph, and only what comes behind them is computed.
So the body runs forward and backward once, the Python code around it k times. What the mode does not see (a custom
autograd function, a compiled part) is computed again from the same values: slower, not wrong.

It cannot be done where what was written down does not stay what it was (something behind the last site writes into it
in place), nor where parts are computed again in the backward (checkpoints). There every draw is a whole pass with the
earlier masks repeated, which is the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_dropreg.errors import InconsistentPassesError
from lightning_dropreg.interception.checkpointing import in_checkpointed_region
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.numerics.context import holding
from lightning_dropreg.passes.directions import SAME_EVERY_TIME
from lightning_dropreg.passes.holders import storage_of
from lightning_dropreg.passes.randomness import RandomState
from lightning_dropreg.passes.rules import Drop, draws_of_dropout
from lightning_dropreg.passes.run import Closure, Pass, run_pass

__all__ = ["draws_at_last_site", "follow", "shares_body"]

T = TypeVar("T")
_tape: ContextVar[_Tape | None] = ContextVar("tape", default=None)


def draws_at_last_site(
    closure: Closure, *, key: int, k: int, antithetic: bool = False, share: bool = True
) -> Iterator[Pass]:
    """Run passes with dropout whose masks differ at the last site only.

    Args:
        closure: Runs forward and loss and returns the scalar loss; the user's own code in it under `follow`.
        key: Seed of the masks; the first draw is the first of ``DROPOUT_k``.
        k: Number of draws.
        antithetic: Whether every second draw has the mask opposite to that of the one before.
        share: Whether the body may run once. Otherwise every draw is a whole pass.

    Yields:
        The passes. They have the graph of the body in common.
    """
    draws = draws_of_dropout(key, k, antithetic)
    tape = _Tape()
    with tape.put(record=True) if share else nullcontext():
        done = run_pass(closure, _Marking(draws[0], tape) if share else draws[0])
    last, sites = len(done.sites) - 1, draws[0].sites
    shared = share and tape.cut()
    yield done
    for draw in draws[1:]:
        draw.sites = list(sites)
        if not shared:
            yield run_pass(closure, _LastOnly(draws[0], draw, last, 0))
            continue
        with tape.put(record=False):
            done = run_pass(closure, _LastOnly(draws[0], draw, last, last))
        yield done


def follow(step: Callable[..., T]) -> Callable[..., T]:
    """Return `step`, to be watched or repeated in parts if it is run for `draws_at_last_site`."""
    tape = _tape.get()
    return step if tape is None else tape.around(step)


def shares_body(closure: Closure) -> bool:
    """Try whether a step gives the same with its body run once: the loss of a second draw, both ways."""
    try:
        once = list(draws_at_last_site(closure, key=0, k=2, share=True))[1].loss
    except (InconsistentPassesError, RuntimeError):  # a step that differentiates in itself finds the graph freed
        return False
    whole = list(draws_at_last_site(closure, key=0, k=2, share=False))[1].loss
    scale = float(whole.detach().abs())
    return abs(float(once.detach()) - float(whole.detach())) <= 1e-3 * scale


class _Tape(TorchFunctionMode):
    """What the torch functions of a step returned, up to the last dropout site."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any]] = []
        self._written: list[tuple[int, int]] = []  # which call wrote into which storage
        self._boundary = 0
        self._random: RandomState | None = None
        self._checkpointed = self._used = False
        self._recording = True
        self._position = 0

    def put(self, record: bool) -> AbstractContextManager[None]:
        """Let what `follow` returns be written down, or else repeated."""
        self._recording, self._position = record, 0
        return holding(_tape, self)

    def around(self, step: Callable[..., T]) -> Callable[..., T]:
        """Return `step` under this mode."""

        def watched(*args: Any, **kwargs: Any) -> T:
            self._used = True
            with self:
                return step(*args, **kwargs)

        return watched

    def mark(self) -> None:
        """Note that a site is reached: what was called before it is the body, if none comes after it."""
        self._boundary = len(self._calls)
        self._random = RandomState()

    def cut(self) -> bool:
        """Forget what came after the last site; return whether the rest may be repeated."""
        body = self._calls[: self._boundary]
        storages = {storage_of(leaf) for _, result in body for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        later = {storage for position, storage in self._written if position >= self._boundary}
        self._calls, self._written = body, []
        return self._used and not (self._checkpointed or storages & later)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` and write down the result, or return what it returned before.

        Returns:
            The result.

        Raises:
            InconsistentPassesError: If another function is called than before.
        """
        kwargs = kwargs or {}
        if self._recording:
            return self._record(func, args, kwargs)
        if self._position >= len(self._calls):
            if self._random is not None and self._position == len(self._calls):
                self._random.restore()  # what the head draws is what it drew in the first pass
                self._position += 1
            return func(*args, **kwargs)
        known, result = self._calls[self._position]
        self._position += 1
        if func != known:  # two of a property are equal, not the same
            raise InconsistentPassesError(
                f"The first pass over this batch called {getattr(known, '__name__', known)} where a later one called "
                f"{getattr(func, '__name__', func)}. {SAME_EVERY_TIME}"
            )
        return result

    def _record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._checkpointed = self._checkpointed or in_checkpointed_region()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        result = func(*args, **kwargs)
        self._written += [
            (len(self._calls), storage_of(t)) for t, v in zip(tensors, versions, strict=True) if t._version != v
        ]
        self._calls.append((func, result))
        return result


class _Marking:
    """The first draw, which tells the tape where sites are."""

    def __init__(self, draw: Drop, tape: _Tape) -> None:
        self._draw = draw
        self._tape = tape

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        self._tape.mark()
        return self._draw(site, h)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        return self._draw.again(index, h)


class _LastOnly:
    """Another draw at the last site, the first one before it.

    Args:
        first: The first draw, after its pass.
        draw: The other.
        last: Number of the last site.
        start: Number of the site that is met first.
    """

    def __init__(self, first: Drop, draw: Drop, last: int, start: int) -> None:
        self._first = first
        self._draw = draw
        self._last = last
        self._start = start
        self._met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`.

        Returns:
            What takes the place of the dropout's result.

        Raises:
            InconsistentPassesError: If the pass reaches more sites than the first.
        """
        index, self._met = self._met, self._met + 1
        known = self._first.sites[index + self._start : index + self._start + 1]
        if [(s.p, s.shape, s.kind) for s in known] != [(site.p, site.shape, site.kind)]:
            raise InconsistentPassesError(
                f"Dropout site number {index + self._start} was {known or 'none'} in the first pass over this batch "
                f"and {site} in a later one. {SAME_EVERY_TIME}"
            )
        return self.again(index, h)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.RepeatableRule`."""
        number = index + self._start
        return (self._draw if number == self._last else self._first).again(number, h)
