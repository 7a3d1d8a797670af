"""DropConnect: dropout of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_dropreg.checks import check_drop_prob, check_instance
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.interception.handlers.custom import drop

__all__ = ["DropConnect", "WeightDrop"]


class DropConnect(nn.Module):
    """The parametrization: while `live`, the weight with entries dropped; otherwise the weight itself.

    Args:
        p: Drop probability, in ``[0, 1)``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.live = False

    def forward(self, weight: Tensor) -> Tensor:
        """Drop from `weight`."""
        return drop(weight, self.p, None, self.training, kind="drop_connect") if self.live else weight

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}"


class WeightDrop(nn.Module):
    """Runs a module with entries of its weights dropped: DropConnect (Wan et al., 2013), one mask for each call.

    All examples of the batch and all time steps of an RNN share the mask (Merity et al., 2018). RNNs keep their fused
    kernels. A weight that is read from outside is whole: nothing is drawn but in `forward`, and only in training.

    The weights become parametrizations (`torch.nn.utils.parametrize`), named ``parametrizations.NAME.original``
    in the state dict. Such modules can be copied, and saved by their state dict, but torch refuses to pickle them
    (``strategy="ddp_spawn"``; use ``"ddp"``).

    Args:
        module: Any module, for example an `nn.LSTM`.
        weight_names: Names of its weights to drop from, for example ``"weight_hh_l0"``.
        p: Drop probability, in ``[0, 1)``.

    Raises:
        InvalidArgumentError: If `p` is outside its range, or the module has no such weight of its own.

    Example:
        >>> lstm = WeightDrop(nn.LSTM(3, 5), "weight_hh_l0", p=0.5)
        >>> output, state = lstm(torch.ones(7, 2, 3))
        >>> [name for name, _ in lstm.named_parameters()][-1]
        'module.parametrizations.weight_hh_l0.original'
    """

    def __init__(self, module: nn.Module, weight_names: str | Sequence[str], p: float = 0.5) -> None:
        super().__init__()
        check_drop_prob(p, "WeightDrop")
        check_instance("module", module, nn.Module, "an nn.Module")
        check_instance("weight_names", weight_names, (str, Sequence), "the name of a weight, or a list of names")
        names = [weight_names] if isinstance(weight_names, str) else list(weight_names)
        own = [name for name, _ in module.named_parameters(recurse=False)]
        missing = [name for name in names if name not in own]
        if missing or not names or len(set(names)) < len(names):
            raise InvalidArgumentError(
                f"WeightDrop: weight_names={names} must be different parameters of {type(module).__name__} itself; "
                f"it has {', '.join(own) or 'none'}."
            )
        self.weight_names = tuple(names)
        self.module = module
        for name in names:
            parametrize.register_parametrization(module, name, DropConnect(p))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on the given arguments with new masks.

        Args:
            *args: The module's arguments.
            **kwargs: The module's keyword arguments.

        Returns:
            What the module returns.
        """
        if not self.training:
            return self.module(*args, **kwargs)
        dropped = self._fixed_rnn_weights() if isinstance(self.module, nn.RNNBase) else self._fixed_weights()
        with dropped:
            return self.module(*args, **kwargs)

    @contextmanager
    def _live(self) -> Iterator[None]:
        """Let whoever reads the weights draw masks."""
        parametrizations: Any = self.module.parametrizations
        drops: list[DropConnect] = [parametrizations[name][0] for name in self.weight_names]
        try:
            for one in drops:
                one.live = True
            yield
        finally:
            for one in drops:
                one.live = False

    @contextmanager
    def _fixed_weights(self) -> Iterator[None]:
        """Let the module read weights with masks, the same ones however often it reads them.

        torch's cache does that; but it must be one of our own, or under somebody's `parametrize.cached()` the next
        call, the next pass of an antithetic pair, would be given the weights of this one.
        """
        others, parametrize._cache = parametrize._cache, {}
        try:
            with self._live(), parametrize.cached():
                yield
        finally:
            parametrize._cache = others

    @contextmanager
    def _fixed_rnn_weights(self) -> Iterator[None]:
        """Hand an RNN weights with masks in the list from which it feeds its kernel.

        An RNN would read every weight several times, take it for changed, and rearrange its parameters in memory
        (`flatten_parameters`) on every call; the list spares it all that.
        """
        rnn: Any = self.module
        rnn._update_flat_weights()  # a copy of the module has other parameters than the list
        whole = rnn._flat_weights
        with self._live():
            masked = {name: rnn.parametrizations[name]() for name in self.weight_names}
        weights = [masked.get(name, weight) for name, weight in zip(rnn._flat_weights_names, whole, strict=True)]
        rnn._flat_weights = _one_piece(weights) if weights[0].is_cuda else weights
        try:
            yield
        finally:
            rnn._flat_weights = whole


def _one_piece(weights: list[Tensor]) -> list[Tensor]:
    """Lay an RNN's weights out as cuDNN wants them: in one piece of memory, all matrices before all biases.

    cuDNN would copy them itself, and warn on every call.

    Returns:
        The weights, as views of a new tensor.
    """
    order = sorted(range(len(weights)), key=lambda i: weights[i].ndim == 1)
    piece = torch.cat([weights[i].reshape(-1) for i in order])
    parts = piece.split([weights[i].numel() for i in order])
    laid_out = {i: part.view(weights[i].shape) for i, part in zip(order, parts, strict=True)}
    return [laid_out[i] for i in range(len(weights))]
