"""Mistakes that people make on the command line: each is told in a few lines, without a traceback."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import CONFIGS

from lightning_dropreg.cli import main

pytestmark = pytest.mark.usefixtures("elsewhere")

QUICKSTART = ["--config", str(CONFIGS / "quickstart.yaml")]
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--test_after_fit", "false"]
FILES = {
    "unclosed.yaml": b"model: [\n  a: b\n c",
    "list.yaml": b"- a\n- b\n",
    "empty.yaml": b"",
    "binary.yaml": b"\xff\xfe\x00model",
    "text.ckpt": b"no checkpoint",
    "empty.ckpt": b"",
    "there.yaml": b"model: x",
    "loop.yaml": b"base: loop.yaml",
    "tab.yaml": b"trainer:\n\tmax_epochs: 3",
    "needs_more.py": b"import not_there",
    "net.py": b"import torch\nclass Net(torch.nn.Module): pass",
}
MISTAKES = {
    "nothing_given": (["fit"], "no model is configured. Give --config FILE"),
    "no_option": (["fit", "mine.yaml"], "mine.yaml: give a configuration by --config mine.yaml."),
    "nothing_to_inspect": (["inspect"], "no model is configured. Give --config FILE"),
    "command": (["fitt"], "there is no command 'fitt'. Did you mean 'fit'?"),
    "no_such_config": (["fit", "--config", "absent.yaml"], "absent.yaml: no such file."),
    "yaml": (["fit", "--config", "unclosed.yaml"], "unclosed.yaml, line 3, column 3: this is no YAML"),
    "list": (["fit", "--config", "list.yaml"], "list.yaml holds a list, not keys with values"),
    "empty": (["inspect", "--config", "empty.yaml"], "empty.yaml holds nothing, not keys with values"),
    "binary": (["fit", "--config", "binary.yaml"], "binary.yaml cannot be read"),
    "trainer_key": (["fit", *QUICKSTART, "--trainer.max_epoch", "3"], "unrecognized arguments: --trainer.max_epoch 3"),
    "model_key": (["fit", *QUICKSTART, "--model.init_args.drop_prop", "0.1"], "Did you mean 'drop_prob'?"),
    "model_value": (["fit", *QUICKSTART, "--model.init_args.drop_prob", "1.5"], "drop_prob=1.5"),
    "model_type": (["fit", *QUICKSTART, "--model.init_args.hidden_dim", "many"], "hidden_dim='many' must be int."),
    "precision": (["fit", *QUICKSTART, "--trainer.precision", "fp7"], "trainer.precision='fp7' must be one of"),
    "accelerator": (["fit", *QUICKSTART, "--trainer.accelerator", "gpux"], "gpux"),
    "devices": (["fit", *QUICKSTART, "--trainer.devices", "0"], "Trainer(devices='0')"),
    "seed": (["fit", *QUICKSTART, "--seed_everything", "x"], "seed_everything='x' must be bool or int."),
    "callback": (["fit", *QUICKSTART, "--trainer.callbacks=lightning_dropreg.ExplicitPenaly"], "ExplicitPenalty"),
    "no_such_class": (["fit", "--model", "lightning_dropreg.Nothing"], "lightning_dropreg.Nothing"),
    "no_such_module": (["fit", "--model", "my_modul.MyModel"], "there is no module 'my_modul', neither installed nor"),
    "needs_more": (["fit", "--model", "needs_more.Net"], "its module cannot be imported: No module named 'not_there'."),
    "no_data": (["fit", *QUICKSTART, "--data=null", *SHORT], "no data is configured"),
    "no_such_checkpoint": (["validate", *QUICKSTART, "--ckpt_path", "absent.ckpt"], "absent.ckpt: there is no such"),
    "no_checkpoint": (["fit", *QUICKSTART, "--ckpt_path", "text.ckpt"], "text.ckpt is no checkpoint: its 13 bytes"),
    "empty_checkpoint": (["diagnose", *QUICKSTART, "--ckpt_path", "empty.ckpt"], "empty.ckpt is no checkpoint"),
    "damaged": (["test", *QUICKSTART, "--ckpt_path", "zip.ckpt"], "the checkpoint cannot be read"),
    "damaged_to_look_at": (["diagnose", *QUICKSTART, "--ckpt_path", "zip.ckpt"], "the checkpoint cannot be read"),
    "sweep": (["diagnose", *QUICKSTART, "--sweep", "2"], "drop_prob=2.0 must be a number in (0, 1)."),
    "methods": (["bench", *QUICKSTART, "--methods=[nothing]"], "nothing"),
    "no_files": (["compare"], "the following arguments are required: FILE"),
    "no_such_file": (["compare", "absent.yaml"], "absent.yaml: no such file."),
    "twice": (["compare", "there.yaml", "there.yaml"], "a configuration file is named twice"),
    "there": (["init", "there.yaml"], "there.yaml is there already"),
    "no_module": (["init", "--model", "MyModel"], "MyModel is no path of a class: write module.Class"),
    "a_file": (["init", "--model", "net.py"], "net.py is no path of a class: write module.Class"),
    "no_lightning": (["init", "--model", "net.Net"], "model: net.Net is no LightningModule."),
    "own_base": (["fit", "--config", "loop.yaml"], "loop.yaml is its own base"),
    "tab": (["fit", "--config", "tab.yaml"], "tab.yaml, line 2, column 1: this is no YAML"),
    "no_number": (
        ["fit", *QUICKSTART, "--trainer.callbacks=ExplicitPenalty", "--trainer.callbacks.strength=high"],
        "strength='high' must be float.",
    ),
    "counted_twice": (
        [
            "fit",
            *QUICKSTART,
            "--trainer.callbacks=[lightning_dropreg.ExplicitPenalty,lightning_dropreg.MiniBatchDropout]",
        ],
        "the penalty would add it once more",
    ),
    "plain_strength": (
        ["compare", str(CONFIGS / "quickstart.yaml"), "--plain", "--vary", "strength=1,2"],
        "vary an argument of the model: ",
    ),
    "one_value": (["compare", str(CONFIGS / "quickstart.yaml"), "--vary", "strength=1"], "two values or more"),
}

PAGE = CONFIGS.parent / "docs" / "mistakes.md"
WRITE = os.environ.get("WRITE_MISTAKES")
if WRITE:
    PAGE.write_text(
        "# Mistakes on the command line\n\nWhat was typed, and the first line of the answer; a test compares this page "
        "with what is printed.\n\n| command | says |\n|---|---|\n"
    )


@pytest.fixture(autouse=True)
def files(elsewhere, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())  # as the process has it
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    with zipfile.ZipFile("zip.ckpt", "w") as archive:
        archive.writestr("something", "else")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_few_lines(mistake, capfd):
    args, told = MISTAKES[mistake]
    try:
        status = main(args)
    except SystemExit as done:
        status = done.code
    printed = "".join(capfd.readouterr())
    assert status in {1, 2}
    assert told in printed
    assert "Traceback" not in printed
    if mistake != "command":  # which is followed by the commands there are
        assert len(printed.splitlines()) <= 6, printed
    assert f"dropreg {args[0]}: dropreg" not in printed
    command = " ".join(["dropreg", *args]).replace(f"{CONFIGS}/", "configs/")
    first = printed.splitlines()[0].replace(f"{CONFIGS}/", "configs/").replace("|", " ").replace("<", "\\<")
    line = f"| `{command}` | {first} |\n"
    line = re.sub(r"Available names are: [^.]*", "Available names are: …", line)  # in any order
    line = re.sub(r"(the checkpoint cannot be read: ).* (Is it whole)", r"\1… \2", line)  # torch's words, by version
    if WRITE:
        with PAGE.open("a") as page:
            page.write(line)
    assert line in PAGE.read_text(), "run  WRITE_MISTAKES=1 pytest -n 0 tests/cli/test_mistakes.py"


def test_an_error_in_the_users_own_code_keeps_its_traceback(monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("mine.py").write_text(
        "import lightning as L\nclass Mine(L.LightningModule):\n  def __init__(s): s.x = {}['y']\n"
    )
    with pytest.raises((KeyError, ValueError)):
        main(["fit", "--model", "mine.Mine"])


@pytest.mark.parametrize("args", [["--help"], ["inspect", *QUICKSTART]])
def test_a_reader_who_has_read_enough(args):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_dropreg", *args], check=False, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "Traceback" not in done.stderr, done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lightning-dropreg 0.1.0, torch ")
