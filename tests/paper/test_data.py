"""The corpus, its encoding and its batches."""

import sys
from types import SimpleNamespace

import pytest
import torch
from texts import Tiny, numbers

from lightning_dropreg.errors import DropregError, InvalidArgumentError
from lightning_dropreg.paper.data import LanguageModelingData, PythonManual, Split
from lightning_dropreg.paper.data.encoding import EOS, UNK, MissingExtraError, TextEncoder
from lightning_dropreg.paper.data.windows import StreamWindows

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def manual() -> PythonManual:
    return PythonManual()


def test_topics_are_split_and_none_is_in_two_splits(manual):
    from pydoc_data.topics import topics

    names = [name for split in SPLITS for name in manual.topics(split)]
    assert len(names) == len(set(names))
    assert set(names) <= set(topics)


def test_no_paragraph_is_in_two_splits_although_topics_contain_each_other(manual):
    paragraphs = {split: set(manual.lines(split)) for split in SPLITS}
    assert not paragraphs["train"] & paragraphs["validation"]
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["validation"] & paragraphs["test"]


def test_split_sizes(manual):
    words = {split: sum(len(line.split()) for line in manual.lines(split)) for split in SPLITS}
    total = sum(words.values())
    assert total > 45_000
    assert 0.75 < words["train"] / total < 0.85
    assert 0.09 < words["validation"] / total < 0.14
    assert 0.09 < words["test"] / total < 0.14


def test_the_split_does_not_depend_on_the_order_of_topics(manual):
    from pydoc_data.topics import topics

    backwards = PythonManual(dict(reversed(topics.items())))
    assert all(list(manual.lines(split)) == list(backwards.lines(split)) for split in SPLITS)


def test_too_few_topics():
    with pytest.raises(InvalidArgumentError, match="validation"):
        PythonManual({"a": "one\n\ntwo", "b": "three"})


def test_vocabulary_is_of_the_training_split_with_the_most_frequent_words_first():
    corpus = Tiny(train=["b a b", "b c a"], validation=["z a"], test=["c"])
    encoder = TextEncoder(corpus, vocab_size=4)
    assert encoder.itos == [UNK, EOS, "b", "a"]
    assert encoder.encode("train").tolist() == [2, 3, 2, 1, 2, 0, 3, 1]
    assert encoder.encode("validation").tolist() == [0, 3, 1]
    assert len(encoder) == 4  # asking for an unknown word has not made it known


def test_min_freq():
    assert TextEncoder(Tiny(train=["b a b"]), vocab_size=9, min_freq=2).itos == [UNK, EOS, "b"]


def test_the_manual_is_tokenized_by_torchtext_basic_english(manual):
    from torchtext.data import get_tokenizer

    line = next(manual.lines("train"))
    encoder = TextEncoder(manual, vocab_size=10_000)
    tokens = [encoder.itos[i] for i in encoder.encode("train")[: len(get_tokenizer("basic_english")(line))]]
    assert tokens == get_tokenizer("basic_english")(line)


@pytest.mark.parametrize("tokens", [40, 43, 50])
def test_targets_are_the_text_shifted_by_one_and_windows_are_consecutive(tokens):
    stream = torch.arange(tokens)
    windows = list(StreamWindows(stream, batch_size=4, window=3))
    text = torch.cat([text for text, _ in windows], dim=1)
    target = torch.cat([target for _, target in windows], dim=1)
    rows = stream[: 4 * (tokens // 4)].view(4, -1)
    assert text.equal(rows[:, :-1])
    assert target.equal(rows[:, 1:])
    assert all(text.shape == target.shape == (4, 3) for text, target in windows[:-1])


def test_windows_are_those_of_torchtext_bptt_iterator():
    from torchtext.data import BPTTIterator, Example, Field
    from torchtext.datasets import LanguageModelingDataset

    corpus = numbers(120)
    encoder = TextEncoder(corpus, vocab_size=200)
    field = Field(batch_first=True, pad_token=None)
    words = [word for line in corpus.lines("train") for word in [*line.split(), EOS]]
    dataset = LanguageModelingDataset.__new__(LanguageModelingDataset)
    dataset.examples, dataset.fields = [Example.fromlist([words], [("text", field)])], {"text": field}
    field.vocab = encoder._field.vocab
    theirs = list(BPTTIterator(dataset, batch_size=6, bptt_len=5, train=False))
    ours = list(StreamWindows(encoder.encode("train"), batch_size=6, window=5))
    assert len(ours) == len(theirs)
    for (text, target), batch in zip(ours, theirs, strict=True):
        assert text.equal(batch.text)
        assert target.equal(batch.target)


def test_shards_are_disjoint_and_cover_the_rows():
    stream = torch.arange(48)
    whole = StreamWindows(stream, batch_size=4, window=5)
    shards = [StreamWindows(stream, batch_size=2, window=5, shard=(rank, 2)) for rank in range(2)]
    for index in range(len(whole)):
        assert torch.cat([shard[index][0] for shard in shards]).equal(whole[index][0])


def test_each_process_reads_rows_of_its_own():
    def rows(rank: int, processes: int, batch_size: int) -> torch.Tensor:
        data = LanguageModelingData(numbers(400), batch_size=batch_size, window=4)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
        data.setup("fit")
        return torch.cat([text for text, _ in data.train_dataloader()], dim=1)

    assert torch.cat([rows(0, 2, 3), rows(1, 2, 3)]).equal(rows(0, 1, 6))


def test_a_stream_too_short_for_the_batch():
    with pytest.raises(InvalidArgumentError, match="5 tokens"):
        StreamWindows(torch.arange(5), batch_size=4, window=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers):
    def batches(num_workers: int) -> list[torch.Tensor]:
        data = LanguageModelingData(numbers(400), batch_size=3, window=4, num_workers=num_workers)
        data.setup("fit")
        return [torch.stack(batch) for batch in data.train_dataloader()]

    alone, helped = batches(0), batches(workers)
    assert len(alone) == len(helped) > workers
    assert all(a.equal(b) for a, b in zip(alone, helped, strict=True))


def test_two_data_modules_and_two_epochs_give_the_same_batches():
    def batches() -> list[torch.Tensor]:
        data = LanguageModelingData(numbers(400), batch_size=3, window=4)
        data.setup("fit")
        loader = data.train_dataloader()
        epochs = [[torch.stack(batch) for batch in loader] for _ in range(2)]
        assert all(a.equal(b) for a, b in zip(*epochs, strict=True))
        return epochs[0]

    assert all(a.equal(b) for a, b in zip(batches(), batches(), strict=True))


def test_a_stage_reads_only_the_splits_it_needs():
    data = LanguageModelingData(Tiny(train=["a b c d"], test=["a b c d"]), batch_size=1, eval_batch_size=1)
    data.setup("test")
    assert len(list(data.test_dataloader())) == len(list(data.predict_dataloader())) == 1
    with pytest.raises(InvalidArgumentError, match=r"validation split of Tiny"):
        data.setup("fit")


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"window": 0}, {"vocab_size": 2}, {"num_workers": -1}, {"eval_batch_size": -3}],
)
def test_arguments_out_of_range(wrong):
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        LanguageModelingData(numbers(100), **wrong)


def test_without_torchtext_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtext.data", None)
    with pytest.raises(MissingExtraError, match=r"lightning-dropreg\[text\]") as caught:
        TextEncoder(numbers(100), vocab_size=50)
    assert isinstance(caught.value, DropregError)
    assert isinstance(caught.value, ImportError)
