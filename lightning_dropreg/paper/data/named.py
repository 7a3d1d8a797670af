"""The corpora by name, for configuration files."""

from os import PathLike
from typing import Literal

from lightning_dropreg.checks import is_one_of
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.paper.data.corpus import Corpus
from lightning_dropreg.paper.data.python_manual import PythonManual
from lightning_dropreg.paper.data.text_files import PennTreebank, TextFolder, WikiText2, WikiText103

__all__ = ["CorpusName", "make_corpus"]

CorpusName = Literal["python_manual", "penn_treebank", "wikitext2", "wikitext103", "folder"]

_IN_FILES: dict[str, type[TextFolder]] = {
    "penn_treebank": PennTreebank,
    "wikitext2": WikiText2,
    "wikitext103": WikiText103,
    "folder": TextFolder,
}


def make_corpus(name: CorpusName, root: str | PathLike[str] | None = None) -> Corpus:
    """Make a corpus from its name.

    Args:
        name: ``"python_manual"`` comes with Python; the others are files in `root`.
        root: Folder of the files, or a zip or tar archive; ``".data"`` by default, but for ``"folder"``.

    Returns:
        The corpus.

    Raises:
        InvalidArgumentError: If there is no such corpus, or `root` is missing or makes no sense.

    Example:
        >>> type(make_corpus("wikitext2", "texts")).__name__
        'WikiText2'
    """
    if is_one_of(name, _IN_FILES):
        if name == "folder" and root is None:
            raise InvalidArgumentError(
                "corpus='folder' needs root, the folder with train.txt, valid.txt and test.txt (or an archive of it)."
            )
        return _IN_FILES[name](root)
    if name != "python_manual":
        raise InvalidArgumentError(
            f"The name of the corpus, {name!r}, is unknown: use python_manual, {', '.join(_IN_FILES)}."
        )
    if root is not None:
        raise InvalidArgumentError(f"corpus='python_manual' reads no files, but root={str(root)!r} was given.")
    return PythonManual()
