"""The callbacks that bridge to other methods, in YAML: trained, inspected and measured by the command."""

import json

import pytest
import torch
from fits import Classifier, make_loader
from lightning import LightningDataModule

from lightning_dropreg.cli import main


class Unknown(Classifier):
    """Two dropout sites and a loss that nobody knows."""

    def __init__(self, known: bool = True):
        super().__init__(dtype=torch.float32)
        self.net.insert(0, torch.nn.Dropout(0.2))
        self.known = known

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.known else loss**2


class Rows(LightningDataModule):
    def train_dataloader(self):
        return make_loader(dtype=torch.float32)


CONFIG = """
model: {{class_path: test_bridges.Unknown, init_args: {{known: {known}}}}}
data: test_bridges.Rows
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_dropreg.{name}
      init_args: {options}
"""
CALLBACKS = {
    "full": ("ExplicitPenalty", "{curvature: full, strength: 0.5}", "false", "3 forward passes, one without noise"),
    "r_drop": ("RDrop", "{alpha: 0.5}", "true", "how they disagree (R-Drop)"),
    "last": ("MiniBatchDropout", "{k: 4, sites: last}", "true", "up to the last dropout site"),
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.filterwarnings("ignore::lightning_dropreg.errors.UnboundedPenaltyWarning")
def test_in_yaml(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where fit leaves its configuration
    callback, options, known, told = CALLBACKS[name]
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(name=callback, options=options, known=known))
    assert main(["inspect", "--config", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    [outlook] = found["plans"]
    assert not found["problems"]
    assert not outlook["refused"]
    assert any(told in sentence for sentence in outlook["plan"])
    assert outlook["values"]["norm of the gradient"] > 0
    assert main(["fit", "--config", str(path)]) == 0


def test_what_an_unknown_loss_is_in_the_way_of(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(name="RDrop", options="{alpha: 0.5}", known="false"))
    assert main(["inspect", "--config", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert "not a weighted sum" in found["problems"][0]
    assert found["plans"][0]["refused"]
