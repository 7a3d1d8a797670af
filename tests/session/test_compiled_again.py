"""How often parts are compiled again, and why: as torch itself notes it, by the guards that failed."""

import pytest
from compiled_models import METHODS, OLD, Model, fit
from fits import make_loader
from torch._dynamo import utils
from torch.utils.data import DataLoader

import lightning_dropreg as dr

pytestmark = pytest.mark.skipif(OLD, reason="parts with dropout run uncompiled in torch 2.6")

SIZE, RULE, BLOCK = "size mismatch", "get_torch_function_mode_stack", "self.kind =="
"""Which guards fail: on the shape of a batch, on the kind of rule of a pass, on the block that one code is of."""


def compilations():
    """The reason of each compilation so far, "" of a first; a backward belongs to its forward."""
    return [each.recompile_reason or "" for each in utils.get_compilation_metrics() if each.is_forward]


class Counting(Model):
    """Notes after every batch how many compilations there were."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.counts = [*getattr(self, "counts", []), len(compilations())]


def fit_counted(callbacks, how, kinds="layers+own", **options):
    utils.clear_compilation_metrics()
    return fit(callbacks, kinds, how, make=Counting, **options)[0].counts, compilations()


CASES = [
    ("part", "algorithm 2", []),  # both ways of the step in one graph
    ("whole", "algorithm 2", []),
    ("parts", "algorithm 2", [BLOCK]),
    ("in place", "algorithm 2 in little memory", []),
    ("in place", "k draws", []),
    ("part", "some rows in one pass", [SIZE, SIZE, RULE]),  # the looks at rows; once and twice; without dropout
]


@pytest.mark.parametrize(("how", "method", "again"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_parts_are_compiled_again_for_known_reasons_and_in_the_first_step_only(how, method, again):
    counts, reasons = fit_counted(METHODS[method](), how)
    assert counts[0] == counts[-1] == len(reasons) > 0
    assert len(counts) > 3
    assert len([each for each in reasons if not each]) == 1
    found = [each for each in reasons if each]
    assert len(found) == len(again), found
    assert all(guard in text for guard, text in zip(again, found, strict=True)), found


def of_sizes(*sizes):
    x, y = next(iter(make_loader()))
    return DataLoader([(x[:size], y[:size]) for size in sizes], batch_size=None)


def test_a_new_size_is_compiled_once_and_sizes_after_it_not_again():
    few, _ = fit_counted(METHODS["algorithm 2"](), "part", loader=of_sizes(6, 5))
    many, reasons = fit_counted(METHODS["algorithm 2"](), "part", loader=of_sizes(6, 5, 4, 3, 6, 2))
    assert few[-1] == many[-1] == 2, reasons
    assert SIZE in reasons[-1]


def test_a_schedule_compiles_once_more_and_not_for_every_probability():
    schedule = dr.DropProbSchedule("linear", length=6, interval="step", start=0.5)
    counts, reasons = fit_counted([*METHODS["algorithm 2"](), schedule], "part")
    assert counts[0] == 1
    assert counts[-1] == 2, reasons
    assert "'p'" in reasons[-1] or ".p ==" in reasons[-1], reasons
