"""Every row of the paper's LSTM and QRNN experiments that ships, for two batches of a tiny model on a tiny text."""

import pytest
import yaml
from commands import BRIEF, CONFIGS, OPTIONS
from texts import write_text

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.session.base import RegularizerCallback

pytestmark = pytest.mark.usefixtures("elsewhere")

ROWS = [
    row
    for folder in ("paper", "small")
    for kind in ("ptb", "wt2", "qrnn")
    for row in sorted((CONFIGS / folder).glob(f"{kind}_*.yaml"))
]
# Files are a base and a row; these meet every base and every row. The rest is for  pytest -m slow.
QUICK = [row for row in ROWS if row.parent.name == "small" or row.stem in {"ptb_dropout_16", "ptb_dropout_32"}]
QUICK += [CONFIGS / "paper/wt2_r_approx_xi.yaml", CONFIGS / "paper/qrnn_dropout_1.yaml"]


@pytest.mark.parametrize(
    "config",
    [pytest.param(row, marks=[] if row in QUICK else pytest.mark.slow) for row in ROWS],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_row_trains(config):
    write_text("text")
    cli = DropregCLI(["fit", "--config", str(config), *BRIEF, *OPTIONS, "--test_after_fit=false"])
    assert cli.trainer.global_step == 2
    k, source, curvature = _plan(cli.trainer)
    name = config.stem.partition("_")[2]  # the file does what its name says
    draws = int(name.split("_")[1]) if name.startswith("dropout") else 1
    assert k == (draws if draws > 1 else None)
    assert source == ("dropout" if name.endswith("_noise") else "taylor" if name.endswith("_xi") else None)
    curvatures = {"identity": "identity", "loss_jacobian": "loss_jacobian", "r_approx": "loss_hessian"}
    assert curvature == curvatures.get(name.removesuffix("_xi"))


def _plan(trainer):
    for callback in trainer.callbacks:
        if isinstance(callback, RegularizerCallback):
            made = callback.plan(trainer)
            return made.k, made.noise and made.noise.source, made.penalty and made.penalty.curvature
    return None, None, None


def test_a_model_and_its_data_agree_in_every_base():
    """Options that stand in two places of a file must not drift apart."""
    for base in (CONFIGS / "bases").glob("*.yaml"):
        content = yaml.safe_load(base.read_text())
        model, data = (content.get(part, {}).get("init_args", {}) for part in ("model", "data"))
        for key in {"window", "vocab_size"} & (model.keys() | data.keys()):
            assert model[key] == data[key], (base, key)
