"""Random numbers that a key fixes, whatever else the program draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "KeyedGenerators",
    "draw_key",
    "fold_key",
    "keyed_signs",
    "keyed_uniforms",
    "of_this_rank",
    "random_signs",
]

_MASK64 = (1 << 64) - 1


def fold_key(*parts: int) -> int:
    """Mix integers into one 63-bit generator seed (splitmix64), so that neighbouring inputs give unrelated noise.

    Args:
        parts: Any integers, for example ``(seed, rank, step, micro_batch)``.

    Returns:
        An integer in ``[0, 2**63)``.

    Example:
        >>> fold_key(1, 0, 0) != fold_key(1, 0, 1)
        True
    """
    state = 0
    for part in parts:
        state = (state + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def draw_key(generator: torch.Generator | None) -> int:
    """Draw the seed of one batch's noise from `generator` (the global one if None)."""
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def of_this_rank(key: int) -> int:
    """Make a key of this process's own, where several train together: most seed all of them alike."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if grouped else 0
    return fold_key(key, rank) if rank else key


class KeyedGenerators:
    """One `torch.Generator` per device, all seeded with one key."""

    def __init__(self, key: int) -> None:
        self.key = key
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator of `device`."""
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.manual_seed(self.key)
            self._generators[device] = generator
        return self._generators[device]

    def at(self, position: int, device: torch.device) -> torch.Generator:
        """Return the generator of `device`, seeded anew for what stands at `position`."""
        return self.on(device).manual_seed(fold_key(self.key, position))


def random_signs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, size: float = 1.0) -> Tensor:
    """Draw independent ``+size`` and ``-size`` with probability one half each.

    Every bit of a random integer is one sign: on a CPU, where random numbers are made one after another, this takes a
    twentieth of the time of ``bernoulli_``.

    Args:
        shape: Shape of the result.
        dtype: Its floating-point type.
        generator: Source of the randomness; its device is the result's.
        size: Absolute value of all entries.

    Returns:
        The signs.

    Example:
        >>> signs = random_signs((2, 3), torch.float32, torch.Generator().manual_seed(1))
        >>> signs.shape, signs.abs().unique()
        (torch.Size([2, 3]), tensor([1.]))
    """
    count, device = math.prod(shape), generator.device
    words = torch.empty(-(-count // 32), 1, dtype=torch.int32, device=device).random_(
        -(2**31), None, generator=generator
    )
    # each bit is moved to where a floating-point number has its sign, set in those that are negative
    floats = (words.bitwise_not_() << _shifts(device)).view(torch.float32)
    of_this_size = torch.full((), size if dtype == torch.float32 else 1.0, dtype=torch.float32, device=device)
    signs = torch.copysign(of_this_size, floats.flatten()[:count] if count % 32 else floats).view(tuple(shape))
    return signs if dtype == torch.float32 else signs.to(dtype).mul_(size)


_shifts_on: dict[torch.device, Tensor] = {}


def _shifts(device: torch.device) -> Tensor:
    """How far bits 0 to 31 of an integer are from its first."""
    shifts = _shifts_on.get(device)
    if shifts is None:
        shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=device)
        if type(shifts) is Tensor:  # not one that a mode has made for itself
            _shifts_on[device] = shifts
    return shifts


@torch.library.custom_op("dropreg::signs", mutates_args=())
def keyed_signs(
    key: Tensor, position: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Draw `random_signs` as one operation that compiled graphs can hold, with key and position as its inputs.

    Being a function of its inputs, it may be computed again in a backward.

    Args:
        key: Seed of the batch, an integer scalar on the CPU.
        position: Number of the site, likewise.
        shape: Shape of the result.
        dtype: Its floating-point type.
        device: Its device.

    Returns:
        The very numbers that a generator seeded with ``fold_key(key, position)`` gives.
    """
    return random_signs(shape, dtype, _generator(key, position, device))


@torch.library.custom_op("dropreg::uniforms", mutates_args=())
def keyed_uniforms(
    key: Tensor, position: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Draw uniform numbers in ``[0, 1)``; see `keyed_signs`."""
    return torch.rand(tuple(shape), generator=_generator(key, position, device), dtype=dtype, device=device)


def _generator(key: Tensor, position: Tensor, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(fold_key(int(key), int(position)))


def _like(key: Tensor, position: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


keyed_signs.register_fake(_like)
keyed_uniforms.register_fake(_like)
