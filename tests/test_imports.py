"""What an import brings along."""

import subprocess
import sys

import pytest

import lightning_dropreg as dr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lightning_dropreg", "torch"),
        ("from lightning_dropreg.cli import main; main(['--help'])", "torch"),
        ("import lightning_dropreg.functional, lightning_dropreg.nn, lightning_dropreg.losses", "lightning"),
        ("import lightning_dropreg.diagnostics, lightning_dropreg.uncertainty", "lightning"),
        ("import lightning_dropreg as dr; dr.drop, dr.recognize, dr.functional.find_sites", "lightning"),
    ],
)
def test_nothing_is_imported_before_it_is_needed(statement, absent):
    code = f"import sys; {statement}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_every_public_name_is_there():
    assert {name for name in dr.__all__ if not hasattr(dr, name)} == set()
    assert set(dr.__all__) <= set(dir(dr))
    assert not hasattr(dr, "something_else")
    assert dr.nn.LockedDropout is not None  # a room is there without an import of its own
