"""The functions of torch that drop, as a watch calls them: as they are, with a note of what they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_dropreg.auditing.calls import Recorder
from lightning_dropreg.auditing.masks import Mask, read_mask
from lightning_dropreg.interception.handlers.composite import open_up
from lightning_dropreg.interception.handlers.custom import drop
from lightning_dropreg.interception.handlers.dropout import channel_mask
from lightning_dropreg.interception.handlers.recurrent import by_name

__all__ = ["OBSERVED"]

_MOST = 1 << 22  # probabilities of attention of which the mask is read


def _dropping(
    watch: Recorder,
    run: Callable[[Tensor], Tensor],
    h: Tensor,
    p: float,
    drops: bool,
    kind: str,
    mask_shape: tuple[int, ...] | None,
    inplace: bool,
) -> Tensor:
    """Run a function that drops entries of `h`, and note what it did."""
    drops = drops and p > 0
    call = watch.record(kind, p, drops, expected=mask_shape)
    # in a dropout layer, the layer as a whole is looked at
    if not watch.masks or not drops or call.inner or mask_shape is None:
        return run(h)
    before = h.detach().clone() if inplace else h
    if watch.gradients and h.requires_grad and torch.is_grad_enabled() and not inplace:
        before = h = h.view_as(h)
        call.before = get_gradient_edge(h)
    output = run(h)
    if call.before is not None:
        call.after = get_gradient_edge(output)
    call.mask = read_mask(before, output)
    return output


def _elementwise(kind: str, shape: Callable[[Tensor], tuple[int, ...] | None]) -> Callable[..., Tensor]:
    def handle(
        watch: Recorder, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        return _dropping(
            watch, lambda h: func(h, p, training, inplace), input, p, training, kind, shape(input), inplace
        )

    return handle


def _alpha(kind: str) -> Callable[..., Tensor]:
    def handle(
        watch: Recorder, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = False,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        watch.record(kind, p, training and p > 0)
        return func(input, p, training, inplace)

    return handle


def _namespace(kind: str, shape: Callable[[Tensor], tuple[int, ...] | None], inplace: bool) -> Callable[..., Tensor]:
    """A function of ``torch`` itself, whose arguments have other names."""

    def handle(watch: Recorder, func: Callable[..., Tensor], input: Tensor, p: float, train: bool) -> Tensor:
        return _dropping(watch, lambda h: func(h, p, train), input, p, train, kind, shape(input), inplace)

    return handle


def _native(
    watch: Recorder, func: Callable[..., tuple[Tensor, Tensor]], input: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor]:
    watch.record("native_dropout", p, train is not False and p > 0)
    return func(input, p, train)


def _custom(
    watch: Recorder, func: Callable[..., Tensor], h: Tensor, p: float, shape: tuple[int, ...], training: bool, kind: str
) -> Tensor:
    return _dropping(watch, lambda h: func(h, p, shape, training, kind), h, p, training, kind, tuple(shape), False)


def _recurrent(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    def handle(
        watch: Recorder, func: Callable[..., tuple[Tensor, ...]], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        call = by_name(args, kwargs)
        watch.record(kind, call["dropout"], bool(call["train"] and call["dropout"] > 0 and call["num_layers"] > 1))
        result: tuple[Tensor, ...] = func(*args, **kwargs)
        return result

    return handle


def _attention(
    watch: Recorder, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Attention in one operation: the mask is read by letting it act on the identity, in the same random state."""
    p = float(kwargs.get("dropout_p", args[1] if len(args) > 1 else 0.0))
    call = watch.record("attention", p, p > 0)
    if not watch.masks or p == 0:
        return func(query, key, value, *args, **kwargs)
    entries = query[..., 0].numel() * key.shape[-2]
    if entries <= _MOST and query.device.type == "cpu" and not kwargs.get("enable_gqa"):
        call.mask = _attention_mask(func, query, key, args, kwargs)
        call.expected = tuple(call.mask.kept.shape) if call.mask is not None else None
    if watch.gradients and value.requires_grad and torch.is_grad_enabled():
        value = value.view_as(value)
        output = func(query, key, value, *args, **kwargs)
        call.before, call.after = get_gradient_edge(value), get_gradient_edge(output)
        call.tensors = value.detach(), output.detach()
        return output
    return func(query, key, value, *args, **kwargs)


def _attention_mask(
    func: Callable[..., Tensor], query: Tensor, key: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Mask | None:
    one = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device).expand(*key.shape[:-1], key.shape[-2])
    plain = dict(kwargs)
    rest = args
    if len(args) > 1:
        rest = (args[0], 0.0, *args[2:])
    else:
        plain["dropout_p"] = 0.0
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            probabilities = func(query, key, one, *rest, **plain)
            torch.set_rng_state(state)
            return read_mask(probabilities, func(query, key, one, *args, **kwargs))
    except RuntimeError:
        return None
    finally:
        torch.set_rng_state(state)


def _whole(h: Tensor) -> tuple[int, ...]:
    return tuple(h.shape)


def _channels(unbatched_ndim: int | None) -> Callable[[Tensor], tuple[int, ...]]:
    return lambda h: channel_mask(h, unbatched_ndim)


def _open(watch: Recorder, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return open_up(watch, func, *args, **kwargs)  # type: ignore[arg-type]


OBSERVED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _elementwise("dropout", _whole),
    F.dropout1d: _elementwise("dropout1d", _channels(2)),
    F.dropout2d: _elementwise("dropout2d", _channels(None)),
    F.dropout3d: _elementwise("dropout3d", _channels(4)),
    torch.dropout: _namespace("dropout", _whole, inplace=False),
    torch.dropout_: _namespace("dropout", _whole, inplace=True),
    torch.feature_dropout: _namespace("feature_dropout", _channels(None), inplace=False),
    torch.feature_dropout_: _namespace("feature_dropout", _channels(None), inplace=True),
    torch.native_dropout: _native,
    F.alpha_dropout: _alpha("alpha_dropout"),
    F.feature_alpha_dropout: _alpha("feature_alpha_dropout"),
    torch.alpha_dropout: _namespace("alpha_dropout", lambda _: None, inplace=False),
    torch.alpha_dropout_: _namespace("alpha_dropout", lambda _: None, inplace=True),
    torch.feature_alpha_dropout: _namespace("feature_alpha_dropout", lambda _: None, inplace=False),
    torch.feature_alpha_dropout_: _namespace("feature_alpha_dropout", lambda _: None, inplace=True),
    torch.lstm: _recurrent("lstm_dropout"),
    torch.gru: _recurrent("gru_dropout"),
    torch.rnn_tanh: _recurrent("rnn_dropout"),
    torch.rnn_relu: _recurrent("rnn_dropout"),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _open,
    drop: _custom,
}
