"""The embedded corpus: the reference manual of the running Python, as ``help()`` prints it."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

from lightning_dropreg.checks import check_instance
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.paper.data.corpus import Corpus, Split

__all__ = ["PythonManual"]

_HELD_OUT = 0.1  # of the words for validation, and again for test
_RULE = re.compile(r"[*=~^+|-]{3,}")


class PythonManual(Corpus):
    """The topics of ``pydoc_data.topics``, split by topic; nothing is downloaded.

    About 52,000 words, 42,000 of them for training. A line is a paragraph, because the manual's own line
    breaks are those of an 80-column terminal. Long topics contain shorter ones word for word (a fifth of the
    text), so a paragraph is kept only where the shortest topic has it: otherwise most of a held-out topic
    would be in the training text too. The text changes a little with the version of Python, and figures
    from different versions are not comparable.

    Args:
        topics: Name and text of each topic; the running Python's by default.

    Raises:
        InvalidArgumentError: If there are too few topics to fill three splits.

    Example:
        >>> manual = PythonManual()
        >>> set(manual.topics("train")) & set(manual.topics("validation"))
        set()
    """

    tokenizer: ClassVar[str | None] = "basic_english"

    def __init__(self, topics: Mapping[str, str] | None = None) -> None:
        if topics is not None:
            check_instance("topics", topics, Mapping, "a mapping from names to texts")
            for item in topics.items():
                check_instance("topics", item[0], str, "a mapping from names, which are strings")
                check_instance("topics", item[1], str, "a mapping to texts, which are strings")
        paragraphs = _own_paragraphs(_installed_topics() if topics is None else topics)
        self._paragraphs = paragraphs
        self._topics = _split_by_topic({name: _words(own) for name, own in paragraphs.items()})
        empty = [split for split, names in self._topics.items() if not names]
        if empty:
            raise InvalidArgumentError(
                f"PythonManual: {len(paragraphs)} topic(s) with text of their own leave nothing for {empty}: "
                "a held-out topic must be shorter than a thirtieth of the text. Give more topics."
            )

    def topics(self, split: Split) -> list[str]:
        """List the topics of one split.

        Args:
            split: Which part of the text.

        Returns:
            Names of topics, in alphabetical order.
        """
        return self._topics[split]

    def lines(self, split: Split) -> Iterator[str]:
        """Yield the paragraphs of one split, topic by topic.

        Args:
            split: Which part of the text.

        Yields:
            One paragraph, its white space collapsed.
        """
        for name in self._topics[split]:
            yield from self._paragraphs[name]


def _installed_topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions strip it from their smallest images
        raise InvalidArgumentError(
            "PythonManual: this Python comes without pydoc_data.topics; install its full standard library, "
            "or use another corpus."
        ) from error
    return topics


def _own_paragraphs(topics: Mapping[str, str]) -> dict[str, list[str]]:
    seen: set[str] = set()
    own: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for block in re.split(r"\n\s*\n", topics[name]):
            # a heading is underlined with a row of asterisks, a table ruled with dashes: not words
            paragraph = " ".join(word for word in block.split() if not _RULE.fullmatch(word))
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                own.setdefault(name, []).append(paragraph)
    return dict(sorted(own.items()))


def _words(paragraphs: list[str]) -> int:
    return sum(len(paragraph.split()) for paragraph in paragraphs)


def _split_by_topic(words: Mapping[str, int]) -> dict[Split, list[str]]:
    quota = _HELD_OUT * sum(words.values())
    splits: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    filled: dict[Split, int] = {"validation": 0, "test": 0}
    # By digest, not by a shuffle: where a topic goes must depend on nothing but the names.
    for name in sorted(words, key=lambda name: hashlib.sha256(name.encode()).digest()):
        # A held-out split of one long topic would measure that topic: the long ones are for training.
        roomy = [split for split in filled if filled[split] < quota and words[name] <= quota / 3]
        if roomy:
            filled[roomy[0]] += words[name]
        splits[roomy[0] if roomy else "train"].append(name)
    return {split: sorted(names) for split, names in splits.items()}
