"""Texts of a few lines."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lightning_dropreg.paper.data import Corpus, Split


class Tiny(Corpus):
    """A corpus of a few lines, split at white space."""

    def __init__(self, **lines: list[str]) -> None:
        self._lines: Mapping[str, list[str]] = lines

    def lines(self, split: Split) -> Iterator[str]:
        yield from self._lines.get(split, [])


def numbers(count: int) -> Tiny:
    words = [" ".join(f"w{i}" for i in range(start, start + 10)) for start in range(0, count, 10)]
    return Tiny(train=words, validation=words[:3], test=words[3:6])


def write_text(folder):
    Path(folder).mkdir()
    for split in ("train", "valid", "test"):
        lines = (" ".join(f"w{(7 * i + j * j) % 25}" for j in range(9)) for i in range(20))
        Path(f"{folder}/{split}.txt").write_text("\n".join(lines))
