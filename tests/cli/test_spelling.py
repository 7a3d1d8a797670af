"""A typo in any key of any shipped configuration is reported with the key that was meant."""

from pathlib import Path

import pytest
import yaml

from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.errors import InvalidArgumentError

CONFIGS = Path(__file__).parents[2] / "configs"


def keys(node, path=(), kind=None):
    """Every key of a configuration with the path to it and the class it belongs to."""
    if isinstance(node, dict):
        kind = node.get("class_path", kind)
        for key, value in node.items():
            yield (*path, key), kind
            yield from keys(value, (*path, key), kind)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from keys(value, (*path, index), kind)


def every_key():
    """One place for each (class, key): the same key of the same class is read by the same parser."""
    seen = {}
    for file in sorted(CONFIGS.rglob("*.yaml")):
        for path, kind in keys(yaml.safe_load(file.read_text(encoding="utf-8"))):
            where = tuple(part for part in path if isinstance(part, str))
            seen.setdefault((kind, where), (file, path))
    return list(seen.values())


@pytest.fixture(scope="module")
def parser():
    """The parser of ``fit``, built once; nothing is instantiated."""

    class Stop(Exception):
        pass

    class Parsing(DropregCLI):
        def parse_arguments(self, parser, args):
            raise Stop(parser)

    with pytest.raises(Stop) as stopped:
        Parsing(["fit"])
    return stopped.value.args[0]


def misspelt(key):
    """Swap the last two letters, or double the only one."""
    if len(key) == 1 or key[-2:] == key[-1] * 2:
        return key + key[-1]
    return f"{key[:-3]}{key[-2]}{key[-3]}+" if key.endswith("+") else f"{key[:-2]}{key[-1]}{key[-2]}"


@pytest.mark.parametrize(
    ("file", "path"), every_key(), ids=lambda v: v.stem if isinstance(v, Path) else ".".join(map(str, v))
)
def test_a_typo_is_reported_with_the_nearest_key(file, path, parser, tmp_path, capsys):
    whole = str(CONFIGS / "quickstart.yaml")  # some files are made to be put on top of another
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "base" in config:
        config["base"] = str(file.parent / config["base"])
    node = config
    for part in path[:-1]:
        node = node[part]
    key = path[-1]
    wrong = misspelt(key)
    node[wrong] = node.pop(key)
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with pytest.raises((SystemExit, InvalidArgumentError)) as done:
        parser.parse_args(["fit", "--config", whole, "--config", str(tmp_path / "typo.yaml")])
    told = str(done.value) if isinstance(done.value, InvalidArgumentError) else capsys.readouterr().err
    assert wrong in told
    assert told.partition("Did you mean '")[2].partition("'?")[0].rpartition(".")[2] == key.rstrip("+")
    assert len(told.splitlines()) < 16
