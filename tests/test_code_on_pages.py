"""The code on the pages runs as it stands. What is the reader's own (a net, a loader, …) is made here."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "tutorials")]
BLOCKS = [
    pytest.param(
        found[1], found[2], id=f"{page.relative_to(ROOT)}:{page.read_text()[: found.start()].count(chr(10)) + 1}"
    )
    for page in PAGES
    for found in re.finditer(r"^```(python|yaml)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    if ">>>" not in found[2]  # doctests, with what they print: tests/audit/test_clean_models.py
]


class _Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = _net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Trainer(L.Trainer):
    """As the pages make it, but for one short epoch in one process, and without files."""

    def __init__(self, **options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        one = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_epochs": 1, "max_steps": 2}
        super().__init__(**options | quiet | one)

    def fit(self, model, data, ckpt_path=None):
        super().fit(model, data)  # the checkpoint is the reader's, too


def _net():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def _of_the_reader():
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    net, loader = _net(), DataLoader(TensorDataset(x, y), batch_size=8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    own = {
        "x": x,
        "y": y,
        "net": net,
        "model": _Model(),
        "optimizer": optimizer,
        "loader": loader,
        "datamodule": loader,
    }
    return own | {"n": 2, "accumulating": True, "fabric": Fabric(accelerator="cpu", devices=1)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_the_code_of_a_page_runs(language, code, monkeypatch):
    if language == "yaml":
        assert isinstance(yaml.safe_load(code), dict)
        return
    torch.manual_seed(0)
    own = _of_the_reader()
    if "accelerator." in code:
        from accelerate import Accelerator

        own["accelerator"] = Accelerator(cpu=True)
    monkeypatch.setattr(L, "Trainer", _Trainer)
    own["trainer"] = _Trainer()
    exec(compile(code, "<page>", "exec"), own)
