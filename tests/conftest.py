import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers run side by side

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """Leave out what needs a GPU where there is none."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _random_state():
    """Every test starts from the same random state and leaves float32 as the default."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Runs write below the current directory, and a command sets threads and log levels for its process."""
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = torch.get_num_threads(), [logger.level for logger in loggers]
    yield
    torch.set_num_threads(before[0])
    for logger, level in zip(loggers, before[1], strict=True):
        logger.setLevel(level)
