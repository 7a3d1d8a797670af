"""The metrics as pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_count, check_flags, check_instance, check_integer
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedOperationError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Closure, Off, run_pass
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.step.settings import check_curvature, check_estimation
from lightning_dropreg.uncertainty.mode import dropout_mode

__all__ = [
    "BoundTerms",
    "Effects",
    "dropout_effects",
    "linear_model_bound",
    "loss_hessian_size",
    "loss_jacobian_size",
    "norm_2_1",
]


class Effects(NamedTuple):
    """The two effects of dropout on one batch.

    Attributes:
        explicit_penalty: ``R_approx`` (4.4), mean over the draws, in units of the loss.
        noise: ``E ||xi_approx||^2``, the trace of the covariance of the gradient noise (4.6), in units of the squared
            gradient.
        gradient: ``||grad l||^2`` of the loss without dropout, in the same units.
    """

    explicit_penalty: Tensor
    noise: Tensor
    gradient: Tensor


@torch.inference_mode(False)
@torch.enable_grad()
def dropout_effects(
    closure: Closure,
    module: nn.Module,
    *,
    draws: int = 1,
    key: int = 0,
    curvature: str = "loss_hessian",
    estimator: str = "antithetic",
    step_size: float = 0.1,
    penalty: bool = True,
    noise: bool = True,
) -> Effects:
    """Measure explicit penalty and gradient noise of one batch, with dropout in training mode and no trace left.

    Args:
        closure: Runs forward and loss of `module`, in whatever mode it is; returns the scalar loss.
        module: The model. Its dropout is turned on, batch norm stays in evaluation mode
            (`lightning_dropreg.uncertainty.mode.dropout_mode`).
        draws: Number of random directions to average over, at least 1.
        key: Seed of the directions.
        curvature: See `lightning_dropreg.functional.explicit_penalty`.
        estimator: See there.
        step_size: See there.
        penalty: Whether the penalty is wanted; 0 if not.
        noise: Whether noise and gradient are wanted; 0 if not.

    Returns:
        The effects, without graph.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.
        NoDropoutSiteError: If there is no dropout.
        LossNotRecognizedError: If the curvature of the loss is unknown.
        UnsupportedOperationError: If the batch was made in `torch.inference_mode`.

    Example:
        Squared error of one weight at ``w h = 6``: ``R = c h^2 w^2``, ``xi = ±sqrt(c) 2 (2 w h) h``.

        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False)).double()
        >>> _ = nn.init.constant_(net[1].weight, 3.0)
        >>> x = torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> found = dropout_effects(lambda: nn.functional.mse_loss(net(x), 0 * x), net)
        >>> round(found.explicit_penalty.item(), 6), round(found.noise.item(), 6), round(found.gradient.item(), 6)
        (36.0, 2304.0, 576.0)
    """
    check_count("draws", draws)
    check_estimation(estimator, step_size, "as_model")
    check_curvature(curvature)
    check_integer("key", key)
    check_instance("module", module, nn.Module, "an nn.Module")
    check_flags(penalty=penalty, noise=noise)
    parameters = [p for p in module.parameters() if p.requires_grad]
    zero = torch.zeros(())
    gradient = zero
    found: list[tuple[Tensor, Tensor]] = []
    with Isolation(module) as isolation, dropout_mode(module), _inference_tensors_explained():

        def run() -> Tensor:
            return isolation.run(closure, trace=False)

        if noise:
            gradient = _squared_norm(run_pass(run, Off()).loss, parameters)
        for draw in range(draws):
            estimate = ESTIMATORS[estimator](
                run,
                curvature=curvature if penalty else None,
                noise=noise,
                step_size=step_size,
                mask="as_model",
                key=fold_key(key, draw),
            )
            found.append(
                (
                    zero if estimate.penalty is None else estimate.penalty.detach(),
                    zero if estimate.noise is None else _squared_norm(estimate.noise, parameters),
                )
            )
    penalties, noises = zip(*found, strict=True)
    return Effects(torch.stack(penalties).mean(), torch.stack(noises).mean(), gradient)


@contextmanager
def _inference_tensors_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "Inference tensors cannot be saved for backward" not in str(error):
            raise
        raise UnsupportedOperationError(
            "The batch was made in inference mode, so nothing can be differentiated in it. Train with "
            "Trainer(inference_mode=False), or clone the batch's tensors inside the closure."
        ) from error


def _squared_norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return torch.stack([value.new_zeros(()), *(g.square().sum() for g in gradients if g is not None)]).sum()


def loss_jacobian_size(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    r"""Compute ``mu(W)`` of Theorem 4.1 on a batch, under cross entropy.

    .. math::
        \mu(W) = E_{P_n} \lVert D \ell_y[Wx] \rVert_2 = E \lVert \mathrm{softmax}(z) - e_y \rVert_2

    with the derivative taken in the logits. That the norm is not squared is our reading of a printed ``2``: only then
    do all terms of the bound have the unit of the loss (``mu^{2/3} B^{1/3}``).

    Args:
        logits: ``(N, c)``.
        target: Classes, ``(N,)``.
        ignore_index: Target of examples that do not count.

    Returns:
        Mean over the examples, in ``[0, sqrt(2)]``; NaN if there are none.

    Raises:
        InvalidArgumentError: If the shapes do not fit.

    Example:
        >>> loss_jacobian_size(torch.zeros(1, 2), torch.tensor([0])).item()  # softmax - e_y = (-1/2, 1/2)
        0.7071067690849304
    """
    return _jacobian_norms(*_counted(logits, target, ignore_index)).mean()


def loss_hessian_size(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    r"""Compute ``nu(W)`` of Theorem 4.1 on a batch, under cross entropy.

    .. math::
        \nu(W) = E_{P_n} \mathrm{tr}(D^2 \ell_y[Wx]) = E \sum_j p_j (1 - p_j), \qquad p = \mathrm{softmax}(z)

    Args:
        logits: ``(N, c)``.
        target: Classes, ``(N,)``; only `ignore_index` matters.
        ignore_index: Target of examples that do not count.

    Returns:
        Mean over the examples, in ``[0, 1 - 1/c]``; NaN if there are none.

    Raises:
        InvalidArgumentError: If the shapes do not fit.

    Example:
        >>> loss_hessian_size(torch.zeros(1, 4), torch.tensor([0])).item()
        0.75
    """
    return _hessian_traces(_counted(logits, target, ignore_index)[0]).mean()


def _jacobian_norms(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.softmax(-1)
    norms: Tensor = torch.linalg.vector_norm(p - nn.functional.one_hot(target, p.shape[-1]), dim=-1)
    return norms


def _hessian_traces(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return (p * (1 - p)).sum(-1)


def _counted(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The examples that count, in float32 at least.

    Returns:
        Logits and targets.

    Raises:
        InvalidArgumentError: If the shapes do not fit.
    """
    check_integer("ignore_index", ignore_index)
    for name, value in (("logits", logits), ("target", target)):
        check_instance(name, value, Tensor, "a tensor")
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.is_floating_point():
        raise InvalidArgumentError(
            f"Expected logits (N, classes) and integer targets (N,); found {tuple(logits.shape)} and "
            f"{tuple(target.shape)} of type {target.dtype}."
        )
    keep = target != ignore_index
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits[keep], target[keep]


class BoundTerms(NamedTuple):
    r"""The terms of the generalization bound of Theorem 4.1, each without the theorem's unnamed constant.

    For cross entropy on ``c`` classes, ``z = W x`` and ``n`` examples: with probability ``1 - delta``, for all ``W``
    with ``||W^T||_{2,1} <= A``, the test loss, truncated at ``B``, is at most 1.01 times the truncated training loss
    plus a constant times

    .. math::
        \frac{(A \mu)^{2/3} (\theta B)^{1/3}}{n^{1/3}} + \frac{A \sqrt{B \nu \theta}}{\sqrt n}
        + \frac{B A^2 \theta}{n \left( \log^2 \left( \frac{B A^2 \theta}{\nu n} \right) + 1 \right)} + \zeta

    This is the paper's formula with ``A = ||W^T||_{2,1}``, the smallest that the theorem allows. We had it from a text
    without the layout of the fractions, in which the first two terms, ``theta``, ``zeta``, ``mu`` (but see
    `loss_jacobian_size`) and ``nu`` can be read in one way only. How the third is put together is our reading. It is
    the one for which the remark after the theorem is true: with weights ``t W`` that separate the classes, ``nu``
    falls as ``exp(-t)``, its logarithm grows as ``t``, and so the term stays ``O(B log^3(n c) / n)`` while ``A`` grows
    (tested); no other power of the logarithm does that. What multiplies ``1 / nu`` inside the logarithm, and the 1,
    the remark does not tell.

    Attributes:
        mu: Size of the loss Jacobian ``mu(W)``.
        nu: Size of the loss Hessian ``nu(W)``.
        norm: ``A = ||W^T||_{2,1}``.
        theta: ``log^3(n c) max_i ||x_i||_2^2``.
        jacobian: The first term.
        hessian: The second term.
        norms: The third term.
        zeta: ``B (log(1/delta) + log log n) / n``, of low order.
    """

    mu: Tensor
    nu: Tensor
    norm: Tensor
    theta: Tensor
    jacobian: Tensor
    hessian: Tensor
    norms: Tensor
    zeta: Tensor


def norm_2_1(matrix: Tensor) -> Tensor:
    r"""Compute ``||M||_{2,1} = sum_j sqrt(sum_i M_ij^2)``.

    Args:
        matrix: Any matrix.

    Returns:
        The sum of the norms of its columns.

    Example:
        >>> norm_2_1(torch.tensor([[3.0, 0.0], [4.0, 2.0]])).item()
        7.0
    """
    check_instance("matrix", matrix, Tensor, "a tensor")
    total: Tensor = torch.linalg.vector_norm(matrix, dim=0).sum()
    return total


def linear_model_bound(
    inputs: Tensor, weight: Tensor, target: Tensor, *, loss_bound: float = 10.0, delta: float = 0.05
) -> BoundTerms:
    """Compute the terms of Theorem 4.1 for a linear model ``z = W x`` under cross entropy.

    Args:
        inputs: Training examples ``x``, ``(n, d)`` with ``n >= 3``. For a bias, append a 1 to every example.
        weight: ``W``, ``(c, d)``.
        target: Classes, ``(n,)``.
        loss_bound: ``B > 0``, at which the loss is truncated.
        delta: Probability of failure, in ``(0, 1)``.

    Returns:
        The terms.

    Raises:
        InvalidArgumentError: If an argument is out of range or the shapes do not fit.

    Example:
        >>> x, y = torch.randn(100, 3), torch.randint(2, (100,))
        >>> terms = linear_model_bound(x, torch.zeros(2, 3), y)
        >>> terms.nu.item(), terms.jacobian.item()
        (0.5, 0.0)
    """
    check_bound_arguments(loss_bound, delta)
    check_linear(inputs, weight)
    logits, target = _counted(inputs @ weight.T, target, -100)
    return bound_terms(
        n=torch.tensor(float(len(logits))),
        classes=len(weight),
        mu=_jacobian_norms(logits, target).mean(),
        nu=_hessian_traces(logits).mean(),
        norm=norm_2_1(weight.T),
        largest=inputs.norm(dim=1).max(),
        loss_bound=loss_bound,
        delta=delta,
    )


def bound_terms(
    n: Tensor, classes: int, mu: Tensor, nu: Tensor, norm: Tensor, largest: Tensor, loss_bound: float, delta: float
) -> BoundTerms:
    """Put the terms together; `largest` is the norm of the largest example."""
    theta = (n * classes).log() ** 3 * largest**2
    scale = loss_bound * norm**2 * theta
    # where the Hessian vanishes the logarithm is infinite and the term 0; without weights it is 0 too
    ratio = (scale / (nu * n)).clamp_min(torch.finfo(scale.dtype).tiny)
    return BoundTerms(
        mu=mu,
        nu=nu,
        norm=norm,
        theta=theta,
        jacobian=(norm * mu) ** (2 / 3) * (theta * loss_bound / n) ** (1 / 3),
        hessian=norm * (loss_bound * nu * theta / n).sqrt(),
        norms=scale / (n * (ratio.log() ** 2 + 1)),
        zeta=loss_bound * (math.log(1 / delta) + n.log().log()) / n,
    )


def check_bound_arguments(loss_bound: float, delta: float) -> None:
    """Refuse what is out of range."""
    if not isinstance(loss_bound, (int, float)) or not 0 < loss_bound < float("inf"):
        raise InvalidArgumentError(f"loss_bound={loss_bound!r} must be a finite number above 0.")
    if not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise InvalidArgumentError(f"delta={delta!r} must be in (0, 1).")


def check_linear(inputs: Tensor, weight: Tensor) -> None:
    """Refuse shapes that are no linear model's."""
    for name, value in (("inputs", inputs), ("weight", weight)):
        check_instance(name, value, Tensor, "a tensor")
    if inputs.ndim != 2 or weight.ndim != 2 or inputs.shape[1] != weight.shape[1]:
        raise InvalidArgumentError(
            f"Expected inputs (n, d) and a weight (c, d); found {tuple(inputs.shape)} and {tuple(weight.shape)}."
        )
