"""From lines to token numbers, with torchtext's ``Field``, tokenizers and ``Vocab``."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.errors import DropregError, InvalidArgumentError
from lightning_dropreg.paper.data.corpus import Corpus, Split
from lightning_dropreg.paper.data.token_cache import TokenCache

__all__ = ["EOS", "UNK", "MissingExtraError", "TextEncoder"]

UNK = "<unk>"
EOS = "<eos>"

_FORMAT = "tokens-1"  # to change with whatever changes the numbers that one text and its options give
_BETWEEN = "\0"  # in no word


class MissingExtraError(DropregError, ImportError):
    """An optional dependency of the package is needed and not installed."""


class TextEncoder:
    """Tokenizes a corpus and numbers its tokens; the vocabulary is that of the training split alone.

    Texts stream through: nothing larger than the token numbers, 4 bytes each, is ever in memory. What a corpus with
    fingerprints gave is kept in a cache.

    Args:
        corpus: The text.
        vocab_size: Size of the vocabulary with ``<unk>`` and ``<eos>``: the most frequent words are kept.
        min_freq: Words rarer than this become ``<unk>``; at least 1.
        cache_dir: Where to keep token numbers between runs; the corpus's own ``cache_dir`` by default.

    Raises:
        InvalidArgumentError: If the corpus has no training text.
        MissingExtraError: If torchtext is not installed.
    """

    def __init__(self, corpus: Corpus, vocab_size: int, min_freq: int = 1, cache_dir: Path | None = None) -> None:
        self.corpus = corpus
        self._options = f"{_FORMAT} tokenizer={corpus.tokenizer} vocab_size={vocab_size} min_freq={min_freq}"
        self._cache = TokenCache(corpus.cache_dir if cache_dir is None else cache_dir)
        # No pad token: streams are cut, never padded, so nothing ever has to be masked out of the loss.
        self._field: Any = _torchtext_field()(
            tokenize=corpus.tokenizer, unk_token=UNK, eos_token=EOS, pad_token=None, batch_first=True
        )
        key = self._key("train")
        kept = None if key is None else self._cache.load("vocabulary", key)
        if kept is not None:
            words = bytes(kept.numpy()).decode().split(_BETWEEN)
            # Falling frequencies keep the order.
            counts = Counter({word: len(words) - rank for rank, word in enumerate(words)})
            self._field.vocab = self._field.vocab_cls(counts, specials=words[: len((UNK, EOS))])
            return
        self._field.build_vocab(self._tokens("train"), max_size=vocab_size - 2, min_freq=min_freq)
        if key is not None:
            letters = bytearray(_BETWEEN.join(self.itos).encode())
            self._cache.save("vocabulary", key, torch.frombuffer(letters, dtype=torch.uint8))

    @property
    def itos(self) -> list[str]:
        """The words, by number."""
        words: list[str] = self._field.vocab.itos
        return words

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self.itos)

    def digest(self) -> str:
        """Return a checksum of the words and their numbers."""
        return hashlib.sha256(_BETWEEN.join(self.itos).encode()).hexdigest()

    def encode(self, split: Split) -> Tensor:
        """Turn one split into one stream of token numbers.

        Args:
            split: Which part of the text.

        Returns:
            Token numbers, of shape ``(tokens,)`` and type int32, ``<eos>`` after every line.
        """
        key = self._key(split)
        kept = None if key is None else self._cache.load(split, key)
        if kept is not None:
            return kept
        number = self._field.vocab.stoi.get  # not stoi[...]: a defaultdict, it grows by every unknown word
        unknown = self._field.vocab.unk_index
        numbers = array("i")  # 4 bytes a token all along, where a list would take 36
        for line in self._tokens(split):
            numbers.extend([number(token, unknown) for token in line])
        stream = torch.frombuffer(numbers, dtype=torch.int32)
        if key is not None:
            self._cache.save(split, key, stream)
        return stream

    def _key(self, split: Split) -> str | None:
        """What token numbers depend on: options, the text of the vocabulary and the text itself."""
        if self._cache.folder is None:
            return None
        prints = [self.corpus.fingerprint(s) for s in ("train", split)]
        return None if None in prints else f"{self._options} train={prints[0]} text={prints[1]}"

    def _tokens(self, split: Split) -> Iterator[list[str]]:
        empty = True
        for line in self.corpus.lines(split):
            words = self._field.preprocess(line)
            empty = empty and not words
            yield [*words, EOS]
        if empty:
            raise InvalidArgumentError(
                f"The {split} split of {type(self.corpus).__name__} has no text: it needs at least one line."
            )


def _torchtext_field() -> type[Any]:
    try:
        from torchtext.data import Field
    except ImportError as error:
        raise MissingExtraError(
            'Text corpora need torchtext, which is not installed: pip install "lightning-dropreg[text]"'
        ) from error
    field: type[Any] = Field
    return field
