"""Which losses are given what comes right out of a dropout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning_dropreg.auditing.calls import Call, LossCall

__all__ = ["on_outputs"]

# what changes the shape of an output, or its form, and not what it says
_PASSING = re.compile(r"View|Reshape|Transpose|Permute|Squeeze|^T$|Copy|Clone|Alias|Softmax|Sigmoid|Slice|Select")


def on_outputs(losses: Sequence[LossCall], calls: Sequence[Call]) -> list[tuple[LossCall, Call]]:
    """Walk back in the graph from the first argument of each loss to the dropout that made it, if one did.

    Args:
        losses: The losses, while their graph is alive.
        calls: The dropouts.

    Returns:
        The losses that are given what comes out of a dropout, and that dropout.
    """
    made = {call.after.node: call for call in calls if call.after is not None}
    found = []
    for loss in losses:
        node: Any = loss.node
        while node is not None and node not in made and _is_passing(node) and node.next_functions:
            node = node.next_functions[0][0]
        if node in made:
            found.append((loss, made[node]))
    return found


def _is_passing(node: Any) -> bool:
    name = re.sub(r"Backward\d*$", "", node.name().lstrip("_"))
    return bool(_PASSING.search(name))
