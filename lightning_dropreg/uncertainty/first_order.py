"""The variance that dropout gives a prediction, without drawing a mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_dropreg.checks import check_choice, check_count, check_step_size
from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.interception.sites import Rule
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Directions, Perturb, Tangent
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.uncertainty.mode import dropout_mode
from lightning_dropreg.uncertainty.repetition import Forward, RepeatedBatch

__all__ = ["first_order_variance"]

ESTIMATORS = ("forward", "antithetic")


@torch.inference_mode(False)
@torch.no_grad()
def first_order_variance(
    forward: Forward,
    batch: Any,
    *,
    module: nn.Module,
    directions: int = 32,
    key: int = 0,
    chunk: int = 8,
    estimator: str = "forward",
    step_size: float = 0.01,
    training: str | Sequence[str] = "all",
) -> Tensor:
    r"""Estimate the variance of every output under dropout to first order in the noise.

    .. math::
        \mathrm{Var}[z] \approx \sum_i c_i \, \mathrm{diag}(J_i \, \mathrm{diag}(h_i^2) \, J_i^\top)

    as the mean of ``u^2`` over random directions, where ``u`` is the directional derivative of the outputs with respect
    to all the dropout sites at once: the same ``u`` from which the penalty is made. It is what Monte Carlo dropout
    converges to for small drop probabilities, or where the outputs are linear in what is dropped, as with dropout
    before the last layer alone.

    Args:
        forward: Maps a batch to the output, ``(N, ...)``; usually `module` itself.
        batch: The batch.
        module: The model; its mode, its state and the random state are left as they were.
        directions: Number of random directions, at least 1; the relative standard deviation of the estimate is at most
            ``sqrt(2 / directions)``.
        key: Seed of the directions.
        chunk: Up to how many directions are taken in one pass, see `draw_predictions`.
        estimator: ``"forward"`` (dual numbers), or ``"antithetic"`` (two passes, for operations without a forward-mode
            derivative).
        step_size: Step of the antithetic pair, from 1e-8 to 1.
        training: Which modules are in training mode, see `lightning_dropreg.uncertainty.mode.dropout_mode`.

    Returns:
        The variances, shape of the output.

    Raises:
        InvalidArgumentError: If an argument is out of range, or the output is no floating-point tensor.
        NoDropoutSiteError: If there is no dropout.
        UnsupportedModuleError: If a pattern of `training` matches nothing.
        UnsupportedOperationError: If an operation has no forward-mode derivative.

    Example:
        One weight on one input: ``c h^2 w^2`` is ``1 * 2^2 * 3^2``, in every direction.

        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False)).eval()
        >>> _ = nn.init.constant_(net[1].weight, 3.0)
        >>> first_order_variance(net, torch.tensor([[2.0]]), module=net).tolist()
        [[36.0]]
    """
    check_count("directions", directions)
    check_count("chunk", chunk)
    check_choice("estimator", estimator, ESTIMATORS)
    check_step_size(step_size)
    with Isolation(module) as isolation, dropout_mode(module, training):
        slopes = _by_pair if estimator == "antithetic" else _by_duals
        squares = [
            u.square().sum(0)
            for u in slopes(
                lambda b: isolation.run(lambda: forward(b), trace=False), batch, directions, key, chunk, step_size
            )
        ]
    return torch.stack(squares).sum(0) / directions


def _by_pair(run: Forward, batch: Any, count: int, key: int, chunk: int, step: float) -> Iterator[Tensor]:
    """Directional derivatives of the outputs by central differences, ``(copies, N, ...)`` at a time."""

    def rules(first: int) -> list[Rule]:
        return [Perturb(Directions(fold_key(key, first)), sign * step) for sign in (1, -1)]

    for plus, minus in RepeatedBatch(run, batch, chunk).run(rules, count):
        yield (plus - minus) / (2 * step)


def _by_duals(run: Forward, batch: Any, count: int, key: int, chunk: int, _: float) -> Iterator[Tensor]:
    """Directional derivatives of the outputs by dual numbers, ``(copies, N, ...)`` at a time."""
    with forward_ad.dual_level():
        try:
            repeated = RepeatedBatch(run, batch, chunk, dual=True)
            for (output,) in repeated.run(lambda first: [Tangent(Directions(fold_key(key, first)))], count):
                primal, tangent = forward_ad.unpack_dual(output)
                yield torch.zeros_like(primal) if tangent is None else tangent
        except NotImplementedError as error:
            raise UnsupportedOperationError(
                f"The model has an operation without a forward-mode derivative ({str(error).splitlines()[0]}). "
                "Use estimator='antithetic'."
            ) from error
