"""The LightningDataModule for language modelling."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dropreg.checks import below_floor, check_flags, check_instance, check_path, is_number
from lightning_dropreg.errors import InvalidArgumentError, VocabularyMismatchError
from lightning_dropreg.paper.data.corpus import Corpus, Split
from lightning_dropreg.paper.data.encoding import TextEncoder
from lightning_dropreg.paper.data.named import CorpusName, make_corpus
from lightning_dropreg.paper.data.windows import InOrder, StreamWindows, WindowLoader

__all__ = ["LanguageModelingData"]

_Batches = DataLoader[tuple[Tensor, Tensor]]


class LanguageModelingData(LightningDataModule):
    """Batches ``(text, target)`` of shape ``(batch, time)``, the target one word ahead of the text.

    Batches are consecutive (see `StreamWindows`), so a model may carry its hidden state from one to the next.
    Under several processes each reads rows of its own. Prediction runs over the test split.

    Args:
        corpus: The text, or the name of one: ``"python_manual"`` (embedded), ``"penn_treebank"``, ``"wikitext2"``,
            ``"wikitext103"`` or ``"folder"`` (any text in three files).
        root: Where the files of a named corpus are: a folder, or a zip or tar archive. See `make_corpus`.
        batch_size: Rows of a training batch in each process, at least 1.
        eval_batch_size: Rows of a validation or test batch in each process, at least 1.
        window: Words of each row in a batch, at least 1.
        vocab_size: Size of the vocabulary with ``<unk>`` and ``<eos>``, at least 3: the most frequent words
            of the training split. The model must be built for as many.
        min_freq: Words of the training split rarer than this become ``<unk>``, at least 1.
        num_workers: Worker processes of each data loader. The text is in memory: 0 is fastest.
        train_fraction: How much of the training split to train on, from its start, in ``(0, 1]``. The vocabulary
            is that of all of it.
        cache_dir: Where token numbers are kept between runs; beside the text by default.
        jitter: Whether training windows have random lengths around `window` (see
            `lightning_dropreg.paper.data.windows.jittered_ends`), drawn from the run's seed and the epoch; `window`
            must be at least 10. Give the model the same `window`, which scales its steps by the length.

    Raises:
        InvalidArgumentError: If an argument is outside its range.
    """

    def __init__(
        self,
        corpus: CorpusName | Corpus | None = None,
        root: Path | str | None = None,
        batch_size: int = 20,
        eval_batch_size: int = 10,
        window: int = 35,
        vocab_size: int = 10_000,
        min_freq: int = 1,
        num_workers: int = 0,
        train_fraction: float = 1.0,
        cache_dir: Path | str | None = None,
        jitter: bool = False,
    ) -> None:
        super().__init__()
        check_flags(jitter=jitter)
        check_instance("corpus", corpus, (str, Corpus, type(None)), "a Corpus or the name of one")
        floors = {
            "batch_size": 1,
            "eval_batch_size": 1,
            "window": 10 if jitter else 1,
            "vocab_size": 3,
            "min_freq": 1,
            "num_workers": 0,
        }
        given = locals()
        wrong = below_floor(given, floors)
        if not is_number(train_fraction) or not 0 < train_fraction <= 1:
            wrong.append(f"train_fraction={train_fraction} (in (0, 1])")
        if wrong:
            raise InvalidArgumentError(f"LanguageModelingData: out of range: {', '.join(wrong)}.")
        if isinstance(corpus, Corpus) and root is not None:
            raise InvalidArgumentError(
                f"LanguageModelingData: root={str(root)!r} goes with the name of a corpus, but corpus is a "
                f"{type(corpus).__name__}, which knows where its text is."
            )
        self.corpus = corpus if isinstance(corpus, Corpus) else make_corpus(corpus or "python_manual", root)
        self.cache_dir = None if cache_dir is None else check_path("cache_dir", cache_dir)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.window = window
        self.vocab_size = vocab_size
        self.min_freq = min_freq
        self.num_workers = num_workers
        self.train_fraction = train_fraction
        self.jitter = jitter
        self.encoder: TextEncoder
        """Tokenizer and vocabulary; exists after `setup`."""
        self._streams: dict[Split, Tensor] = {}
        self._trained_with: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        """Encode the text in one process of each machine, so that the others find it in the cache."""
        if self.corpus.fingerprint("train") is not None and self.trainer is not None:
            self._read(self.trainer.state.fn or "fit")

    def setup(self, stage: str) -> None:
        """Build the vocabulary and encode the splits that the stage reads.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        self._read(stage)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint tells of the words it was trained with."""
        return {"words": len(self.encoder), "vocabulary": self.encoder.digest()} if hasattr(self, "encoder") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained with these words.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._trained_with = state_dict
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        trained = self._trained_with
        if not trained or not hasattr(self, "encoder") or trained["vocabulary"] == self.encoder.digest():
            return
        order = ", others or in another order" if trained["words"] == len(self.encoder) else ""
        raise VocabularyMismatchError(
            f"The checkpoint was trained with a vocabulary of {trained['words']} words, but "
            f"{type(self.corpus).__name__} gives {len(self.encoder)}{order} (vocab_size={self.vocab_size}, "
            f"min_freq={self.min_freq}). Give the corpus and the options of the training run, or start without the "
            "checkpoint."
        )

    def _read(self, stage: str) -> None:
        if not hasattr(self, "encoder"):
            self.encoder = TextEncoder(self.corpus, self.vocab_size, self.min_freq, self.cache_dir)
            self._check_vocabulary()
        needed: dict[str, tuple[Split, ...]] = {"fit": ("train", "validation"), "validate": ("validation",)}
        for split in needed.get(stage, ("test",)):
            if split not in self._streams:
                stream = self.encoder.encode(split)
                fraction = self.train_fraction if split == "train" else 1.0
                self._streams[split] = stream[: max(1, round(fraction * len(stream)))]

    def train_dataloader(self) -> _Batches:
        """Return the consecutive batches of the training split."""
        # the same cuts in all processes, which average their gradients window by window
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.jitter else None
        return self._batches("train", self.batch_size, seed)

    def val_dataloader(self) -> _Batches:
        """Return the consecutive batches of the validation split."""
        return self._batches("validation", self.eval_batch_size)

    def test_dataloader(self) -> _Batches:
        """Return the consecutive batches of the test split."""
        return self._batches("test", self.eval_batch_size)

    def predict_dataloader(self) -> _Batches:
        """Return the consecutive batches of the test split."""
        return self.test_dataloader()

    def _batches(self, split: Split, batch_size: int, jitter: int | None = None) -> _Batches:
        shard = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        windows = StreamWindows(self._streams[split], batch_size, self.window, shard, jitter)
        make = WindowLoader if split == "train" else DataLoader
        return make(windows, batch_size=None, sampler=InOrder(windows), num_workers=self.num_workers)
