"""The quasi-recurrent layer: convolutions over time, and a recurrence that is only an average."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import is_integer
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["QRNN", "linear_recurrence"]

State = tuple[Tensor, Tensor | None]


class QRNN(nn.Module):
    r"""A quasi-recurrent layer with fo-pooling (Bradbury et al., 2017).

    .. math::
        z_t, f_t, o_t &= \tanh, \sigma, \sigma \; (W [x_t; x_{t-1}] + b) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot z_t \\
        h_t &= o_t \odot c_t

    The recurrence is solved for all time steps at once (`linear_recurrence`).

    Args:
        input_size: Width of the input, at least 1.
        hidden_size: Width of the output, at least 1.
        window: Words that a step sees: 1 (its own) or 2 (the one before as well).

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> layer = QRNN(3, 5, window=2)
        >>> output, (cell, last_input) = layer(torch.ones(2, 7, 3))
        >>> output.shape, cell.shape, last_input.shape
        (torch.Size([2, 7, 5]), torch.Size([2, 5]), torch.Size([2, 3]))
    """

    def __init__(self, input_size: int, hidden_size: int, window: int = 1) -> None:
        super().__init__()
        if not is_integer(input_size, 1) or not is_integer(hidden_size, 1) or window not in (1, 2):
            raise InvalidArgumentError(
                f"QRNN: input_size={input_size} and hidden_size={hidden_size} must be at least 1, window={window} must "
                "be 1 or 2."
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.window = window
        self.gates = nn.Linear(window * input_size, 3 * hidden_size)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a window of time.

        Args:
            x: Input, of shape ``(batch, time, input_size)``.
            state: Cell, of shape ``(batch, hidden_size)``, and the last input before `x`, of shape
                ``(batch, input_size)`` (None for ``window=1``); zero by default.

        Returns:
            Output, of shape ``(batch, time, hidden_size)``, and the state after the last step.
        """
        cell, before = state if state is not None else (x.new_zeros(len(x), self.hidden_size), None)
        seen = x
        if self.window == 2:
            first = x.new_zeros(len(x), 1, self.input_size) if before is None else before.unsqueeze(1)
            seen = torch.cat([x, torch.cat([first, x[:, :-1]], dim=1)], dim=-1)
        z, forget, out = self.gates(seen).chunk(3, dim=-1)
        # 1 - sigmoid(f) is sigmoid(-f), without the cancellation
        cells = linear_recurrence(torch.sigmoid(forget), torch.sigmoid(-forget) * torch.tanh(z), cell)
        return torch.sigmoid(out) * cells, (cells[:, -1], x[:, -1] if self.window == 2 else None)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.input_size}, {self.hidden_size}, window={self.window}"


def linear_recurrence(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    r"""Solve ``c_t = a_t c_{t-1} + b_t`` for all ``t`` in logarithmic depth.

    A parallel scan (Blelloch, 1990): two steps make one, ``c_{t+1} = (a_{t+1} a_t) c_{t-1} + (a_{t+1} b_t + b_{t+1})``,
    so a recurrence of half the length gives every second ``c``, and one step from there the others. Twice the work of a
    loop in ``2 log2 T`` operations. With ``0 <= a <= 1`` nothing can overflow (products of ``a`` may vanish, as they
    should), for there is no division and no logarithm.

    Args:
        a: Factors, of shape ``(batch, time, *)``.
        b: Summands, of the same shape.
        start: ``c_0``, of shape ``(batch, *)``.

    Returns:
        ``c_1, c_2, ...``, of the shape of `a`.

    Example:
        >>> linear_recurrence(torch.full((1, 4), 0.5), torch.ones(1, 4), torch.zeros(1))
        tensor([[1.0000, 1.5000, 1.7500, 1.8750]])
    """
    first = a[:, :1] * start.unsqueeze(1) + b[:, :1]
    return _scan(a, torch.cat([first, b[:, 1:]], dim=1))


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """Solve from ``c_0 = 0``."""
    steps = b.shape[1]
    if steps == 1:
        return b
    pairs = steps // 2
    a_first, a_second = a[:, : 2 * pairs : 2], a[:, 1::2]
    b_first, b_second = b[:, : 2 * pairs : 2], b[:, 1::2]
    second = _scan(a_first * a_second, a_second * b_first + b_second)
    rest = steps - 1 - pairs  # of the first ones, all but the very first
    first = torch.cat([b[:, :1], a[:, 2::2] * second[:, :rest] + b[:, 2::2]], dim=1)
    both = torch.stack([first[:, :pairs], second], dim=2).flatten(1, 2)
    return torch.cat([both, first[:, pairs:]], dim=1) if steps % 2 else both
