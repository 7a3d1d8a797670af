"""Recurrent networks with dropout between their layers, inside what is one fused operation to torch.

Every layer is run by the same operation, with that layer's weights, so the fast kernels stay; between two layers
there is a site on the ``(time, batch, features)`` output, every entry with a mask of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.interception.sites import Mode
from lightning_dropreg.numerics.torch_private import without_fused_recurrence

__all__ = ["HANDLERS", "by_name"]

_PADDED = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first",
)  # fmt: skip
_PACKED = ("data", "batch_sizes", *_PADDED[1:-1])


def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a fused recurrent operation by their names."""
    # the packed form has the tensor of batch sizes in second place, so its weights come fourth
    packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
    return {**dict(zip(_PACKED if packed else _PADDED, args, strict=False)), **kwargs}


def recurrent(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """Make the handler of `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`."""

    def handle(mode: Mode, func: Callable[..., tuple[Tensor, ...]], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        call = by_name(args, kwargs)
        with without_fused_recurrence() if mode.written_out else nullcontext():
            if not (call["train"] and call["dropout"] > 0 and call["num_layers"] > 1):
                if not call["train"] and call["num_layers"] > 1:
                    mode.at_rest(call["dropout"], kind)
                return func(*args, **kwargs)
            return _layer_by_layer(mode, func, call, kind)

    return handle


def _layer_by_layer(
    mode: Mode, func: Callable[..., tuple[Tensor, ...]], call: dict[str, Any], kind: str
) -> tuple[Tensor, ...]:
    """Do what ``func(**call)`` does, with a site between the layers."""
    name = "input" if "input" in call else "data"
    layers, p = call["num_layers"], call["dropout"]
    directions = 2 if call["bidirectional"] else 1
    weights: Sequence[Tensor] = call["params"]
    each = len(weights) // layers  # 2 without biases, 4 with, 1 more with a projection; for each direction
    output: Tensor = call[name]
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        if layer:
            output = mode.site(output, p, tuple(output.shape), kind, inplace=False)
        rows = slice(layer * directions, (layer + 1) * directions)
        hx = call["hx"]
        state = hx[rows] if isinstance(hx, Tensor) else tuple(part[rows] for part in hx)
        single = {
            **call, name: output, "hx": state, "params": list(weights[layer * each : (layer + 1) * each]),
            "num_layers": 1, "dropout": 0.0,
        }  # fmt: skip
        output, *final = func(*single.values())
        finals.append(tuple(final))
    return (output, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: recurrent("lstm_dropout"),
    torch.gru: recurrent("gru_dropout"),
    torch.rnn_tanh: recurrent("rnn_dropout"),
    torch.rnn_relu: recurrent("rnn_dropout"),
}
