"""Builds the API reference from the docstrings: ``python docs/build.py [FOLDER]``, by default into ``site``.

Needs the extra `docs`. Every page is a module that is meant to be imported from outside.
"""

import pkgutil
import sys
from pathlib import Path

import pdoc

import lightning_dropreg

WITHIN = ("diagnostics.figures", "metrics.functional", "uncertainty.figures", "uncertainty.mode")
"""Public modules that are not directly in the package."""


def public_modules() -> list[str]:
    """Return the names of the modules that are documented."""
    direct = [found.name for found in pkgutil.iter_modules(lightning_dropreg.__path__) if found.name[0] != "_"]
    return ["lightning_dropreg", *(f"lightning_dropreg.{name}" for name in sorted([*direct, *WITHIN]))]


def build(folder: Path) -> None:
    """Write one HTML page for every public module, with an index and a search.

    Args:
        folder: Where to; made if it is not there.
    """
    pdoc.render.configure(docformat="google", math=True, show_source=False)
    pdoc.pdoc(*public_modules(), output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
