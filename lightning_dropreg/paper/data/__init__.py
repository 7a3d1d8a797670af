"""Text corpora and the LightningDataModule that serves them to a language model."""

from lightning_dropreg.paper.data.corpus import Corpus, Split
from lightning_dropreg.paper.data.datamodule import LanguageModelingData
from lightning_dropreg.paper.data.named import CorpusName, make_corpus
from lightning_dropreg.paper.data.python_manual import PythonManual
from lightning_dropreg.paper.data.text_files import PennTreebank, TextFolder, WikiText2, WikiText103

__all__ = [
    "Corpus",
    "CorpusName",
    "LanguageModelingData",
    "PennTreebank",
    "PythonManual",
    "Split",
    "TextFolder",
    "WikiText2",
    "WikiText103",
    "make_corpus",
]
