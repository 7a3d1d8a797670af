"""The logits behind log-probabilities: what `log_softmax` was given, moved about as its result was.

`nll_loss` and `kl_div` are given log-probabilities. Their Hessian is the same in these and in the logits, because a
constant added to all logits changes neither; the mean square of the outputs' change (``identity``) is not the same. So
the calls of `log_softmax` are noted, and whatever a step does to the result on its way to the loss (reshaping, slicing,
stacking) is done to the logits when the loss asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FOLLOWED", "LogitsTrail"]

_LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, torch.special.log_softmax, Tensor.log_softmax, torch._log_softmax}
_NAMES = (
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose permute movedim moveaxis swapaxes "
    "swapdims t mT contiguous clone expand expand_as select narrow index_select split chunk unbind tensor_split "
    "broadcast_to roll flip float double half bfloat16 to type type_as cat stack concat concatenate vstack hstack"
)
_MOVES: set[Callable[..., Any]] = {Tensor.__getitem__}
for _name in _NAMES.split():
    for _owner in (torch, Tensor):
        _found = getattr(_owner, _name, None)
        # a property such as mT offers its getter
        _found = getattr(_found, "__get__", _found) if _name == "mT" else _found
        if _found is not None:
            _MOVES.add(_found)

FOLLOWED = frozenset(_LOG_SOFTMAX | _MOVES)
"""What `LogitsTrail.follow` takes note of."""

_Trail = Callable[[], Any]


class LogitsTrail:
    """Follows the results of `log_softmax` through one pass.

    Example:
        >>> trail, z = LogitsTrail(), torch.randn(2, 3, 4)
        >>> log_p = z.log_softmax(-1)
        >>> trail.follow(Tensor.log_softmax, log_p, (z, -1), {})
        >>> flat = log_p.flatten(0, 1)
        >>> trail.follow(Tensor.flatten, flat, (log_p, 0, 1), {})
        >>> bool((trail.behind(flat) == z.flatten(0, 1)).all())
        True
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, _Trail]] = {}

    def follow(
        self, func: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> None:
        """Note one call of the pass.

        Args:
            func: What was called.
            result: What it returned.
            args: Its arguments.
            kwargs: Its keyword arguments.
        """
        kwargs = kwargs or {}
        if func in _LOG_SOFTMAX:
            logits = args[0] if args else kwargs.get("input")
            if isinstance(logits, Tensor):
                earlier = self._found.get(id(logits))  # the softmax of log-probabilities is what it was
                self._found[id(result)] = result, earlier[1] if earlier else lambda: logits
        elif self._found and func in _MOVES and args:
            self._move(func, result, args, kwargs)

    def _move(self, func: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first, rest = args[0], args[1:]
        if isinstance(first, Tensor):
            trail = self._trail(first)
        else:
            trails = [self._trail(part) for part in first] if isinstance(first, Sequence) else []
            known = [each for each in trails if each is not None]
            trail = (lambda: [each() for each in known]) if known and len(known) == len(trails) else None
        if trail is None:
            return
        before: _Trail = trail

        def moved() -> Any:
            return func(before(), *rest, **kwargs)

        if isinstance(result, Tensor):
            self._found[id(result)] = result, moved
        elif isinstance(result, (tuple, list)):
            for number, part in enumerate(result):
                self._found[id(part)] = part, lambda number=number: moved()[number]  # type: ignore[misc]

    def _trail(self, value: Any) -> _Trail | None:
        found = self._found.get(id(value))
        return None if found is None else found[1]

    def behind(self, log_probabilities: Any) -> Tensor | None:
        """Return the logits behind log-probabilities, in their shape; None if they do not come from `log_softmax`."""
        trail = self._trail(log_probabilities)
        logits: Tensor | None = None if trail is None else trail()
        return logits
