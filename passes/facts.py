"""The walk that applies the rules: what is a cached value, as a function of its token?

    x  --affine chain-->  y  --epilogue-->  rows          (positions and constants feed the epilogue)

``describe`` starts at the rows that a cache write stores and goes backward. ``y`` is the last value that is affine in
one per-token activation ``x`` and through which everything else passes; what follows is the epilogue.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lorc_fx.compat import size_expr, written_nodes
from lorc_fx.decoder import Side

from .axes import Axes, Mixes, arg, dim_of, shape
from .readers import viewed
from .rules import rule_of
from .sides import find_sides, stored

TEACH = "if it keeps tokens apart, teach the matcher so: lorc_fx.register_rule, docs/new_architecture.md"
INSIDE = "let the compiled module compute it from token positions, without a graph break between"
STAYS = "nothing to do: this cache stays dense, and right"


class NoSite(Exception):
    """Why rows are not a site: a node, a reason, and what a user can do about it."""

    def __init__(self, node: Node, reason: str, step: str = STAYS) -> None:
        super().__init__(reason)
        self.node, self.reason, self.step = node, reason, step


@dataclass(frozen=True)
class Region:
    """Nodes in graph order with the axes they have, from some inputs (not contained) to one output (contained)."""

    nodes: tuple[tuple[Node, Axes], ...]
    inputs: dict[Node, Axes]
    output: Node
    output_axes: Axes


@dataclass(frozen=True)
class Rows:
    """What ``describe`` found. ``chain`` goes from x to y, ``epilogue`` from y, positions and constants to the rows.
    ``sides``: what the epilogue reads of each token beside y, kept as ``side`` says (None where that is nothing).
    ``features``: which of y's features the rows depend on, None for all (``epilogue.trimmed_decoder`` finds out)."""

    x: Node
    x_axes: Axes
    y: Node
    y_axes: Axes
    sides: tuple[tuple[Node, Axes], ...]
    side: Side | None
    chain: Region
    epilogue: Region
    contractions: int
    features: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Root:
    node: Node
    axes: Axes
    contractions: int


class Facts:
    """Facts about one graph, memoised: each (node, axes) is looked at once, so the walk is linear in the graph."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.order = {n: i for i, n in enumerate(nodes)}
        self._constants = set[Node]()
        for node in self.order:
            if (
                _is_constant_leaf(node, Axes(None, None))
                or not _is_input(node)
                and self._constants.issuperset(node.all_input_nodes)
            ):
                self._constants.add(node)
        self._roots: dict[tuple[Node, Axes], _Root] = {}
        self._writes: list[int] = []
        self._overwritten: dict[Node, list[int]] = {}  # at which nodes a value, or something it shares storage with, is
        for node, i in self.order.items():
            into = {seen for target in written_nodes(node) for seen in viewed(target)}
            self._writes += [i] if into else []
            for seen in into:
                self._overwritten.setdefault(seen, []).append(i)

    def writes_between(self, first: Node, last: Node) -> bool:
        """Whether the graph writes into anything in place after ``first`` and before ``last``."""
        at = bisect.bisect_right(self._writes, self.order[first])
        return at < len(self._writes) and self._writes[at] < self.order[last]

    def _overwrites(self, value: Node, first: int, last: int) -> bool:
        """Whether ``value``, or what it is a view of, is written in place after node ``first`` and before ``last``."""
        found = [self._overwritten.get(seen, []) for seen in viewed(value)]
        return any(at < len(w) and w[at] < last for w in found for at in [bisect.bisect_right(w, first)])

    def _check_overwritten(self, region: Region, end: Node, as_they_are: set[Node]) -> None:
        """Raises NoSite where a region is not what the graph computes, as a value of it is written in place before
        ``end``. Those ``as_they_are`` are read there and not made anew: what counts is who read them first."""
        last, nodes = self.order[end], {node for node, _ in region.nodes}
        for value in (*nodes, *region.inputs):
            readers = [self.order[user] for user in value.users if user in nodes]
            first = min(readers, default=last) if value in as_they_are else self.order[value]
            if self._overwrites(value, first, last):
                raise NoSite(value, f"`{value.name}` is written in place before it reaches the cache")

    def constant(self, node: Node) -> bool:
        """Whether a value is made of parameters, buffers, constants and sizes only."""
        return node in self._constants

    # -- affine roots -----------------------------------------------------------------------------------------

    def root(self, node: Node, axes: Axes) -> _Root:
        """The earliest activation in which ``node`` is affine (``node`` itself where no rule leads further)."""
        key = (node, axes)
        if key not in self._roots:
            self._roots[key] = self._find_root(node, axes)
        return self._roots[key]

    def _find_root(self, node: Node, axes: Axes) -> _Root:
        here = _Root(node, axes, 0)
        rule = rule_of(node)
        if rule is None or rule.role == "pointwise":
            return here
        try:
            dependent = [(n, a) for n, a in rule.back(node, axes) if a.token is not None]
        except Mixes:
            return here
        if not dependent or (rule.role != "sum" and len(dependent) != 1) or any(_is_integer(n) for n, _ in dependent):
            return here
        if rule.role == "contract" and not _is_activation_side(node, dependent[0][0]):
            return here
        roots = [self.root(n, a) for n, a in dependent]
        if any(r.node is not roots[0].node or r.axes != roots[0].axes for r in roots):
            return here
        depth = max(r.contractions for r in roots) + (rule.role == "contract")
        return _Root(roots[0].node, roots[0].axes, depth)

    # -- regions ----------------------------------------------------------------------------------------------

    def region(self, output: Node, axes: Axes, stops: dict[Node, Axes], leaf: Callable[[Node, Axes], bool]) -> Region:
        """All nodes between ``stops`` (or nodes for which ``leaf`` says True) and ``output``."""
        seen: dict[Node, Axes] = {}
        inputs: dict[Node, Axes] = {}
        stack = [(output, axes)]
        while stack:
            node, at = stack.pop()
            known = stops if node in stops else inputs if node in inputs else seen
            if node in known:
                if known[node] != at and not (known is inputs and None in (known[node].token, at.token)):
                    raise NoSite(node, f"`{node.name}` is used with its tokens along two different axes")
                if node in stops:
                    inputs[node] = at
                continue
            if node in stops or leaf(node, at):
                inputs[node] = at
                continue
            seen[node] = at
            rule = rule_of(node)
            if rule is None:
                if at.token is None and at.batch is None:
                    stack.extend((n, Axes(None, None)) for n in node.all_input_nodes)
                    continue
                raise NoSite(node, f"op `{node.target}` has no rule: what it does to tokens is unknown", TEACH)
            try:
                stack.extend(rule.back(node, at))
            except Mixes as why:
                raise NoSite(node, f"op `{node.target}` {why}") from None
        ordered = sorted(seen, key=self.order.__getitem__)
        return Region(tuple((n, seen[n]) for n in ordered), inputs, output, axes)

    # -- description of rows ----------------------------------------------------------------------------------

    def describe(self, rows: Node, token: int, kept: Side | None = None) -> list[Rows]:
        """Describe ``rows``, whose tokens lie along ``token``, in each way that keeps equally little of a token beside
        y, the best first; raises NoSite with the reason. ``kept``: what the cache that they are written to keeps."""
        rank = len(shape(rows))
        guesses = [b for b in range(rank - 1) if b != token] + [None]
        first: NoSite | None = None
        for batch in guesses:
            try:
                return self._describe(rows, Axes(batch, token), kept)
            except NoSite as why:
                first = first or why
        assert first is not None
        raise first

    def _describe(self, rows: Node, axes: Axes, kept: Side | None) -> list[Rows]:
        boundary = self._boundary(rows, axes)
        if not boundary:
            raise NoSite(rows, "no projection of an activation leads here")
        roots = {(self.root(n, a).node, self.root(n, a).axes) for n, a in boundary.items()}
        if len(roots) > 1:
            names = ", ".join(sorted(f"`{n.name}`" for n, _ in roots))
            raise NoSite(rows, f"it mixes projections of several activations ({names})")
        root, root_axes = roots.pop()
        y, y_axes = _whole(*self._meet(boundary, root))
        if y is root:
            raise NoSite(rows, "it depends on its projections in a way that has no single vector to code")
        x, x_axes = self._trim(y, y_axes, root, root_axes)
        _check_tokens(x, x_axes)
        cuts = find_sides(self, self.region(rows, axes, {y: y_axes}, self._is_side_leaf), y, kept)
        try:
            side = stored(cuts[0])
        except ValueError as why:
            raise NoSite(next(iter(cuts[0])), f"what it reads of each token beside its projection has {why}") from None
        chain = self.region(y, y_axes, {x: x_axes}, _is_constant_leaf)
        _check_constants(chain, {x, y})
        depth = self.root(y, y_axes).contractions
        found = []
        for sides in cuts:
            epilogue = self.region(rows, axes, {y: y_axes, **sides}, _is_constant_leaf)
            _check_constants(epilogue, {x, y, *sides})
            for region in (chain, epilogue):
                self._check_overwritten(region, rows, {x, *sides})
            kept_as = tuple((node, sides[node]) for node in _by_use(epilogue, sides))
            found.append(Rows(x, x_axes, y, y_axes, kept_as, side, chain, epilogue, depth))
        return found

    def _is_side_leaf(self, node: Node, axes: Axes) -> bool:
        """Where the search for what a token needs beside y ends: constants, integers, inputs of the call."""
        known = axes.token is not None and (self.constant(node) or _is_run(node, axes))
        return node.op != "call_function" or _is_integer(node) or known

    def _boundary(self, rows: Node, axes: Axes) -> dict[Node, Axes]:
        """The last affine values on the way back from ``rows``; other ways end at positions and inputs of the call."""
        boundary: dict[Node, Axes] = {}
        seen: set[tuple[Node, Axes]] = set()
        stack = [(rows, axes)]
        while stack:
            node, at = stack.pop()
            if (node, at) in seen or at.token is None:
                continue
            seen.add((node, at))
            if self.root(node, at).contractions:
                boundary[node] = at
            elif not self._is_side_leaf(node, at):
                rule = rule_of(node)
                if rule is None:
                    reason = (
                        f"it depends on a per-token result of `{node.target}` that is neither projected nor a position"
                    )
                    raise NoSite(node, reason, TEACH)
                try:
                    stack.extend(rule.back(node, at))
                except Mixes as why:
                    raise NoSite(node, f"op `{node.target}` {why}") from None
        return boundary

    def _meet(self, front: dict[Node, Axes], root: Node) -> tuple[Node, Axes]:
        """The one node through which all of ``front`` pass: step the latest back until one is left."""
        front = dict(front)
        while len(front) > 1:
            latest = max(front, key=self.order.__getitem__)
            axes = front.pop(latest)
            rule = rule_of(latest)
            if latest is root or rule is None:
                raise NoSite(latest, f"`{latest.name}` and others reach the cache separately")
            try:
                found = [(n, a) for n, a in rule.back(latest, axes) if a.token is not None]
            except Mixes as why:
                raise NoSite(latest, f"op `{latest.target}` {why}") from None
            for node, at in found:
                if front.setdefault(node, at) != at:
                    raise NoSite(node, f"`{node.name}` is used with its tokens along two different axes")
        return next(iter(front.items()))

    def _trim(self, y: Node, y_axes: Axes, root: Node, root_axes: Axes) -> tuple[Node, Axes]:
        """x: the input of the first product with a weight, where all first products share it; else the root."""
        first: dict[Node, Axes] = {}
        stack = [(y, y_axes)]
        seen: set[Node] = set()
        while stack:
            node, at = stack.pop()
            if node in seen or node is root:
                continue
            seen.add(node)
            rule = rule_of(node)
            assert rule is not None
            for source, found in rule.back(node, at):
                if found.token is None:
                    continue
                if rule.role == "contract" and self.root(source, found).contractions == 0:
                    first[source] = found
                else:
                    stack.append((source, found))
        return next(iter(first.items())) if len(first) == 1 else (root, root_axes)


def _by_use(region: Region, nodes: Iterable[Node]) -> list[Node]:
    """In the order in which a region uses them: the same in the graphs of prompt and steps."""
    used = [source for node, _ in region.nodes for source in node.all_input_nodes]
    order = {node: i for i, node in reversed(list(enumerate([*used, region.output])))}
    return sorted(nodes, key=order.__getitem__)


def _whole(node: Node, axes: Axes) -> tuple[Node, Axes]:
    """The value that was cut into pieces, where ``node`` is a list of these."""
    while isinstance(node.meta.get("val"), (list, tuple)):
        rule = rule_of(node)
        assert rule is not None  # it was stepped over to get here
        ((node, axes),) = [(n, a) for n, a in rule.back(node, axes) if a.token is not None]
    return node, axes


def _is_input(node: Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)


def _is_run(node: Node, axes: Axes) -> bool:
    """Whether a value is some tokens of an input of the call: the last cosines of those of all tokens so far."""
    if node.target is not torch.ops.aten.slice.Tensor or dim_of(arg(node, 1, "dim", 0), len(shape(node))) != axes.token:
        return False
    source = node.args[0]
    while isinstance(source, Node) and (rule := rule_of(source)) is not None and rule.role == "layout":
        source = source.args[0]
    return isinstance(source, Node) and _is_input(source)


def _is_activation_side(node: Node, source: Node) -> bool:
    """Whether ``source`` is the left factor of a product (x W, the only side that the codec can take over)."""
    position = 1 if node.target is torch.ops.aten.addmm.default else 0
    return node.args[position] is source


def _is_integer(node: Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _is_constant_leaf(node: Node, axes: Axes) -> bool:
    """Parameters, buffers and graph constants: the same for every call, so no token is in them."""
    return node.op == "get_attr" or (node.op == "placeholder" and bool(node.meta.get("state")))


def _check_tokens(x: Node, axes: Axes) -> None:
    """x must be [tokens and batch..., d], every leading axis known: a latent row is one token of one batch row."""
    leading = set(range(len(shape(x)) - 1))
    lone = {i for i in leading if shape(x)[i] == 1}
    known = {a for a in axes if a is not None}
    if not (leading - lone <= known <= leading) or axes.token is None:
        raise NoSite(x, f"the axes of the activation `{x.name}` are not batch, tokens and features")


def _check_constants(region: Region, known: set[Node | None]) -> None:
    for node in region.inputs:
        if node not in known and not _is_constant_leaf(node, Axes(None, None)):
            raise NoSite(node, f"it depends on `{node.name}`, an input of the call that is no position", INSIDE)
    for node, axes in region.nodes:
        if (
            node.op == "placeholder"
            and not _is_constant_leaf(node, axes)
            and isinstance(node.meta["val"], torch.Tensor)
        ):
            raise NoSite(node, f"it depends on `{node.name}`, an input of the call that is no position", INSIDE)
        if node.op == "call_function" and getattr(node.target, "_schema", None) and node.target._schema.is_mutable:
            raise NoSite(node, f"op `{node.target}` writes in place between projection and cache")


def static_size(size: Any) -> int | None:
    """A dimension as an int where it is static, else None."""
    expr = size_expr(size)
    return int(expr) if expr.is_number else None
