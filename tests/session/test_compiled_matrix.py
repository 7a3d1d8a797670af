"""Ways to compile, methods and kinds of sites together: gradients, logs and module state are those without compiling.

The rest of the matrix is slow, Inductor and float32: ``pytest -n 0 -m slow tests/session/test_compiled_matrix.py``, 8
minutes of one core where Inductor's caches are empty.
"""

import pytest
import torch
from compiled_models import METHODS, OLD, assert_same, fit
from torch._dynamo.utils import counters

from lightning_dropreg import errors

CASES = [
    ("part", "penalty", "layers"),
    ("parts", "penalty of full curvature", "layers+attention"),
    ("whole", "noise in the loss", "layers+encoder"),
    ("in place", "noise after the backward", "own+checkpoints"),
    ("parts in place", "algorithm 2", "images+encoder"),
    ("whole", "algorithm 2 in little memory", "attention+images"),
    ("parts", "economical", "checkpoints+own"),
    ("parts in place", "some rows apart", "layers+own"),
    ("part", "some rows in one pass", "own"),
    ("whole", "some rows in one pass", "layers+attention"),
    ("in place", "some rows in one pass", "layers+checkpoints"),
    ("parts in place", "some rows in one pass", "encoder+own"),
    ("in place", "k draws", "layers+images"),
    ("whole", "antithetic draws", "encoder+own"),
    ("parts", "k draws and noise of dropout", "attention+checkpoints"),
    ("part", "penalty and noise of dropout", "images"),
    ("parts", "algorithm 2", "recurrent+depth"),
]
BREAKS = {"recurrent+depth"}


@pytest.mark.parametrize(("how", "method", "kinds"), CASES, ids=map(" ".join, CASES))
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float64),
        pytest.param("aot_eager", torch.float32, marks=pytest.mark.slow),
        pytest.param("inductor", torch.float64, marks=pytest.mark.slow),
        pytest.param("inductor", torch.float32, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_compiled_as_uncompiled(how, method, kinds, backend, dtype, recwarn):
    plain = fit(METHODS[method](), kinds, dtype=dtype)
    compiled = fit(METHODS[method](), kinds, how, backend, dtype)
    near = 1e-10 if dtype == torch.float64 else 1e-5 if "full" in method else 1e-6  # full: divided by step_size squared
    assert_same(plain, compiled, near)
    warned = [str(w.message) for w in recwarn if w.category is errors.CompiledPartWarning]
    if OLD:
        assert all("runs uncompiled in training" in text for text in warned)
        return
    assert not warned
    graphs = compiled[0].graphs
    assert graphs[1] == graphs[-1] > 0, graphs
    assert not counters["graph_break"] or kinds in BREAKS, counters["graph_break"]
