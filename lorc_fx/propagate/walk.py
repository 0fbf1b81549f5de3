"""Two models at once through one graph: the dense one, and what is known of the compressed one.

A ``Track`` is one question: which sites are coded, and until where. Only nodes that depend on a coded site are in it;
all others are exact. Each node has a bound (``Known``) and, in the same arithmetic, the compressed model's value, so
that every bound can be held against what it bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from lorc_fx import bounds
from lorc_fx.compat import written_arguments

from .coded import Coding, cache_axes, flat, projected, projected_value, unprojected, unprojected_value
from .known import Known
from .products import attention_weights
from .rounding import rounded, rounds
from .rules import CASTS, RULES, Call

aten = torch.ops.aten
RAW = {aten.embedding.default}
"""Ops whose tensors are taken in their own dtype: a table of embeddings in fp64 would be most of the memory."""


@dataclass(eq=False)
class Track:
    """``codings`` by site node; ``until``: the last node of it (None: all). ``known`` and ``values`` hold what
    depends on a coded site. ``rounds``: as a machine computes it, in the dtypes of the graph. ``sites``: of each
    site's y as it is read back, bound and error, per token [N]. ``unbounded``: ops that have no rule, in order.
    ``done``: ``until`` was reached."""

    codings: dict[Node, Coding]
    until: Node | None = None
    known: dict[Node, Any] = field(default_factory=dict)
    values: dict[Node, Any] = field(default_factory=dict)
    sites: dict[Node, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    unbounded: list[str] = field(default_factory=list)
    done: bool = False
    rounds: bool = False

    def depends(self, node: Node) -> bool:
        return not self.done and (node in self.codings or self.takes(node))

    def takes(self, node: Node) -> bool:
        """Whether what is known of a node may be other than its dense value."""
        return self.rounds or any(n in self.known for n in node.all_input_nodes)

    def measured(self, node: Node, dense: torch.Tensor) -> torch.Tensor:
        """|v' - v| at a node, entry by entry."""
        value = self.values.get(node, dense)
        return (value - dense).abs()


class Walker:
    """``codings`` of one graph; ``arguments``: its inputs. All in fp64 on the CPU."""

    def __init__(self, gm: GraphModule, codings: Sequence[Coding], arguments: Sequence[Any]) -> None:
        self.gm, self.codings = gm, codings
        self.dense: dict[Node, Any] = {}
        self.arguments = list(arguments)
        self.kept: set[Node] = {
            n
            for c in codings
            for region in (c.site.rows.chain, c.site.rows.epilogue)
            for n in (*(m for m, _ in region.nodes), *region.inputs, c.site.rows.x, c.site.rows.y)
        }

    def run(
        self, tracks: Iterable[Track], visit: Callable[[Node, Walker], None] | None = None, keep: Iterable[Node] = ()
    ) -> None:
        """Walk the graph. ``visit`` sees each node after its values are known; what nobody reads any more is dropped,
        ``keep`` aside."""
        tracks, kept = list(tracks), self.kept.union(keep)
        nodes = list(self.gm.graph.nodes)
        last = {n: node for node in nodes for n in node.all_input_nodes}
        given = iter(self.arguments)
        for node in nodes:
            if node.op == "placeholder":
                self.dense[node] = _on_cpu(next(given))
            elif node.op == "get_attr":
                self.dense[node] = _on_cpu(getattr(self.gm, str(node.target)))
            elif node.op == "call_function":
                self.dense[node] = compute(node, self.dense)
                for track in tracks:
                    self._track(track, node)
            if visit is not None:
                visit(node, self)
            for n in node.all_input_nodes:
                if last[n] is node and n not in kept:
                    self._drop(n, tracks)

    def _drop(self, node: Node, tracks: list[Track]) -> None:
        self.dense.pop(node, None)
        for track in tracks:
            track.known.pop(node, None)
            track.values.pop(node, None)

    def _track(self, track: Track, node: Node) -> None:
        if not track.depends(node):
            return
        self._step(track, node)
        if node in track.codings:
            self._coded(track, track.codings[node])
        track.done = node is track.until

    def _step(self, track: Track, node: Node) -> None:
        """One node of a track, from its inputs there."""
        if not track.takes(node):
            return
        value, inexact = self.dense[node], any(n in track.known for n in node.all_input_nodes)
        if any(n in track.values for n in node.all_input_nodes):
            track.values[node] = compute(node, Layered(track.values, self.dense))
        if not any(isinstance(v, torch.Tensor) and _floating(v) for v in tree_leaves(value)):
            if inexact:  # integers and flags: nothing is known of them
                track.unbounded.append(str(node.target))
                track.known[node] = tree_map(_unknown, value)
            return
        made = self._known(track, node, value) if inexact else Known(value)
        if track.rounds and rounds(node):
            made = rounded(node.target, node.meta["val"].dtype, self._given(track, node), made)
        if not isinstance(made, Known) or not made.exact:
            track.known[node] = made

    def linearised(self, track: Track, node: Node) -> torch.Tensor | None:
        """``bounds.linearised_output_error`` of an attention whose keys and values this track knows, [.., S, 1]; None
        where the node is no product of weights and values."""
        values = Layered(track.values, self.dense)
        if node.target is aten.scaled_dot_product_attention.default:
            both = [
                attention_weights(tree_map(_double, bound(node, *arguments(node, at))))
                for at in (self.dense.__getitem__, values.__getitem__)
            ]
        elif node.target in (aten.matmul.default, aten.bmm.default):
            both = [tuple(_double(at[n]) for n in node.args) for at in (self.dense, values)]  # type: ignore[index]
        else:
            return None
        (p, v), (p_, v_) = both
        if p.dim() != v.dim() or not torch.allclose(p.sum(-1), torch.ones((), dtype=p.dtype)):
            return None
        change = torch.where((p > 0) & (p_ > 0), p_.log() - p.log(), 0.0)
        return bounds.linearised_output_error(p, v, change, v_ - v)[..., None]

    def _known(self, track: Track, node: Node, value: Any) -> Any:
        rule = RULES.get(node.target)
        made = None
        if rule is not None:
            dtype = node.meta["val"].dtype if track.rounds and rounds(node) else None
            made = rule(Call(node.target, self._given(track, node), value, with_first(node, self.dense), dtype))
        if made is None:
            track.unbounded.append(str(node.target))
            made = tree_map(_unknown, value)
        return made

    def _given(self, track: Track, node: Node) -> dict[str, Any]:
        """Arguments by name; tensors as Known."""

        def of(n: Node) -> Any:
            if n in track.known:
                return track.known[n]
            return tree_map(lambda v: Known(_double(v)) if isinstance(v, torch.Tensor) else v, self.dense[n])

        return bound(node, *arguments(node, of))

    def _coded(self, track: Track, c: Coding) -> None:
        """Put what is read back in the place of a site's value, in this track."""
        site, node = c.site, c.site.node
        own = track.known.get(node, Known(self.dense[node]))
        value = track.values.get(node, self.dense[node])
        if site.unprojected:
            track.known[node], error = unprojected(c, own)
            track.values[node] = unprojected_value(c, value)
            lost = flat(track.values[node] - value, cache_axes(site))
            track.sites[node] = error.whole[:, 0], lost.norm(dim=-1)
            return
        rows = site.rows
        x = track.known.get(rows.x, Known(_double(self.dense[rows.x])))
        y = track.known.get(rows.y, Known(self.dense[rows.y]))
        inner = Track({}, rounds=track.rounds)
        inner.known[rows.y], error = projected(c, x, y, track.rounds)
        x_value = track.values.get(rows.x, self.dense[rows.x])
        y_value = track.values.get(rows.y, self.dense[rows.y])
        inner.values[rows.y] = projected_value(c, _double(x_value), y_value)
        lost = flat(inner.values[rows.y] - y.value, rows.y_axes)
        track.sites[node] = error.whole[:, 0], lost.norm(dim=-1)
        for n in rows.epilogue.inputs:  # what else the epilogue reads of this track
            if n is not rows.y and n in track.known:
                inner.known[n], inner.values[n] = track.known[n], track.values[n]
        for n, _ in rows.epilogue.nodes:
            if n is not rows.y:
                self._step(inner, n)
        track.unbounded += inner.unbounded
        track.known[node], track.values[node] = inner.known[node], inner.values[node]


class Layered:
    """Values of a track over the dense ones."""

    def __init__(self, first: dict[Node, Any], second: dict[Node, Any]) -> None:
        self.first, self.second = first, second

    def __getitem__(self, node: Node) -> Any:
        return self.first[node] if node in self.first else self.second[node]


def _unknown(value: torch.Tensor) -> Known:
    return Known(value, torch.full(value.shape, torch.inf, dtype=torch.float64))


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _floating(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _here(value: Any) -> Any:
    """As ``_double``; what an op is told to make on a device it makes on the CPU."""
    return torch.device("cpu") if isinstance(value, torch.device) else _double(value)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compute(node: Node, values: Any) -> Any:
    """The op of a node in fp64: casts between floating dtypes do nothing."""
    return _call(node, *arguments(node, lambda n: values[n]))


def arguments(node: Node, of: Callable[[Node], Any]) -> tuple[Any, Any]:
    """Its args and kwargs, with what ``of`` says in the place of nodes. An rms_norm that names no eps has the one that
    torch takes for the dtype of the graph, which fp64 would change."""
    args, kwargs = map_arg(node.args, of), map_arg(node.kwargs, of)
    if node.target is aten.rms_norm.default and (args[3] if len(args) > 3 else kwargs.get("eps")) is None:
        return args[:3], {**kwargs, "eps": torch.finfo(bounds.accumulated(node.meta["val"].dtype)).eps}
    return args, kwargs


def with_first(node: Node, values: Any) -> Callable[[torch.Tensor], Any]:
    """The op as a function of its first tensor. The others are those of now: what nobody reads any more is
    dropped."""
    args, kwargs = arguments(node, lambda n: values[n])
    return lambda first: _call(node, [first, *args[1:]], kwargs)


def _call(node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    if target in RAW:
        return tree_map(_double, target(*args, **kwargs))
    args, kwargs = tree_map(_here, list(args)), tree_map(_here, dict(kwargs))
    first = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if first is not None and first.is_floating_point():
        kind = node.meta.get("val")
        if target in CASTS and isinstance(kind, torch.Tensor) and kind.is_floating_point():
            return first
        args = [None if isinstance(a, torch.dtype) and a.is_floating_point else a for a in args]
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs.pop("dtype")
    for written in written_arguments(target, args, kwargs):  # by this walk alone: others go on with what was there
        args = [a.clone() if a is written else a for a in args]
    return tree_map(_double, target(*args, **kwargs))


def bound(node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names in the op's schema, with its defaults."""
    if node.target is operator.getitem:
        return {"self": args[0], "item": args[1]}
    target: Any = node.target
    given = {a.name: a.default_value for a in target._schema.arguments}
    given.update(zip((a.name for a in target._schema.arguments), args, strict=False))
    return {**given, **kwargs}
