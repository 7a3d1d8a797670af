"""What a corpus is: three splits, each a stream of lines, and the tokenizer that suits them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

__all__ = ["Corpus", "Split"]

Split = Literal["train", "validation", "test"]


class Corpus(ABC):
    """A text in three splits.

    Lines are yielded one at a time, so that a corpus need not fit in memory.
    """

    tokenizer: ClassVar[str | None] = None
    """Name of a tokenizer of torchtext's ``get_tokenizer``; None splits at white space."""

    @abstractmethod
    def lines(self, split: Split) -> Iterator[str]:
        """Yield the lines of one split, in order.

        Args:
            split: Which part of the text.

        Yields:
            One line: what an end-of-sentence token closes.
        """

    def fingerprint(self, split: Split) -> str | None:
        """Say what the text of one split is, in few letters.

        Args:
            split: Which part of the text.

        Returns:
            A checksum of the text; None if its token numbers need not be kept between runs.
        """
        return None

    @property
    def cache_dir(self) -> Path | None:
        """Where token numbers may be kept between runs; None for nowhere."""
        return None
