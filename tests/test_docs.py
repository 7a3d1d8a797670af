"""Nothing public is missing in the documentation, every page can be reached. (`scripts/docs.sh` builds the site.)"""

import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

import lightning_dropreg
from lightning_dropreg import errors
from lightning_dropreg.losses import RECOGNIZED, REFUSED

DOCS = Path(__file__).parent.parent / "docs"
WITHIN = ("diagnostics.figures", "metrics.functional", "uncertainty.figures", "uncertainty.mode")
"""Public modules that are not directly in the package."""

MODULES = [
    f"lightning_dropreg.{name}"
    for name in sorted([*(found.name for found in pkgutil.iter_modules(lightning_dropreg.__path__)), *WITHIN])
    if name != "__main__"
]


@pytest.mark.parametrize("name", ["lightning_dropreg", *MODULES])
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    exported = getattr(module, "__all__", None)
    assert exported is not None
    values = {member: getattr(module, member) for member in exported}
    told = (type, types.FunctionType)  # by type(), since an alias calls itself a class in Python 3.10
    missing = [member for member, value in values.items() if issubclass(type(value), told) and not value.__doc__]
    assert not missing


def test_everything_that_users_import_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    named = {name.rpartition(".")[2] for name in re.findall(r"auto\w+:: ([\w.]+)", text)}
    whole = set(re.findall(r"automodule:: ([\w.]+)", text))
    for module in whole:
        named |= set(importlib.import_module(module).__all__)
    told = [
        name for name in lightning_dropreg.__all__ if not isinstance(getattr(lightning_dropreg, name), types.ModuleType)
    ]
    assert set(told) - named == set()


def test_every_page_is_in_a_table_of_contents():
    index = (DOCS / "index.md").read_text()
    listed = {
        line.strip() for block in re.findall(r"```{toctree}(.*?)```", index, re.DOTALL) for line in block.splitlines()
    }
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")} - {"README", "index"}
    assert pages - listed == set()


def test_every_table_of_measurements_has_a_title():
    conf, folder = (DOCS / "conf.py").read_text(), DOCS.parent / "examples" / "benchmarks"
    tables = [page for page in folder.rglob("*.md") if not page.read_text().lstrip().startswith("# ")]
    short = [page.relative_to(folder).with_suffix("").as_posix() for page in tables]
    assert [name for name in short if f'"{name}": ' not in conf] == [], "to be named in TITLES of docs/conf.py"


def test_the_losses_that_pages_list_are_those_of_the_code():
    page = (DOCS / "constructs.md").read_text()
    table = page[page.index("| loss | Hessian") :].partition("\n\n")[0]
    cells = "".join(row.split("|")[1] for row in table.splitlines()[2:])
    listed = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", cells)}
    refused = {function.__name__ for function in REFUSED}
    assert listed - refused - {"recognize"} == {function.__name__ for function in RECOGNIZED}
    assert "[constructs](../constructs.md)" in (DOCS / "howto" / "own_loss.md").read_text()  # the only list


def test_every_error_has_its_section():
    sections = set(re.findall(r"^## (\w+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE))
    assert set(errors.__all__) - sections == set()
    assert {name for name in sections if name.endswith(("Error", "Warning"))} <= set(errors.__all__)
