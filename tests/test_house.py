"""How the house is kept: who imports whom among the tests, and how long a file may be. (Rooms: ``lint-imports``.)"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("lightning_dropreg", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_no_test_imports_another(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if re.match(r"test_\w+$|conftest$", name)]


def test_no_two_tests_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)  # or pytest collects neither


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def names_in(path):
    """The functions, classes, methods and tables that a file defines."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_what_the_architecture_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)`", text)
    assert len(named) > 30
    missing = [(path, name) for path, name in named if name not in names_in(ROOT / "lightning_dropreg" / path)]
    assert not missing


def test_what_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:lightning_dropreg|tests)/[\w/]+\.py)`", text)
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).is_file()]
    named = re.findall(r"`([A-Za-z]+)` in `([\w/]+\.py)`", text)
    assert len(named) >= 5
    assert not [(name, path) for name, path in named if name not in names_in(ROOT / path)]


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [each for each in targets if "://" not in each and not (page.parent / each).exists()] == []
