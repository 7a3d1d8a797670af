"""Keeps encoded texts between runs, as files with nothing but a tensor and two checksums in them."""

import hashlib
import os
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

__all__ = ["TokenCache", "digest_of"]

_WORTH_A_WARNING = 10_000_000  # tokens: a smaller text is encoded again in seconds


class TokenCache:
    """Tensors in files named after what they were made from.

    A file is used only if the checksum of its tensor is right, so a damaged one is like none. Reading is by
    ``torch.load(weights_only=True, mmap=True)``: no code can be run by it, and processes share the memory.

    Args:
        folder: Where the files are; made when the first is written. None keeps nothing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     cache = TokenCache(Path(folder))
        ...     cache.save("train", "key of text and options", torch.arange(3))
        ...     cache.load("train", "key of text and options"), cache.load("train", "another key")
        (tensor([0, 1, 2]), None)
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, name: str, key: str) -> Tensor | None:
        """Read a tensor.

        Args:
            name: What it is, for people who look into the folder.
            key: What it was made from.

        Returns:
            The tensor, or None if there is none or it is damaged.
        """
        if self.folder is None or not self._path(name, key).is_file():
            return None
        try:
            stored = torch.load(self._path(name, key), weights_only=True, mmap=True)
            values: Tensor = stored["values"]
            if stored["key"] == key and stored["digest"] == digest_of(values):
                return values
        except Exception:  # whatever a damaged file makes torch raise: it is written anew
            pass
        return None

    def save(self, name: str, key: str, values: Tensor) -> None:
        """Write a tensor; where that is not possible, go on without.

        Args:
            name: See `load`.
            key: See `load`.
            values: One-dimensional, on the CPU.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # another process may read or write the same file: it must be there as a whole or not at all
            partial = self._path(name, key).with_suffix(f".{os.getpid()}.partial")
            try:
                torch.save({"key": key, "digest": digest_of(values), "values": values}, partial)
                os.replace(partial, self._path(name, key))
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
            if values.numel() >= _WORTH_A_WARNING:
                rank_zero_warn(
                    f"The token numbers of this text could not be kept in {self.folder} ({error}), so every run will "
                    "encode it again. Give LanguageModelingData another cache_dir."
                )

    def _path(self, name: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def digest_of(values: Tensor) -> str:
    """Return the SHA-256 of a tensor's type and contents.

    Args:
        values: One-dimensional, contiguous, on the CPU.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256(str(values.dtype).encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()
