"""The API reference can be built, and nothing public is missing in it."""

import importlib
import re
import sys
import types
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
pdoc = pytest.importorskip("pdoc")


@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    monkeypatch.delitem(sys.modules, "build", raising=False)
    return importlib.import_module("build")


def test_every_public_name_is_documented(build):
    missing = []
    for name in build.public_modules():
        module = pdoc.doc.Module(importlib.import_module(name))
        assert module.docstring, name
        exported = getattr(module.obj, "__all__", None)
        assert exported is not None, f"{name} has no __all__"
        for member in exported:
            found = module.get(member)
            if isinstance(getattr(module.obj, member), types.ModuleType):
                continue  # a page of its own
            if found.kind == "variable" and not re.search(rf"^{member}\b.* =", module.source, re.MULTILINE):
                continue  # a constant is documented where it is defined
            if not found.docstring:
                missing.append(f"{name}.{member}")
    assert not missing


@pytest.mark.filterwarnings("ignore:Error parsing type annotation", "ignore:The module specification")
def test_the_reference_is_built(build, tmp_path):
    build.build(tmp_path)
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {f"{name.replace('.', '/')}.html" for name in build.public_modules()} <= pages.keys()
    penalty = pages["lightning_dropreg/functional.html"]
    assert "Arguments:" in penalty  # sections, not paragraphs that begin with "Args:"
    assert "\\tfrac12" in penalty
    for name, page in pages.items():
        assert ".. math::" not in page, name
        assert "=====" not in page, name
