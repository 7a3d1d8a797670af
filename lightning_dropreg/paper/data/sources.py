"""Text files, lying in a folder or inside an archive, read a line at a time.

Nothing is ever extracted: a member of an archive is read as a stream, so no path in it can lead anywhere.
"""

import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from lightning.pytorch.utilities import rank_zero_only
from rich.progress import wrap_file

from lightning_dropreg.errors import UnreadableTextError

__all__ = ["TextSource", "find_text"]

_SHOW_FROM = 8 << 20  # bytes: what takes longer than a second or two gets a progress bar
_LARGEST = 16 << 30  # bytes: thirty times the largest corpus of the paper
_BLOCK = 1 << 20
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)


@dataclass(frozen=True)
class TextSource:
    """One text file.

    Attributes:
        path: The file, or the archive it is in.
        member: Its name in the archive; None for a file of its own.
        size: Bytes of text.
    """

    path: Path
    member: str | None
    size: int

    def __str__(self) -> str:
        """Return the path, and the name in the archive."""
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    def digest(self) -> str:
        """Return the SHA-256 of the text."""
        digest = hashlib.sha256()
        with self._open() as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def lines(self) -> Iterator[str]:
        """Yield the lines, as Python's text files have them, with a progress bar if they are many.

        Yields:
            One line with its line break.

        Raises:
            UnreadableTextError: If the file is not UTF-8.
        """
        hidden = self.size < _SHOW_FROM or getattr(rank_zero_only, "rank", 0) != 0
        label = f"Reading {PurePosixPath(self.member).name if self.member else self.path.name}"
        count = 0
        try:
            with (
                self._open() as file,
                nullcontext(file) if hidden else wrap_file(file, self.size, description=label, transient=True) as shown,
                io.TextIOWrapper(shown, encoding="utf-8") as text,
            ):
                for line in text:
                    count += 1
                    yield line
        except UnicodeDecodeError as error:
            raise UnreadableTextError(
                f"{self} is not UTF-8 text: byte 0x{error.object[error.start]:02x} some way after line {count} "
                f"({error.reason}). Convert it, for example with: iconv -f latin1 -t utf-8"
            ) from error

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            if self.member is None:
                with self.path.open("rb") as file:
                    yield file
            elif zipfile.is_zipfile(self.path):
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                    yield cast("BinaryIO", member)
            else:
                with tarfile.open(self.path) as tar:
                    extracted = tar.extractfile(self.member)
                    assert extracted is not None  # regular files only were listed
                    yield cast("BinaryIO", extracted)
        except _BROKEN as error:
            raise UnreadableTextError(f"{self} is damaged ({error}). Get it again.") from error


def find_text(root: Path, names: Sequence[str], subfolders: Iterable[str] = ()) -> TextSource | None:
    """Find the first of some names.

    Args:
        root: A folder, or a zip or tar archive.
        names: Names of files, the first that exists winning.
        subfolders: Folders below `root` in which to look too. In an archive any folder will do.

    Returns:
        The file, or None.

    Raises:
        UnreadableTextError: If `root` is a file but no archive, or the text is too large to be meant.
    """
    if not root.is_file():
        candidates = (folder / name for folder in (root, *(root / s for s in subfolders)) for name in names)
        path = next((path for path in candidates if path.is_file()), None)
        return None if path is None else TextSource(path, None, path.stat().st_size)
    members = _members(root)
    for name in names:
        found = min((m for m in members if PurePosixPath(m).name == name), key=len, default=None)
        if found is not None:
            if members[found] > _LARGEST:
                raise UnreadableTextError(
                    f"{root}: {found} claims to hold {members[found]} bytes, more than the {_LARGEST} that are read "
                    "from an archive. If it really does, unpack it and give the folder."
                )
            return TextSource(root, found, members[found])
    return None


def _members(archive: Path) -> Mapping[str, int]:
    """Names and sizes of the regular files in an archive."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as contents:
                return {info.filename: info.file_size for info in contents.infolist() if not info.is_dir()}
        with tarfile.open(archive) as tar:
            return {info.name: info.size for info in tar if info.isfile()}
    except _BROKEN as error:
        raise UnreadableTextError(
            f"{archive} is a file, but no zip or tar archive ({error}). Give the folder of the text files, or an "
            "archive with them."
        ) from error
