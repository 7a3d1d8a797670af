"""Text corpora and the LightningDataModule that serves them to a language model."""

from lightning_dropreg.data.corpus import Corpus, Split
from lightning_dropreg.data.datamodule import LanguageModelingData
from lightning_dropreg.data.python_manual import PythonManual

__all__ = ["Corpus", "LanguageModelingData", "PythonManual", "Split"]
