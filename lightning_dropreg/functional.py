"""The package without Lightning: each function takes a `closure` that runs forward and loss and returns the loss.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from lightning_dropreg.functional import explicit_penalty, implicit_noise
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2))
    >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
    >>> closure = lambda: nn.functional.cross_entropy(net(x), y)
    >>> loss = plain_loss(closure) + explicit_penalty(closure) + implicit_noise(closure)  # Algorithm 2
    >>> loss.backward()

The closure is called once or several times per call, always with the same global random state; site noise does not
touch that state beyond one number drawn for each call. A `module` given along has its batch-norm statistics, hidden
states and metrics advanced once.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_count, check_instance, is_one_of
from lightning_dropreg.errors import InvalidArgumentError, UnboundedPenaltyWarning
from lightning_dropreg.estimators import ESTIMATORS, Estimate, antithetic
from lightning_dropreg.estimators.curvature import CURVATURES, FULL, OF_OUTPUTS, UNBOUNDED
from lightning_dropreg.inspection.support import find_support
from lightning_dropreg.interception.mode import constants_marked
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Closure, Off, draws_of_dropout, run_pass
from lightning_dropreg.passes.isolation import Isolation

__all__ = ["dropout_loss", "explicit_penalty", "find_sites", "find_support", "implicit_noise", "plain_loss"]

MASKS = ("as_model", "elementwise")


def explicit_penalty(
    closure: Closure,
    *,
    curvature: str = "loss_hessian",
    estimator: str = "antithetic",
    step_size: float = 0.1,
    mask: str = "as_model",
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    r"""Estimate the explicit regularization effect of dropout, ``R_approx`` of (4.4), on one batch.

    .. math::
        R = \tfrac12 \sum_i \frac{q_i}{1-q_i} \langle J_i^\top H_{out} J_i, \mathrm{diag}(h_i^2) \rangle

    averaged over examples or tokens as the loss itself is. This is the second-order value: add it with factor 1.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        curvature: ``"loss_hessian"`` (4.4), or ``"identity"`` or ``"loss_jacobian"`` (5.1), the ablations of
            section 5.2, or ``"full"``: half the second derivative of the loss in the noise, (4.2) with the term that
            (4.3) drops. That needs no recognized loss, for `estimator="antithetic"` a third pass, and is not bounded
            below: see `lightning_dropreg.ExplicitPenalty`.
            The ablations speak of *examples* and *outputs*: an example is a row of what the loss function was
            given (an entry of its first dimension), or a token where the function has one element for each, as
            ``cross_entropy`` has; an output is a logit, or another number compared with the target, and for
            ``nll_loss`` and ``kl_div`` the logit behind ``log_softmax``. ``"identity"`` takes the mean over the outputs
            of an example, ``"loss_jacobian"`` squares the derivative of the example's loss; each example counts as it
            does in the loss. How the loss is spelled makes no difference.
        estimator: ``"antithetic"``, ``"forward"``, ``"double_backward"`` or ``"exact"``.
        step_size: Step of the antithetic pair, relative to the size of the noise; errors fall as its square. In
            bfloat16 a wider one is taken where drop probabilities are small, see
            `lightning_dropreg.estimators.precision.bfloat16_step_size`.
        mask: ``"as_model"`` gives the noise the shape of the model's masks, ``"elementwise"`` draws each entry alone.
        generator: Source of the seed of the noise; the global one by default.
        module: A module whose state must advance once although the closure is called twice.

    Returns:
        Scalar tensor with a graph. It is nonnegative for convex losses with nonnegative weights, unless the curvature
        is ``"full"``.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        LossNotRecognizedError: If the curvature of the loss is unknown.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.
        UnsupportedOperationError: If the model has an operation that the estimator cannot differentiate.

    Example:
        One linear layer under squared error, where ``R = c x^2 w^2``:

        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> x = torch.ones(1, 1)
        >>> closure = lambda: nn.functional.mse_loss(nn.functional.dropout(x, 0.5) * w, torch.zeros(1, 1))
        >>> round(explicit_penalty(closure).item(), 3)
        4.0
    """
    check_curvature(curvature)
    if curvature == FULL:
        warnings.warn(UNBOUNDED, UnboundedPenaltyWarning, stacklevel=2)
    penalty = _estimate(closure, curvature, False, estimator, step_size, mask, generator, module).penalty
    assert penalty is not None
    return penalty


def implicit_noise(
    closure: Closure,
    *,
    estimator: str = "antithetic",
    step_size: float = 0.1,
    mask: str = "as_model",
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    r"""Draw the implicit regularization effect of dropout: a scalar whose gradient is ``xi_approx`` of (4.6).

    .. math::
        s = \sum_i J_{loss,i} (\eta_i \odot h_i), \qquad \eta_i = \pm\sqrt{q_i/(1-q_i)}

    Its parameter gradient has mean zero and, to first order in ``q``, the covariance of the gradient noise of dropout.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss (any loss will do).
        estimator: ``"antithetic"``, ``"forward"``, ``"double_backward"`` or ``"exact"``; in smooth networks the same
            noise from all, the first up to ``step_size**2``. In networks with kinks (ReLU) the first is larger: its two
            passes may lie on different sides of a kink, and the difference of their gradients is divided by the step.
            `lightning_dropreg.inspection.kinks.noise_excess` measures how much.
        step_size: See `explicit_penalty`.
        mask: See `explicit_penalty`.
        generator: See `explicit_penalty`.
        module: See `explicit_penalty`.

    Returns:
        Scalar tensor with a graph, mean zero over draws.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.
        UnsupportedOperationError: If the model has an operation that the estimator cannot differentiate.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> x = torch.ones(1, 1)
        >>> closure = lambda: (nn.functional.dropout(x, 0.5) * w).sum()
        >>> implicit_noise(closure).backward()
        >>> round(w.grad.abs().item(), 3)  # sqrt(q/(1-q)) x
        1.0
    """
    noise = _estimate(closure, None, True, estimator, step_size, mask, generator, module).noise
    assert noise is not None
    return noise


def dropout_loss(
    closure: Closure,
    *,
    k: int = 1,
    antithetic: bool = False,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    r"""Average the loss over `k` draws of dropout: ``DROPOUT_k``, Algorithm 1.

    .. math::
        \frac1k \sum_{j=1}^k \ell(F(x, \eta_j))

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        k: Number of draws, at least 1.
        antithetic: Whether the draws come in pairs with opposite masks, see `lightning_dropreg.MiniBatchDropout`.
        generator: See `explicit_penalty`.
        module: See `explicit_penalty`.

    Returns:
        Scalar tensor with a graph.

    Raises:
        InvalidArgumentError: If ``k < 1``, if `k` is odd with `antithetic`, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> closure = lambda: nn.functional.dropout(x, 0.5).square().mean()
        >>> 1.5 < dropout_loss(closure, k=64).item() < 2.5  # E = 1/(1-q)
        True
    """
    check_draws(k, antithetic)
    _check_module(module)
    rules = draws_of_dropout(draw_key(generator), k, antithetic)
    with Isolation(module) as isolation:
        losses = [isolation.run(lambda rule=rule: run_pass(closure, rule).loss) for rule in rules]  # type: ignore[misc]
    return torch.stack(losses).mean()


def plain_loss(closure: Closure) -> Tensor:
    """Compute the loss without dropout, batch norm and everything else in training mode.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.

    Returns:
        What the closure returns when no dropout drops anything.

    Raises:
        InvalidArgumentError: If the closure returns no scalar loss.

    Example:
        >>> x = torch.ones(4, requires_grad=True)
        >>> plain_loss(lambda: nn.functional.dropout(x, 0.9).sum()).item()
        4.0
    """
    return run_pass(closure, Off(), need_sites=False).loss


def find_sites(closure: Closure, *, module: nn.Module | None = None) -> list[Site]:
    """List the dropout sites that a step reaches, in order.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        module: A module whose state must not advance.

    Returns:
        The sites with names: the module's path below the outermost module that runs, and file and line where a
        functional dropout is called. Empty if nothing is dropped.

    Raises:
        InvalidArgumentError: If the closure returns no scalar loss.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.25))
        >>> [(site.name, site.p, site.shape) for site in find_sites(lambda: net(torch.ones(5, 2)).sum())]
        [('1', 0.25, (5, 3))]
    """
    with Isolation(module) as isolation:
        look = lambda: run_pass(closure, Off(), name_sites=True, need_sites=False)  # noqa: E731
        return isolation.run(look, trace=False).sites


def _estimate(
    closure: Closure,
    curvature: str | None,
    noise: bool,
    estimator: str,
    step_size: float,
    mask: str,
    generator: torch.Generator | None,
    module: nn.Module | None,
) -> Estimate:
    check_estimation(estimator, step_size, mask)
    _check_module(module)
    key = draw_key(generator)  # before the random state is remembered, or the first pass would start from another one
    # a callback looks for unrecognized parts of the loss once, before the first step; here every call does
    with Isolation(module, mean=True) as isolation, constants_marked() if curvature in OF_OUTPUTS else nullcontext():
        estimate = ESTIMATORS[estimator]
        if estimate is antithetic:
            estimate = functools.partial(antithetic, restart=isolation.restart)
        return estimate(
            lambda: isolation.run(closure),
            curvature=curvature,
            noise=noise,
            step_size=step_size,
            mask=mask,
            key=key,
        )


def draw_key(generator: torch.Generator | None) -> int:
    """Draw the seed of one batch's noise from `generator` (the global one if None)."""
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def check_draws(k: object, antithetic: object) -> None:
    """Refuse a number of draws below 1, and pairs of an odd number.

    Raises:
        InvalidArgumentError: If it is one.
    """
    check_count("k", k)
    if not isinstance(antithetic, bool):
        raise InvalidArgumentError(f"antithetic={antithetic!r} must be True or False.")
    if antithetic and k % 2:  # type: ignore[operator]
        raise InvalidArgumentError(f"k={k} with antithetic=True: the draws come in pairs, so k must be even.")


def _check_module(module: object) -> None:
    check_instance("module", module, (nn.Module, type(None)), "an nn.Module or None")


def check_curvature(curvature: str) -> None:
    """Refuse an unknown name.

    Raises:
        InvalidArgumentError: If it is one.
    """
    if not is_one_of(curvature, CURVATURES):
        raise InvalidArgumentError(f"curvature={curvature!r} is unknown; choose one of {', '.join(CURVATURES)}.")


def check_estimation(estimator: str, step_size: float, mask: str) -> None:
    """Refuse unknown names and impossible steps.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.
    """
    if not is_one_of(estimator, ESTIMATORS):
        raise InvalidArgumentError(f"estimator={estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}.")
    if mask not in MASKS:
        raise InvalidArgumentError(f"mask={mask!r} is unknown; choose one of {', '.join(MASKS)}.")
    if not isinstance(step_size, (int, float)) or isinstance(step_size, bool) or not 0 < step_size <= 1:
        raise InvalidArgumentError(
            f"step_size={step_size!r} must be a number in (0, 1]; 0.1 keeps the error of the penalty below about 1 %."
        )
