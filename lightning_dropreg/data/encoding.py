"""From lines to token numbers, with torchtext's ``Field``, tokenizers and ``Vocab``."""

from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.data.corpus import Corpus, Split
from lightning_dropreg.errors import DropregError, InvalidArgumentError

__all__ = ["EOS", "UNK", "MissingExtraError", "TextEncoder"]

UNK = "<unk>"
EOS = "<eos>"


class MissingExtraError(DropregError, ImportError):
    """An optional dependency of the package is needed and not installed."""


class TextEncoder:
    """Tokenizes a corpus and numbers its tokens; the vocabulary is that of the training split alone.

    Args:
        corpus: The text.
        vocab_size: Size of the vocabulary with ``<unk>`` and ``<eos>``: the most frequent words are kept.
        min_freq: Words rarer than this become ``<unk>``; at least 1.

    Raises:
        InvalidArgumentError: If the corpus has no training text.
        MissingExtraError: If torchtext is not installed.
    """

    def __init__(self, corpus: Corpus, vocab_size: int, min_freq: int = 1) -> None:
        self.corpus = corpus
        # No pad token: streams are cut, never padded, so nothing ever has to be masked out of the loss.
        self._field: Any = _torchtext_field()(
            tokenize=corpus.tokenizer, unk_token=UNK, eos_token=EOS, pad_token=None, batch_first=True
        )
        self._field.build_vocab(self._tokens("train"), max_size=vocab_size - 2, min_freq=min_freq)

    @property
    def itos(self) -> list[str]:
        """The words, by number."""
        words: list[str] = self._field.vocab.itos
        return words

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self.itos)

    def encode(self, split: Split) -> Tensor:
        """Turn one split into one stream of token numbers.

        Args:
            split: Which part of the text.

        Returns:
            Token numbers, of shape ``(tokens,)`` and type int64, ``<eos>`` after every line.
        """
        vocab = self._field.vocab
        # Not vocab.stoi[...]: a defaultdict, it grows by every unknown word it is asked for.
        numbers = (vocab[token] for line in self._tokens(split) for token in line)
        # 8 bytes a token all along, where a list would take 36: corpora of 100 million tokens fit.
        return torch.frombuffer(array("q", numbers), dtype=torch.int64)

    def _tokens(self, split: Split) -> Iterator[list[str]]:
        empty = True
        for line in self.corpus.lines(split):
            empty = False
            yield [*self._field.preprocess(line), EOS]
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
