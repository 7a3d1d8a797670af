"""Which errors are a user's mistake on the command line, to be told in one message without a traceback.

An error inside the user's own model keeps its traceback: there it is what helps.
"""

import pickle
import re
import traceback
import zipfile
from pathlib import Path

from lightning_dropreg.errors import DropregError, InvalidArgumentError

__all__ = ["check_checkpoint", "message_of"]

_NO_DATA = re.compile(r"`(\w+_dataloader)` must be implemented")
_CHOOSING = "trainer/connectors/accelerator_connector.py"
_READING = ("torch/serialization.py", "lightning/fabric/utilities/cloud_io.py")


def message_of(error: BaseException) -> str | None:
    """Say what is wrong if the command line or a file named on it is.

    Returns:
        The message; None if the error is not of that kind.

    Example:
        >>> message_of(InvalidArgumentError("k=0 must be at least 1."))
        'k=0 must be at least 1.'
        >>> message_of(ZeroDivisionError("division by zero")) is None
        True
    """
    cause: BaseException | None = error
    while cause is not None:  # jsonargparse raises a ValueError of its own from what a class raises when it is built
        if isinstance(cause, DropregError):
            return str(cause)
        cause = cause.__cause__
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, of either of its packages
        if missing := _NO_DATA.match(str(error)):
            return f"no data is configured (--data), and the model has no {missing[1]} either."
        return str(error)
    files = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__)[-8:]]
    if isinstance(error, ValueError) and files[-1].endswith(_CHOOSING):
        return str(error)
    if isinstance(error, (pickle.UnpicklingError, RuntimeError, EOFError, KeyError)) and any(
        file.endswith(_READING) for file in files
    ):
        return f"the checkpoint cannot be read: {str(error).splitlines()[0]} Is it whole, and written by a Trainer?"
    return None


def check_checkpoint(path: object) -> None:
    """Refuse a file that is no checkpoint before anything is built for it; words such as ``best`` are a Trainer's."""
    if not isinstance(path, str) or path in {"best", "last", "hpc", "registry"} or ":" in path:
        return
    file = Path(path)
    if not file.exists():
        raise InvalidArgumentError(f"--ckpt_path {path}: there is no such file.")
    if file.is_dir():  # of a sharded strategy
        return
    with file.open("rb") as opened:
        start = opened.read(1)
    if start != b"\x80" and not zipfile.is_zipfile(file):  # \x80 begins what torch wrote before 1.6
        raise InvalidArgumentError(
            f"--ckpt_path {path} is no checkpoint: its {file.stat().st_size} bytes are not what torch.save writes. "
            "Is the file whole?"
        )
