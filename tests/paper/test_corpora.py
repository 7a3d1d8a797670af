"""Corpora in files: where they are found, how they are read, and what is kept of them between runs."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from fits import make_trainer

from lightning_dropreg.errors import (
    CorpusNotFoundError,
    InvalidArgumentError,
    UnreadableTextError,
    VocabularyMismatchError,
)
from lightning_dropreg.paper.data import LanguageModelingData, PennTreebank, TextFolder, WikiText2, WikiText103
from lightning_dropreg.paper.data.encoding import EOS, TextEncoder
from lightning_dropreg.paper.models import LSTMLanguageModel

TEXT = {
    "train": " the cat <unk> on the mat \n\n = Café \u2013 the dog = \n" * 4,
    "valid": " the dog sat \n" * 3,
    "test": " a cat sat \n" * 3,
}


def write(folder: Path, pattern: str = "{}.txt", **changed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in {**TEXT, **changed}.items():
        (folder / pattern.format(split)).write_text(text, encoding="utf-8")
    return folder


def tokens(corpus, vocab_size: int = 50) -> list[str]:
    encoder = TextEncoder(corpus, vocab_size)
    return [encoder.itos[i] for i in encoder.encode("train")]


def cached(folder: Path, what: str) -> Path:
    [path] = (folder / ".dropreg").glob(f"{what}-*.pt")
    return path


@pytest.mark.parametrize(
    ("make", "below", "pattern"),
    [
        (PennTreebank, "", "ptb.{}.txt"),
        (PennTreebank, "", "{}.txt"),
        (PennTreebank, "penn-treebank", "ptb.{}.txt"),
        (WikiText2, "", "wiki.{}.tokens"),
        (WikiText2, "wikitext-2/wikitext-2", "wiki.{}.tokens"),
        (WikiText103, "wikitext-103", "{}.txt"),
        (TextFolder, "", "{}.txt"),
    ],
)
def test_tokens_and_vocabulary_are_those_of_torchtexts_own_reader(tmp_path, make, below, pattern):
    from torchtext.data import Field
    from torchtext.datasets import LanguageModelingDataset

    folder = write(tmp_path / below, pattern)
    field = Field(eos_token=EOS, pad_token=None)
    theirs = LanguageModelingDataset(str(folder / pattern.format("train")), field)
    field.build_vocab(theirs, max_size=48)
    corpus = make(tmp_path)
    assert tokens(corpus) == theirs[0].text
    assert TextEncoder(corpus, 50).itos == field.vocab.itos


def zipped(path: Path, folder: Path, inside: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"{inside}/{file.name}")
    return path


def tarred(path: Path, folder: Path, inside: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for file in folder.iterdir():
            archive.add(file, f"{inside}/{file.name}")
    return path


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("inside", ["wikitext-2", "../../outside"])
def test_an_archive_reads_like_its_folder_and_is_not_extracted(tmp_path, pack, inside):
    folder = write(tmp_path / "texts", "wiki.{}.tokens")
    (tmp_path / "one").mkdir()
    archive = pack(tmp_path / "one" / "packed", folder, inside)
    assert tokens(WikiText2(archive)) == tokens(WikiText2(folder))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [".dropreg", "packed"]


def test_a_damaged_archive_and_one_too_large(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "a.zip", write(tmp_path / "texts"), "x")
    monkeypatch.setattr("lightning_dropreg.paper.data.sources._LARGEST", 10)
    with pytest.raises(UnreadableTextError, match="claims to hold"):
        tokens(TextFolder(archive))
    monkeypatch.undo()
    content = bytearray(archive.read_bytes())
    content[40:60] = b"\xff" * 20
    archive.write_bytes(content)
    with pytest.raises(UnreadableTextError, match=r"a\.zip.*(damaged|UTF-8)"):
        tokens(TextFolder(archive))
    archive.write_text("no archive")
    with pytest.raises(UnreadableTextError, match="no zip or tar archive"):
        tokens(TextFolder(archive))


@pytest.mark.parametrize(
    ("name", "looked_for", "published"),
    [
        ("penn_treebank", "ptb.train.txt, train.txt", "https://raw.githubusercontent.com/wojzaremba"),
        ("wikitext2", "wiki.train.tokens", "https://wikitext.smerity.com/wikitext-2"),
        ("wikitext103", "wiki.train.tokens", "https://wikitext.smerity.com/wikitext-103"),
        ("folder", "train.txt", "Put the files"),
    ],
)
def test_a_corpus_that_is_not_there(tmp_path, name, looked_for, published):
    data = LanguageModelingData(name, tmp_path / "nothing")
    with pytest.raises(CorpusNotFoundError) as caught:
        data.setup("fit")
    assert all(part in str(caught.value) for part in (str(tmp_path / "nothing"), looked_for, published, "not exist"))


def test_bad_splits(tmp_path):
    (write(tmp_path / "missing") / "valid.txt").unlink()
    with pytest.raises(CorpusNotFoundError, match=r"no validation split.*valid\.txt, valid\.tokens, validation\.txt"):
        LanguageModelingData("folder", tmp_path / "missing", batch_size=2).setup("fit")
    for blank in ("", "\n \n"):
        write(tmp_path / "empty", valid=blank)
        with pytest.raises(InvalidArgumentError, match="validation split of TextFolder has no text"):
            LanguageModelingData("folder", tmp_path / "empty", batch_size=2).setup("fit")
    (write(tmp_path / "latin") / "train.txt").write_bytes("fine\ncaf\xe9 bar\n".encode("latin1"))
    with pytest.raises(UnreadableTextError, match=r"latin/train\.txt is not UTF-8 text: byte 0xe9"):
        LanguageModelingData("folder", tmp_path / "latin", batch_size=2).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corpus": "folder"}, "needs root"),
        ({"corpus": "python_manual", "root": "."}, "reads no files"),
        ({"corpus": "wikitext"}, "unknown: use python_manual, penn_treebank"),
        ({"corpus": TextFolder("."), "root": "."}, "root='.'"),
        ({"train_fraction": 0.0}, "train_fraction=0.0"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        LanguageModelingData(**arguments)


def test_a_fraction_of_the_training_split_has_the_vocabulary_of_all_of_it(tmp_path):
    whole, part = (
        LanguageModelingData("folder", write(tmp_path), batch_size=1, train_fraction=fraction) for fraction in (1, 0.25)
    )
    whole.setup("fit")
    part.setup("fit")
    assert part.encoder.itos == whole.encoder.itos
    stream, start = (torch.cat([text for text, _ in data.train_dataloader()], dim=1) for data in (whole, part))
    assert start.shape[1] == round(0.25 * (stream.shape[1] + 1)) - 1
    assert start.equal(stream[:, : start.shape[1]])


def test_the_second_run_reads_the_cache_and_not_the_text(tmp_path, monkeypatch):
    first = tokens(TextFolder(write(tmp_path)))
    vocabulary = TextEncoder(TextFolder(tmp_path), 50).itos
    monkeypatch.setattr(TextFolder, "lines", lambda *_: pytest.fail("the text was read"))
    assert TextEncoder(TextFolder(tmp_path), 50).itos == vocabulary
    assert tokens(TextFolder(tmp_path)) == first
    with pytest.raises(pytest.fail.Exception, match="the text was read"):
        tokens(TextFolder(tmp_path), vocab_size=6)  # other options, other numbers


def test_changed_text_and_damaged_caches_are_encoded_again(tmp_path):
    first = tokens(TextFolder(write(tmp_path)))
    for what in ("train", "vocabulary"):
        for damage in ("cut", "flip", "other"):
            path = cached(tmp_path, what)
            content = bytearray(path.read_bytes())
            if damage == "cut":
                content = content[: len(content) // 2]
            elif damage == "flip":
                values = bytes(torch.load(path, weights_only=True)["values"].numpy())
                content[content.index(values)] ^= 1
            else:
                content = bytearray(b"import os")
            path.write_bytes(content)
            assert tokens(TextFolder(tmp_path)) == first, (what, damage)
            assert path.read_bytes() != bytes(content), (what, damage)  # and is whole again
    assert tokens(TextFolder(write(tmp_path, train="one two\n"))) == ["one", "two", EOS]


def test_the_numbers_of_a_held_out_split_follow_its_own_text_and_that_of_the_vocabulary(tmp_path):
    def held_out(**changed: str) -> list[int]:
        encoder = TextEncoder(TextFolder(write(tmp_path, **changed)), 50)
        return encoder.encode("validation").tolist()

    first = held_out(train="a a b\n", valid="a b\n")
    assert first == [2, 3, 1]
    assert held_out(train="a a b\n", valid="b b\n") == [3, 3, 1]
    assert held_out(train="b b a\n", valid="a b\n") == [3, 2, 1]
    assert held_out(train="a a b\n", valid="a b\n") == first


def test_where_nothing_can_be_kept_the_text_is_encoded_all_the_same(tmp_path):
    write(tmp_path)
    (tmp_path / ".dropreg").write_text("a file where the folder should be")
    assert tokens(TextFolder(tmp_path))[:3] == ["the", "cat", "<unk>"]
    data = LanguageModelingData("folder", tmp_path, batch_size=2, cache_dir=str(tmp_path / "elsewhere"))
    data.setup("fit")
    kept = {path.name.split("-")[0] for path in (tmp_path / "elsewhere").iterdir()}
    assert kept == {"vocabulary", "train", "validation"}


def test_a_checkpoint_with_another_vocabulary_is_refused(tmp_path):
    def data(folder: Path) -> LanguageModelingData:
        return LanguageModelingData("folder", folder, batch_size=2, eval_batch_size=2, window=4, vocab_size=20)

    def model() -> LSTMLanguageModel:
        return LSTMLanguageModel(vocab_size=20, embedding_dim=4, hidden_dim=4)

    trainer = make_trainer(max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(model(), datamodule=data(write(tmp_path / "a")))
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    same, other = data(tmp_path / "a"), data(write(tmp_path / "b", train=TEXT["train"] + "a bird\n"))
    make_trainer().test(model(), datamodule=same, ckpt_path=tmp_path / "trained.ckpt", verbose=False)
    with pytest.raises(VocabularyMismatchError, match="a vocabulary of 10 words, but TextFolder gives 12"):
        make_trainer().test(model(), datamodule=other, ckpt_path=tmp_path / "trained.ckpt", verbose=False)


def test_one_process_of_each_machine_prepares_what_the_stage_reads(tmp_path):
    data = LanguageModelingData("folder", write(tmp_path), batch_size=2, eval_batch_size=2, window=4, vocab_size=20)
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(LSTMLanguageModel(vocab_size=20, embedding_dim=4, hidden_dim=4), datamodule=data)
    kept = {path.name.split("-")[0] for path in (tmp_path / ".dropreg").iterdir()}
    assert kept == {"vocabulary", "train", "validation"}


def test_the_corpus_is_named_on_the_command_line(tmp_path, monkeypatch):
    from lightning_dropreg.cli import main

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts")
    config = Path(__file__).parents[2] / "configs" / "quickstart_none.yaml"
    options = {"corpus": "folder", "root": "texts", "batch_size": 2, "eval_batch_size": 2, "window": 4}
    brief = ["--trainer.max_epochs=1", "--model.embedding_dim=4", "--model.hidden_dim=4"]
    assert main(["fit", "-c", str(config), *brief, *(f"--data.{k}={v}" for k, v in options.items())]) == 0
    assert cached(tmp_path / "texts", "train").is_file()


MEASURE = r"""
import re, sys
from pathlib import Path
from lightning_dropreg.paper.data import LanguageModelingData
data = LanguageModelingData("wikitext103", sys.argv[1], vocab_size=267_735, window=150, batch_size=60)
data.setup("fit")
tokens = sum(text.numel() for text, _ in data.train_dataloader())
# not resource.getrusage, whose peak may be that of the parent process
print(len(data.encoder), tokens, re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_text_of_the_size_of_wikitext_103_is_encoded_within_2_gib(tmp_path):
    total, vocabulary, length = 103_227_021, 267_733, 56
    numbers = torch.randperm(vocabulary).tolist() + (torch.rand(3_000_000) ** 4 * vocabulary).long().tolist()
    block = [f"word{n}" for n in numbers]
    lines = [" ".join(block[start : start + length]) + "\n" for start in range(0, len(block) - length, length)]
    with (tmp_path / "wiki.train.tokens").open("w") as file:
        for _ in range(total // (len(lines) * (length + 1)) + 1):
            file.writelines(lines)
    (tmp_path / "wiki.valid.tokens").write_text("".join(lines[:100]))
    for state in ("from the text", "from the cache"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=1800
        )
        words, tokens_read, peak = map(int, done.stdout.split())
        print(f"{tokens_read} tokens, {words} words, {state}: peak {peak / 1024:.0f} MiB")
        assert tokens_read > total
        assert words == vocabulary + 2
        assert peak < 2 * 1024 * 1024
