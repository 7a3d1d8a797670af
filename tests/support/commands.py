"""Configurations that ship, and options that make a run of one short."""

import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
TWO = [f"--trainer.limit_{split}_batches=2" for split in ("train", "val", "test", "predict")]
TWO += ["--trainer.max_epochs=1"]
BRIEF = [*TWO, "--model.embedding_dim=12", "--model.hidden_dim=12"]
TINY = {
    "trainer": {"accelerator": "cpu", "enable_progress_bar": "false", "logger": "false"},
    "model": {"vocab_size": 30, "window": 12, "num_layers": 1},
    "data": {
        "vocab_size": 30, "window": 12, "train_fraction": 1, "batch_size": 2, "eval_batch_size": 1, "root": "text",
    },
}  # fmt: skip
OPTIONS = [f"--{group}.{key}={value}" for group, options in TINY.items() for key, value in options.items()]

OWN_MODEL = """
import lightning as L, torch, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
import lightning_dropreg as dr
class Data(L.LightningDataModule):
    def make(self): return DataLoader(TensorDataset(torch.arange(64.).view(16, 4) % 5 / 5, torch.arange(16) % 3), 8)
    train_dataloader = val_dataloader = test_dataloader = make
class Net(L.LightningModule):
    def __init__(self, drop_prob: float = 0.3):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(drop_prob), torch.nn.Linear(8, 3))
    def step(self, b, name):
        self.log(name, loss := F.cross_entropy(self.net(b[0]), b[1]))
        return loss
    def training_step(self, b, i): return self.step(b, "train_loss")
    def validation_step(self, b, i): self.step(b, "val_loss")
    def test_step(self, b, i): self.step(b, "test_loss")
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
class Own(dr.ExplicitPenaltyMixin, Net):
    explicit_penalty = {"strength": 5.0}
"""


def printed_json(capsys: pytest.CaptureFixture[str]) -> object:
    out = capsys.readouterr().out
    return json.loads(out[min(out.index(bracket) for bracket in "[{" if bracket in out) :])
