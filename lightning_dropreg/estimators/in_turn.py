"""The antithetic pair with one graph alive at a time: half the activations in memory for one forward pass more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.estimators.antithetic import combine, second_difference
from lightning_dropreg.estimators.base import Estimate
from lightning_dropreg.estimators.curvature import FULL, element_weights
from lightning_dropreg.interception.sites import Rule
from lightning_dropreg.passes import Closure, Directions, Off, Pass, Perturb, run_pass
from lightning_dropreg.passes.gradients import GradientSum, Scaler, backpropagate, collect_gradients, leaves_of

__all__ = ["antithetic_in_turn"]


def antithetic_in_turn(
    closure: Closure,
    again: Closure,
    weigh: Callable[[Estimate], Sequence[Tensor]],
    *,
    curvature: str | None,
    noise: bool,
    step_size: float,
    mask: str,
    key: int,
    scaler: Scaler | None = None,
    drop_stale_gradients: Callable[[], None] | None = None,
) -> tuple[Estimate, list[Tensor]]:
    """Estimate as `antithetic` does, and differentiate at once.

    The pass in one direction gives its values and is let go; the opposite pass and everything computed from both is
    differentiated, which frees it; the first pass is made once more and gets the cotangents of its values. What is
    linear in the losses of the passes (``curvature="full"``, or noise alone) needs no such repetition: there every pass
    is differentiated as soon as it is made.

    The arguments are those of `lightning_dropreg.estimators.base.Estimator`; besides, `again` does the same as
    `closure`, for the repetition, `weigh` makes the scalars to be differentiated from the estimate, `scaler` multiplies
    by the scale of a gradient scaler, and `drop_stale_gradients` lets go of what the parameters' ``.grad`` holds from
    before: called once, before anything is differentiated, unless the closure looks at it.

    Returns:
        The estimate, without graphs, and the scalars of `weigh`, with their gradients.
    """
    directions = Directions(key, mask)
    if curvature is None or curvature == FULL:
        return _linear(closure, weigh, directions, curvature, noise, step_size, scaler, drop_stale_gradients)
    plus, ends = _cut(run_pass(closure, Perturb(directions, step_size), record_losses=True))
    directions.rewind()
    minus = run_pass(closure, Perturb(directions, -step_size), record_losses=True)
    directions.rewind()
    if drop_stale_gradients is not None and not minus.reads_gradients:
        drop_stale_gradients()
    # those of the plus pass are the same: they are constants, or functions of parameters alone
    weights = element_weights(minus.loss, minus.losses)
    estimate = combine(plus, minus, weights, curvature, noise, step_size)
    scalars = list(weigh(estimate))
    estimate = Estimate(
        loss=estimate.loss.detach(),
        penalty=None if estimate.penalty is None else estimate.penalty.detach(),
        noise=None if estimate.noise is None else estimate.noise.detach(),
    )
    values = [scalar.detach() for scalar in scalars]
    del plus, minus, weights  # and their outputs: the graph has kept what it needs of them
    sums = [GradientSum() for _ in scalars]
    scale = None if scaler is None else scaler(values[0].new_ones(()))
    leaves = [leaf for leaf in _leaves(scalars) if leaf is not ends.anchor]
    cotangents = []
    for position, (value, collected) in enumerate(zip(values, sums, strict=True)):
        scalar = scalars[position] if scaler is None else scaler(scalars[position])
        collect_gradients(scalar, leaves, [(collected, 1.0)], position < len(scalars) - 1, also=[ends.anchor])
        collected.add_value(value, scale=scale)
        cotangents.append(ends.take())
    del scalars, scalar

    repeated = run_pass(again, Perturb(directions, step_size), record_losses=True)
    directions.rewind()
    replays = [_replay(repeated, cotangent) for cotangent in cotangents]
    del repeated, cotangents
    leaves = _leaves(replays)
    for position, collected in enumerate(sums):
        collect_gradients(replays[position], leaves, [(collected, 1.0)], position < len(sums) - 1)
    return estimate, [collected.scalar() for collected in sums]


def _linear(
    closure: Closure,
    weigh: Callable[[Estimate], Sequence[Tensor]],
    directions: Directions,
    curvature: str | None,
    noise: bool,
    step_size: float,
    scaler: Scaler | None,
    drop_stale_gradients: Callable[[], None] | None,
) -> tuple[Estimate, list[Tensor]]:
    def estimate_of(plus: Tensor, minus: Tensor, clean: Tensor | None = None) -> Estimate:
        return Estimate(
            loss=(plus + minus) / 2 if clean is None else clean,
            penalty=None if clean is None else second_difference(plus, minus, clean, step_size),
            noise=(plus - minus) / (2 * step_size) if noise else None,
        )

    rules: list[Rule] = [
        Perturb(directions, step_size),
        Perturb(directions, -step_size),
        *[Off()] * (curvature is not None),
    ]
    ends = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in rules]
    scalars = list(weigh(estimate_of(*ends)))
    parts = [torch.autograd.grad(scalar, ends, retain_graph=True, allow_unused=True) for scalar in scalars]
    sums, losses = [GradientSum() for _ in scalars], []
    for number, rule in enumerate(rules):
        done = run_pass(closure, rule)
        if number < 2:
            directions.rewind()
        if number == 0 and drop_stale_gradients is not None and not done.reads_gradients:
            drop_stale_gradients()
        factors = [0.0 if part[number] is None else float(part[number]) for part in parts]
        loss = done.loss.reshape(())
        del done
        backpropagate(loss, _leaves([loss]), [(s, f) for s, f in zip(sums, factors, strict=True) if f], scaler)
        losses.append(loss.detach())
    estimate = estimate_of(*losses)
    return estimate, [collected.scalar() for collected in sums]


class _Ends:
    """The values of a pass without its graph; the next backward leaves their cotangents here.

    Nothing but the estimate holds on to the values: outputs over a large vocabulary are a model's largest tensors.

    Attributes:
        anchor: What must be differentiated in, so that the cotangents are found.
    """

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor
        self._found: list[Tensor | None] = []

    def cut(self, value: Tensor) -> Tensor:
        """Return a value without its graph."""
        self._found.append(None)
        cut: Tensor = _Cut.apply(self.anchor, value.detach(), self._found, len(self._found) - 1)  # type: ignore[no-untyped-call]
        return cut

    def take(self) -> list[Tensor | None]:
        """Return the cotangent of every value in order, None for what had no part in the backward."""
        found = self._found.copy()
        self._found[:] = [None] * len(found)
        return found


class _Cut(torch.autograd.Function):
    """The identity, which keeps the cotangent."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, found: list[Tensor | None], position: int) -> Tensor:
        ctx.found, ctx.position = found, position
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.found[ctx.position] = grad
        return None, None, None, None


class _Replay(torch.autograd.Function):
    """A scalar whose backward, possible once, gives each of several values its cotangent."""

    @staticmethod
    def forward(ctx: Any, cotangents: list[Tensor], *values: Tensor) -> Tensor:
        ctx.cotangents = cotangents
        return values[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cotangents, ctx.cotangents = ctx.cotangents, None
        return (None, *cotangents)


def _replay(done: Pass, cotangents: Sequence[Tensor | None]) -> Tensor:
    pairs = [(value, c) for value, c in zip(_values(done), cotangents, strict=True) if c is not None]
    replay: Tensor = _Replay.apply([c for _, c in pairs], *(value for value, _ in pairs))  # type: ignore[no-untyped-call]
    return replay


def _cut(done: Pass) -> tuple[Pass, _Ends]:
    """The values of a pass without its graph."""
    ends = _Ends(done.loss.new_zeros(()).requires_grad_())
    loss = ends.cut(done.loss)
    losses = [copy(recorded) for recorded in done.losses]
    for recorded in losses:
        same = recorded.logits is recorded.outputs
        recorded.outputs, recorded.end = ends.cut(recorded.outputs), None  # which would hold the graph
        if same:
            recorded.logits = recorded.outputs
    for recorded in losses:
        recorded.elements = ends.cut(recorded.elements)
    for recorded in losses:
        if recorded.logits is not None and recorded.logits is not recorded.outputs:
            recorded.logits = ends.cut(recorded.logits)
    return Pass(loss, losses, done.sites), ends


def _values(done: Pass) -> list[Tensor]:
    """Everything that an estimate is computed from, in the order of `_cut`."""
    behind = [loss.logits for loss in done.losses if loss.logits is not None and loss.logits is not loss.outputs]
    return [done.loss, *(loss.outputs for loss in done.losses), *(loss.elements for loss in done.losses), *behind]


def _leaves(values: Sequence[Tensor]) -> list[Tensor]:
    leaves = leaves_of(*values)
    if leaves is None:
        raise UnsupportedOperationError(
            "low_memory=True differentiates the passes one after the other, which a hook on a parameter "
            "(Tensor.register_hook) or a reentrant checkpoint does not allow. Remove the hook, use "
            "torch.utils.checkpoint with use_reentrant=False, or low_memory=False."
        )
    return leaves
