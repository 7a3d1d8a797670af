"""Whatever a batch is made of: every container is built anew, nothing else is, and it stays what it was."""

import threading
import types
from collections import OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lightning_dropreg.passes.batches import batch_tensors, fresh_batch, map_batch, walk_batch


@dataclass
class Rows:
    x: Any
    y: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


class Named(NamedTuple):
    x: Any
    y: Any


class Guarded(dict):
    """A dict whose own methods are nobody's business."""

    def __init__(self, x):
        super().__init__(x=x)
        self.extra = x

    def __setitem__(self, key, value):
        raise RuntimeError("not through here")


class Slots:
    __slots__ = ("__hidden", "x")

    def __init__(self, x):
        self.x, self.__hidden = x, x + 1


class Wants:
    """A constructor with arguments, and a handle that cannot be copied."""

    def __init__(self, x, lock):
        self.x, self.lock = x, lock


def graph(x):
    pyg = pytest.importorskip("torch_geometric.data")
    return pyg.Data(x=x, edge_index=torch.tensor([[0, 1], [1, 0]]))


def graphs(x):
    pyg = pytest.importorskip("torch_geometric.data")
    return pyg.Batch.from_data_list([graph(x), graph(x + 1)])


def mixed_graph(x):
    pyg = pytest.importorskip("torch_geometric.data")
    data = pyg.HeteroData()
    data["a"].x = x
    data["a", "to", "a"].edge_index = torch.tensor([[0, 1], [1, 0]])
    return data


MAKES = {
    "dict": lambda x: {"x": x},
    "ordered dict": lambda x: OrderedDict(x=x),
    "defaultdict": lambda x: defaultdict(list, x=x),
    "deque": lambda x: deque([x], maxlen=2),
    "named tuple": lambda x: Named(x, [x + 1]),
    "dataclass": lambda x: Rows(x, {"y": x + 1}),
    "frozen dataclass with slots": Frozen,
    "UserDict": lambda x: UserDict(x=x),
    "namespace": lambda x: types.SimpleNamespace(x=x),
    "subclass of dict": Guarded,
    "slots": Slots,
    "plain object": lambda x: Wants(x, threading.Lock()),
    "packed sequence": lambda x: torch.nn.utils.rnn.pack_sequence([x]),
    "BatchEncoding": lambda x: pytest.importorskip("transformers").BatchEncoding({"x": x}),
    "graph": graph,
    "graphs": graphs,
    "mixed graph": mixed_graph,
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("tensors", [False, True])
def test_copy(make, tensors):
    batch = make(torch.arange(4.0).reshape(2, 2))
    copied = fresh_batch(batch, tensors)
    assert type(copied) is type(batch)
    assert copied is not batch
    ours, theirs = batch_tensors(copied), batch_tensors(batch)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)
        assert (a is b) == (not tensors)
    assert [path for path, _ in walk_batch(copied)] == [path for path, _ in walk_batch(batch)]
    before = [b.clone() for b in theirs]
    for a in ours if tensors else ():
        a.add_(1)
    assert all(map(torch.equal, theirs, before))


def test_what_is_assigned_in_a_copy_stays_there():
    for batch in (Rows(torch.ones(2), 1), graph(torch.ones(2, 2)), graphs(torch.ones(2, 2))):
        copied = fresh_batch(batch, tensors=False)
        copied.x = torch.zeros(1)
        assert batch.x.any()
        assert not copied.x.any()


def test_arrays_are_copied():
    batch = {"x": np.ones(3), "text": bytearray(b"a")}
    copied = fresh_batch(batch, tensors=False)
    copied["x"] += 1
    copied["text"] += b"b"
    assert batch["x"].sum() == 3
    assert batch["text"] == b"a"


def test_the_same_object_in_several_places_stays_the_same():
    x = torch.ones(2)
    batch = Rows(x, [x])
    batch.me = batch
    copied = fresh_batch(batch, tensors=True)
    assert copied.x is copied.y[0]
    assert copied.x is not x
    assert copied.me is copied


def test_what_is_no_data_is_shared():
    lock, net, rng = threading.Lock(), torch.nn.Linear(1, 1), np.random.default_rng(0)
    batch = {"lock": lock, "net": net, "rng": rng, "set": {1}, "call": len, "kind": Rows, "thread": threading.Thread()}
    copied = fresh_batch(batch, tensors=True)
    assert all(copied[k] is v for k, v in batch.items() if k != "set")
    assert copied["set"] == {1}
    assert copied["set"] is not batch["set"]


def test_containers_can_be_exchanged_as_a_whole():
    def first(value):
        return value[:1] if isinstance(value, (list, torch.Tensor)) else NotImplemented

    cut = map_batch(first, {"rows": Rows(torch.arange(3), ["a", "b"]), "n": 3})
    assert cut["rows"].x.tolist() == [0]
    assert cut["rows"].y == ["a"]
    assert cut["n"] == 3


def test_places_are_named():
    batch = {"a": Rows([1], Named(2, 3)), "b": UserDict(c=4)}
    assert dict(walk_batch(batch)) == {"['a'].x[0]": 1, "['a'].y.x": 2, "['a'].y.y": 3, "['b'].data['c']": 4}
