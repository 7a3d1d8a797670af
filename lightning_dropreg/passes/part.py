"""One compiled part of a model: its calls in passes, and the comparison of its graph with what it does uncompiled."""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.errors import CompiledPartError, CompiledPartWarning
from lightning_dropreg.interception.checkpointing import compiled, uncompiled
from lightning_dropreg.interception.mode import Interception, marks_constants
from lightning_dropreg.interception.sites import TraceableRule
from lightning_dropreg.interception.traced import Met, Traced, entered, hand_back
from lightning_dropreg.losses import Loss
from lightning_dropreg.numerics.context import patched
from lightning_dropreg.numerics.torch_private import (
    active_modes,
    can_trace_modes,
    dynamo_counts,
    modes_aside,
    recompile_limits,
)
from lightning_dropreg.passes.batches import batch_tensors, map_batch
from lightning_dropreg.passes.isolation import Isolation

__all__ = ["Part"]

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE = 0.2  # of what has fewer digits
_SIZES = 2  # a graph for the first sizes, and one for all
_SURPRISES = 4
_NEAR = 50  # nodes between a tensor and the graph that made it
_BREAKS = {
    "Skip calling `torch.compiler.disable()`d function": "losses, and what else is not to be compiled",
    "Attempted to wrap RNN, GRU, or LSTM": "recurrent layers",
    "TorchDynamo purposely graph breaks on RNN, GRU, LSTMs": "recurrent layers",  # torch 2.6
}
"""Torch's reasons for breaking a graph, in plain words."""
_with_graphs: set[str] = set()
"""What modules are like of which torch has made a graph; those that are alike share it."""
_breaks_of: defaultdict[str, set[str]] = defaultdict(set)
"""Why graphs of modules like these break, which torch says of the first one only."""


class Part:
    """One compiled part.

    Args:
        name: Its path.
        module: The module that is compiled, or that compiling has wrapped around it.

    Attributes:
        refused: Why it runs uncompiled; None while it does not.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.refused: str | None = None
        self._attribute = "_compiled_call_impl" if module.__dict__.get("_compiled_call_impl") else "forward"
        self._call: Callable[..., Any] = module.__dict__[self._attribute]
        self._known: dict[Any, list[Any]] = {}
        self._sizes: dict[Any, set[Any]] = {}
        self._counts: dict[Any, int] = {}
        self._surprises = 0
        self._asks_callers = False
        part = self

        @functools.wraps(self._call)
        def called(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # as a piece of another part
                return part._call(*args, **kwargs)
            return part.call(args, kwargs)

        self._called = called  # the same object always: graphs around it are guarded by that

    def in_passes(self) -> AbstractContextManager[None]:
        """Be called by way of `call`."""
        self._call = self.module.__dict__[self._attribute]
        return patched((self.module, self._attribute, self._called))

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what a call of the module means within the pass that is running, if one is.

        Args:
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            What the module returns.

        Raises:
            CompiledPartError: If its graph has met other sites than those known.
        """
        if not can_trace_modes():
            with uncompiled():
                return self._call(*args, **kwargs)
        modes = [mode for mode in active_modes() if isinstance(mode, (Interception, Traced))]
        if not modes or isinstance(modes[-1], Traced):
            return self._call(*args, **kwargs)
        mode = modes[-1]
        rule = mode.rule.traced(0, 0) if isinstance(mode.rule, TraceableRule) and _is_plain(mode) else None
        if rule is None or self.refused is not None:
            with uncompiled():
                return self._call(*args, **kwargs)
        kind, sizes = self._kind_of(mode, args, kwargs)
        if kind not in self._known or (len(self._sizes[kind]) < _SIZES and sizes not in self._sizes[kind]):
            self.refused = self._compared(mode, kind, args, kwargs)
            self._sizes.setdefault(kind, set()).add(sizes)
            if self.refused is not None:
                self._warn()
                return self.call(args, kwargs)
        traced = self._traced(mode, mode.position, kind)
        try:
            with modes_aside(Interception), compiled(), entered(traced):
                output = self._call(*args, **kwargs)
        except recompile_limits() as error:
            self.refused = f"torch compiles it anew for every pass ({error}); later releases do not."
            self._warn()
            return self.call(args, kwargs)
        if _structure(traced.sites) not in self._known[kind]:
            raise CompiledPartError(
                f"{self._path} met other dropout sites in its graph than when it was compared with itself uncompiled: "
                f"{', '.join(met.kind for met in traced.sites) or 'none'}. Train it uncompiled.",
                self.name,
            )
        hand_back(traced, mode, _node_of(traced.losses, output))
        return output

    @property
    def runs_compiled(self) -> bool:
        """Whether it has run in its graph in passes so far."""
        return self.refused is None and bool(self._known) and self._made_like in _with_graphs

    def told(self) -> str:
        """Say how the part has run in passes so far."""
        if self.refused is not None:
            return f"{self._path} runs uncompiled: {self.refused}"
        if not self._known:
            return f"{self._path} runs uncompiled: these passes ask what no graph can answer."
        breaks = "; ".join(sorted(_breaks_of[self._made_like]))
        if not self.runs_compiled:
            return f"{self._path} runs uncompiled: torch has made no graph of it ({breaks or 'nothing to compute'})."
        sites = {len(structure) for structures in self._known.values() for structure in structures}
        count = "1 dropout site" if sites == {1} else f"{' or '.join(map(str, sorted(sites)))} dropout sites"
        told = f"{self._path} runs compiled, with {count} in it"
        return f"{told}; outside the graph: {breaks}." if breaks else f"{told}."

    def surprised(self) -> None:
        """Compare again with what the part does uncompiled, after a `CompiledPartError`; give up after a few times."""
        self._surprises += 1
        self._sizes = {kind: set() for kind in self._sizes}
        if self._surprises == _SURPRISES:
            self.refused = "it meets other dropout sites in its graph from call to call."
            self._warn()

    def _warn(self) -> None:
        text = f"{self._path} was compiled by torch.compile and runs uncompiled in training: {self.refused}"
        warnings.warn(text, CompiledPartWarning, stacklevel=3)

    @property
    def _made_like(self) -> str:
        return repr(getattr(self.module, "_orig_mod", self.module))

    @property
    def _path(self) -> str:
        return self.name.removesuffix("._orig_mod") or "The module itself"

    def _traced(self, mode: Interception, first: int, kind: Any) -> Traced:
        assert isinstance(mode.rule, TraceableRule)
        rule = mode.rule.traced(first, self._counts[kind])
        assert rule is not None
        return Traced(rule, first, mode.record_losses, mode.ignores_attention, self._asks_callers)

    def _kind_of(self, mode: Interception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        tensors = batch_tensors((args, kwargs))
        kind = (
            type(mode.rule), mode.record_losses, mode.ignores_attention, self.module.training, torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
            tuple((t.dtype, t.ndim, t.device.type, t.requires_grad) for t in tensors),
        )  # fmt: skip
        return kind, tuple(t.shape for t in tensors)

    def _compared(self, mode: Interception, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Call the part aside, uncompiled and compiled; say what is different, None if nothing is."""
        rule = mode.rule
        assert isinstance(rule, TraceableRule)
        options: dict[str, Any] = {"record_losses": mode.record_losses, "lenient": mode.lenient}

        def as_written() -> _Outcome:
            given = _copied((args, kwargs))
            with uncompiled(), Interception(rule.strong(mode.position), **options) as seen:
                output = self._call(*given[0], **given[1])
            sites = [Met(s.p, s.shape, s.mask_shape, s.kind) for s in seen.sites]
            self._counts[kind] = max(len(sites), self._counts.get(kind, 0))
            self._asks_callers = any(site.kind == "stochastic_depth" for site in sites)
            return _Outcome(sites, seen.inactive, seen.losses, output, self._gradients(given, output))

        def in_graph() -> _Outcome:
            given = _copied((args, kwargs))
            with Interception(rule.strong(mode.position), **options) as strong:
                pass
            strong.ignores_attention = mode.ignores_attention
            traced = self._traced(strong, 0, kind)
            before = {counted: dynamo_counts(counted) for counted in ("stats", "graph_break", "unimplemented")}
            with compiled(), entered(traced):
                output = self._call(*given[0], **given[1])
            more = {counted: dynamo_counts(counted) - count for counted, count in before.items()}
            if more["stats"]["unique_graphs"]:
                _with_graphs.add(self._made_like)
            whys = more["graph_break"] | more["unimplemented"]  # where the graph broke, and what was skipped whole
            _breaks_of[self._made_like] |= {_BREAKS.get(why, why) for why in whys}
            sites = [met for met in traced.sites if met.p]
            self._known.setdefault(kind, []).append(_structure(traced.sites))
            inactive = len(traced.sites) - len(sites) + traced.inactive
            return _Outcome(sites, inactive, traced.losses, output, self._gradients(given, output))

        with modes_aside(Interception), Isolation(self.module) as isolation:
            expected = isolation.run(as_written, trace=False)
            try:
                found = isolation.run(in_graph, trace=False)
            except Exception as error:  # whatever a compiler has to say
                return f"it cannot be traced ({type(error).__name__}: {str(error).strip().splitlines()[0]})."
        return expected.differs_from(found)

    def _gradients(self, given: Any, output: Any) -> list[Tensor | None]:
        """Gradients of a random function of the output in parameters and inputs."""
        outputs = [t for t in batch_tensors(output) if t.requires_grad]
        leaves = [t for t in [*self.module.parameters(), *batch_tensors(given)] if t.requires_grad and t.is_leaf]
        if not outputs or not leaves:
            return []
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))


class _Outcome:
    """What a call has met, returned and been differentiated to."""

    def __init__(
        self,
        sites: Sequence[Met],
        inactive: int,
        losses: Sequence[Loss],
        output: Any,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self.sites = [met._replace(in_bfloat16=False) for met in sites]
        self.inactive = inactive
        self.losses = [(loss.name, loss.outputs.detach(), loss.elements.detach()) for loss in losses]
        self.outputs = [t.detach() for t in batch_tensors(output)]
        self.gradients = [None if g is None else g.detach() for g in gradients]

    def _of_losses(self) -> list[Tensor]:
        return [tensor for _, outputs, elements in self.losses for tensor in (outputs, elements)]

    def differs_from(self, other: _Outcome) -> str | None:
        """Say in what `other`, of the compiled part, differs from this; None if in nothing."""
        if self.sites != other.sites or self.inactive != other.inactive:
            met, found = ([f"{m.kind} (p={m.p:g}) on {m.shape}" for m in each.sites] for each in (self, other))
            return f"in the graph other dropout sites are met ({found or 'none'}) than outside ({met or 'none'})."
        names = [name for name, *_ in self.losses], [name for name, *_ in other.losses]
        if names[0] != names[1]:
            return f"in the graph other losses are seen ({names[1] or 'none'}) than outside ({names[0] or 'none'})."
        if not self.outputs:
            return "it returns no tensor, so that it could not be compared with itself uncompiled."
        pairs: list[tuple[str, Sequence[Tensor | None], Sequence[Tensor | None]]] = [
            ("outputs", self.outputs, other.outputs),
            ("losses", self._of_losses(), other._of_losses()),
            ("gradients", self.gradients, other.gradients),
        ]
        floats = [t.dtype for t in self.outputs + self.gradients if t is not None and t.is_floating_point()]
        tolerance = max((_TOLERANCES.get(dtype, _COARSE) for dtype in floats), default=0.0)
        if any(torch.is_autocast_enabled(t.device.type) for t in self.outputs):
            tolerance = _COARSE
        for what, here, there in pairs:
            distance = _distance(here, there)
            if distance > tolerance:
                return f"compiled, its {what} differ from those uncompiled (by {distance:.2g} of their size)."
        return None


def _distance(here: Sequence[Tensor | None], there: Sequence[Tensor | None]) -> float:
    """The largest relative distance of two tensors that belong together."""
    if len(here) != len(there):
        return float("inf")
    distances = [0.0]
    norms = [0.0 if a is None else float(torch.nan_to_num(a.double()).norm()) for a in here]
    least = 1e-3 * max(norms, default=0.0)
    for a, b, norm in zip(here, there, norms, strict=True):
        if a is None or b is None:
            distances += [] if a is b else [float("inf")]
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        same = (a == b) | (a.isnan() & b.isnan())
        apart = float(torch.where(same, 0.0, (a.double() - b.double())).norm())
        distances.append(apart / max(norm, least) if apart else 0.0)
    return max(distances)


def _node_of(losses: Sequence[Loss], output: Any) -> Any:
    """The node in the autograd graph that stands for a part: of its graph, else of a tensor; None for a constant."""
    # what depends on dropout leads through the graph before its losses, or what it returned
    tensors = [loss.outputs for loss in losses] or batch_tensors(output)
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set()
    stack = nodes[:1]
    while stack and len(seen) < _NEAR:
        node = stack.pop()
        if "CompiledFunction" in type(node).__name__:
            return node
        seen.add(node)
        stack += [found for found, _ in node.next_functions if found is not None and found not in seen]
    return nodes[0] if nodes else None


def _structure(sites: Sequence[Met]) -> tuple[Any, ...]:
    """What stays the same of sites when sizes and probabilities change."""
    return tuple((m.kind, tuple(a == b for a, b in zip(m.mask_shape, m.shape, strict=True))) for m in sites)


def _is_plain(mode: Interception) -> bool:
    """Whether a pass asks nothing that only uncompiled code can answer."""
    return not (
        mode.name_sites
        or mode.written_out
        or mode.replacements
        or mode.checkpoints
        or mode.problems is not None
        or marks_constants()
    )


def _copied(given: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of arguments that can be differentiated in and changed."""

    def exchange(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        copy = value.detach().clone()
        return copy.requires_grad_() if value.requires_grad else copy

    return map_batch(exchange, given)  # type: ignore[no-any-return]
