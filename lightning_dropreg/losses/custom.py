"""Losses that this package has never seen: their Hessian by automatic differentiation of the loss alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves

from lightning_dropreg.errors import InvalidArgumentError, LossNotRecognizedError, UnsupportedOperationError
from lightning_dropreg.losses.base import Loss
from lightning_dropreg.numerics.torch_private import a_mode_is_on

__all__ = ["DifferentiatedLoss", "HessianLoss", "describe", "is_registered", "recognize"]


class DifferentiatedLoss(Loss):
    """A loss whose Hessian is had by differentiating it, whatever function of its example's outputs it is."""

    def hessian_form(self, z: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        """See `Loss`: a Hessian-vector product.

        Returns:
            A scalar.

        Raises:
            UnsupportedOperationError: If the loss cannot be differentiated twice.
        """
        with torch.enable_grad():
            # a tensor of our own: what else depends on z (u may) is no part of the derivative
            z = z.clone() if z.requires_grad else z.detach().requires_grad_()
            value = (weights * self.per_element(self.function(z))).sum()
            (gradient,) = torch.autograd.grad(value, z, create_graph=True)
            if not gradient.requires_grad:  # linear in its outputs
                return (0 * u).sum()
            try:
                (product,) = torch.autograd.grad((gradient * u).sum(), z, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise UnsupportedOperationError(
                    f"The loss {self.name} cannot be differentiated twice ({str(error).splitlines()[0]}), so it has "
                    "no curvature='loss_hessian'. Use curvature='identity' or 'loss_jacobian'."
                ) from error
        return (0 * u).sum() if product is None else (product * u).sum()

    def hessian_factor(self, z: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """See `Loss`; there is no way to draw with an arbitrary Hessian as covariance.

        Raises:
            UnsupportedOperationError: Always.
        """
        raise UnsupportedOperationError(
            f"The Hessian of the loss {self.name} has no known square root, which estimator='double_backward' needs. "
            "Use estimator='antithetic' or 'forward'."
        )


class HessianLoss(DifferentiatedLoss):
    """One element per example, any function of its outputs that can be differentiated twice."""

    def per_element(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values.reshape(-1)

    def example_weights(self, weights: Tensor) -> Tensor:
        """See `Loss`."""
        return weights

    def example_sum(self, values: Tensor) -> Tensor:
        """See `Loss`."""
        return values

    def check(self) -> None:
        """See `Loss`: an element must depend on the outputs of its own example only.

        Raises:
            LossNotRecognizedError: If it depends on others.
        """
        z = self.outputs.detach().requires_grad_()
        with torch.enable_grad():
            values = self.per_element(self.function(z))
            (gradient,) = torch.autograd.grad(values[:1].sum(), z, allow_unused=True)
        if gradient is not None and bool((gradient[1:] != 0).any()):
            raise LossNotRecognizedError(
                f"An element of the loss {self.name} depends on the outputs of other examples than its own, so its "
                "curvature has no form that this package knows. Return one value per example that depends on that "
                "example only."
            )


def recognize(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a loss of your own known, so that the explicit penalty has its curvature.

    Args:
        loss: Called as ``loss(output, *args, **kwargs)``; a function or a module. It returns one element per example
            (or token), unreduced: its shape is that of `output` without the last dimension (or the last dimensions)
            of one example's outputs. An element depends on the outputs of its own example only, and is
            differentiable twice. Reduce, mask and weight what comes back as you like.

    Returns:
        A function that does what `loss` does. Use it in its place in the training step.

    Raises:
        InvalidArgumentError: If `loss` cannot be called.

    Example:
        >>> import torch
        >>> from torch.nn.functional import dropout
        >>> from lightning_dropreg.functional import explicit_penalty
        >>> log_cosh = recognize(lambda output, target: (output - target).cosh().log().sum(-1))
        >>> w = torch.tensor([[2.0]], requires_grad=True)
        >>> closure = lambda: log_cosh(dropout(torch.ones(1, 1), 0.5) @ w, torch.full((1, 1), 2.0)).mean()
        >>> round(explicit_penalty(closure, estimator="exact").item(), 3)  # c x^2 w^2 l'' / 2, l'' = 1 at the target
        2.0
    """
    if not callable(loss):
        raise InvalidArgumentError(f"recognize() takes a function of the output, not {type(loss).__name__}.")

    def known(output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if has_torch_function((output,)) or a_mode_is_on():
            result: Tensor = handle_torch_function(known, (output,), output, *args, **kwargs)
            return result
        return loss(output, *args, **kwargs)

    functools.update_wrapper(known, loss)
    known._dropreg_loss = loss  # type: ignore[attr-defined]
    return known


def is_registered(func: Callable[..., Any]) -> bool:
    """Say whether `func` came from `recognize`."""
    return hasattr(func, "_dropreg_loss")


def describe(func: Callable[..., Any], output: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Loss]:
    """Compute and describe a loss made known by `recognize`.

    Returns:
        Its elements, and the description.

    Raises:
        InvalidArgumentError: If it does not return one element per example.
        LossNotRecognizedError: If another argument depends on what is trained.
    """
    loss: Callable[..., Tensor] = func._dropreg_loss  # type: ignore[attr-defined]
    name = getattr(loss, "__name__", type(loss).__name__)
    for other in tree_leaves((args, kwargs)):
        if isinstance(other, Tensor) and other.requires_grad and not other.is_leaf:
            raise LossNotRecognizedError(
                f"The loss {name} was given another tensor that depends on what is trained, besides the output. Detach "
                "it, or concatenate the two to one output."
            )
    elements = loss(output, *args, **kwargs)
    shape = elements.shape
    if output.shape[: len(shape)] != shape or (not shape and output.ndim != 1):
        raise InvalidArgumentError(
            f"The loss {name}, made known by recognize(), returned shape {tuple(shape)} for an output of shape "
            f"{tuple(output.shape)}. It must return one element per example, unreduced: the output's shape without the "
            "dimensions of one example's outputs."
        )
    outputs = output.reshape(shape.numel(), -1)

    def function(z: Tensor) -> Tensor:
        return loss(z.reshape(output.shape), *args, **kwargs)

    # the elements must come from the flattened outputs, in which they are differentiated
    elements = function(outputs)
    return elements.clone(), HessianLoss(name, outputs, elements, function)
