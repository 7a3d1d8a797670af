"""The table of assumptions: complete, consistent, and the same in the documentation."""

import ast
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

import lightning_dropreg
from lightning_dropreg import errors
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.inspection.assumptions import ASSUMPTIONS, METHODS, Measured, assumed_by, with_table
from lightning_dropreg.session.base import RegularizerCallback

ROOT = Path(__file__).parents[2]
GUARANTEES = ROOT / "docs" / "guarantees.md"


def test_the_documentation_shows_the_table():
    page = GUARANTEES.read_text()
    assert page == with_table(page), "python -m lightning_dropreg.inspection.assumptions docs/guarantees.md"


def test_every_method_says_what_it_assumes():
    public = [getattr(lightning_dropreg, name) for name in lightning_dropreg.__all__]
    callbacks = [c.__name__ for c in public if inspect.isclass(c) and issubclass(c, RegularizerCallback)]
    assert {*callbacks, *(f"estimator {name}" for name in ESTIMATORS)} <= METHODS.keys()
    for method, names in METHODS.items():
        assert set(names) <= ASSUMPTIONS.keys(), method


def test_every_assumption_is_relied_on_and_answered():
    for assumption in ASSUMPTIONS.values():
        assert assumption.methods, f"nobody relies on {assumption.name}"
        assert assumption.follows, f"silence where {assumption.name} does not hold"


def test_errors_in_the_table_exist():
    for assumption in ASSUMPTIONS.values():
        named = {word.split("`")[0] for word in assumption.error.split("`")[1::2] if word.endswith("Error")}
        assert named <= set(errors.__all__), assumption.name
        assert not assumption.error or named, f"{assumption.name}: which error?"


def test_nothing_is_measured_that_is_not_in_the_table():
    """Every `Measured("name", …)` in the package, by its source."""
    root = Path(lightning_dropreg.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Measured" and node.args:
                name = node.args[0]
                assert not isinstance(name, ast.Constant) or name.value in ASSUMPTIONS, f"{path}: {name.value}"
    with pytest.raises(InvalidArgumentError, match="no assumption"):
        Measured("weather")
    with pytest.raises(InvalidArgumentError, match="outcome"):
        Measured("repeatable", outcome="perhaps")


def test_unknown_methods_are_refused():
    with pytest.raises(InvalidArgumentError, match="no method"):
        assumed_by(["magic"])


def rows_of_guarantees():
    table = GUARANTEES.read_text().partition("| guarantee |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [row for row in rows if len(row) > 1]


def test_every_guarantee_and_every_assumption_is_proved_by_breaking():
    """Each names a mutation, and the record says of it, as it is in the table now, that its tests notice it."""
    spec = importlib.util.spec_from_file_location("mutation_table", ROOT / "scripts" / "mutation_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, table = rows_of_guarantees(), module.MUTATIONS
    assert len(rows) > 50
    named = {row[0][:60]: re.findall(r"`([^`]+)`", row[2]) for row in rows}
    named |= {name: [name] for name in ASSUMPTIONS}
    assert all(named.values()), [row for row, names in named.items() if not names]
    assert not {each for names in named.values() for each in names} - table.keys()
    assert table.keys() <= {each for row in rows for each in re.findall(r"`([^`]+)`", row[2])} | ASSUMPTIONS.keys()
    record = json.loads((ROOT / "docs" / "mutations.json").read_text())["mutations"]
    recorded = {each["name"]: each for each in record}
    for name in {each for names in named.values() for each in names}:
        again = f"python scripts/mutations.py '{name}'"
        each = recorded.get(name)
        assert each, again
        assert each["caught"] or name == "no waiting", f"{name}: {each['said']}"  # that one needs a GPU
        assert (each["file"], each["old"], each["new"], each["tests"]) == table[name], again
        passage = (ROOT / "lightning_dropreg" / each["file"]).read_text()
        assert passage.count(each["old"]) == 1, f"{name}: {each['file']} has another passage now"
