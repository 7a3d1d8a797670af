r"""Networks with kinks, in which the noise of a finite step is not that of the derivative.

`antithetic` differentiates ``(L+ - L-) / 2 eps``. A unit whose kink lies between the two passes has another slope in
each, and that jump is divided by ``2 eps``: a share of the units in proportion to the step gives something in
proportion to its inverse, so the variance has a term :math:`O(1/\varepsilon)` that the definition (4.6), which takes
the slope on one side, has not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.errors import DropregError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.passes import Closure

__all__ = ["EXCESS", "OF_CURVATURE", "REMEDY", "WIDE_STEP", "find_kinks", "noise_excess", "told"]

EXCESS = 1.1
"""From here on the noise is called larger than ``xi_approx``."""
_DRAWS = 4
WIDE_STEP = 0.5
"""From here on a step is taken to have been chosen with kinks in mind."""
REMEDY = (
    "Use estimator='forward' or 'double_backward', which follow the definition (for ExplicitPenalty too, so that they "
    "share passes), or a larger step_size (0.5 or 1)."
)
"""What to do about it, for messages."""
OF_CURVATURE = (
    "There the gradient of curvature='full' by finite steps is not that of the second derivative: every kink between "
    "the two ends counts with one over the step (77 times too large a gradient in a ReLU network with step_size=0.1, 3 "
    "times with 1). Use estimator='forward' or 'double_backward' (or 'auto', which finds that out)."
)
"""What kinks do to second differences."""

# Those that jump where activations lie. Left out are clamps, most of which keep a denominator from 0.
_ALWAYS = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "PreluKernel": "prelu",
    "RreluWithNoise": "rrelu",
    "Hardtanh": "hardtanh",
    "Threshold": "threshold",
    "Hardshrink": "hardshrink",
    "Softshrink": "softshrink",
    "Abs": "abs",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Max": "max",
    "Min": "min",
    "Amax": "amax",
    "Amin": "amin",
    "Topk": "topk",
    "Sort": "sort",
    "Median": "median",
    "Kthvalue": "kthvalue",
    "MaxPool2DWithIndices": "max_pool",
    "MaxPool3DWithIndices": "max_pool",
    "CudnnMaxPool": "max_pool",
    "AdaptiveMaxPool2D": "max_pool",
    "AdaptiveMaxPool3D": "max_pool",
    "FractionalMaxPool2D": "max_pool",
    "FractionalMaxPool3D": "max_pool",
}
_SOMETIMES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Elu": ("elu", lambda node: node._saved_alpha != 1),  # selu
    "ScatterReduce": ("scatter_reduce", lambda node: node._saved_reduce in {"amax", "amin"}),
}


def told(kinks: Mapping[str, int]) -> str:
    """Name what was found, with how often."""
    return ", ".join(f"{name} ({count})" for name, count in kinks.items())


def find_kinks(loss: Tensor, taps: Collection[Tensor]) -> dict[str, int]:
    """Find the operations with a kink that act on what depends on dropout sites.

    The graph of a pass tells them all, whoever called them, but what is inside custom autograd functions, recurrent
    cuDNN kernels, and checkpoints with ``use_reentrant=True``; `noise_excess` measures those too.

    Args:
        loss: The loss of a pass.
        taps: Leaves of its graph, one at each site.

    Returns:
        How often each operation was found, by name.

    Example:
        >>> tap = torch.ones(3, requires_grad=True)
        >>> find_kinks((tap - 1).relu().sum() + torch.ones(3, requires_grad=True).abs().sum(), [tap])
        {'relu': 1}
    """
    users: dict[Any, list[Any]] = {loss.grad_fn: []}
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        for source, _ in node.next_functions:
            if source is None:
                continue
            if source not in users:
                users[source] = []
                stack.append(source)
            users[source].append(node)
    wanted = {id(tap) for tap in taps}
    stack = [node for node in users if id(getattr(node, "variable", None)) in wanted]
    affected = set(stack)
    while stack:
        for user in users[stack.pop()]:
            if user not in affected:
                affected.add(user)
                stack.append(user)
    found = [name for node in users if node in affected and (name := _kink(node))]
    return dict(Counter(found).most_common())


def _kink(node: Any) -> str | None:
    operation = node.name().partition("Backward")[0]
    if operation in _SOMETIMES:
        name, has_kink = _SOMETIMES[operation]
        return name if has_kink(node) else None
    return _ALWAYS.get(operation)


def noise_excess(
    closure: Closure,
    parameters: Sequence[nn.Parameter],
    *,
    step_size: float,
    mask: str = "as_model",
) -> float | None:
    """Measure how many times too large the noise of `antithetic` is on one batch.

    The same directions are followed by a finite step and by derivatives.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        parameters: Those in which the noise is compared.
        step_size: Step of the antithetic pair.
        mask: ``"as_model"`` or ``"elementwise"``.

    Returns:
        Ratio of the norms of the noise, 1 for a smooth network; None if the model has no noise to compare, or
        operations that neither `forward` nor `double_backward` can differentiate.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> x = torch.randn(50, 3)
        >>> noise_excess(lambda: net(x).square().mean(), list(net.parameters()), step_size=0.1) > 1
        True
    """

    def size(estimator: str) -> float:
        total = 0.0
        for draw in range(_DRAWS):
            noise = ESTIMATORS[estimator](
                closure, curvature=None, noise=True, step_size=step_size, mask=mask, key=draw
            ).noise
            assert noise is not None
            found = torch.autograd.grad(noise, parameters, allow_unused=True)
            total += sum(float(g.to_dense().double().square().sum()) for g in found if g is not None)
        return math.sqrt(total)

    for reference in ("forward", "double_backward"):
        try:
            expected = size(reference)
        except (DropregError, RuntimeError):  # RuntimeError is torch's
            continue
        return size("antithetic") / expected if expected else None
    return None
