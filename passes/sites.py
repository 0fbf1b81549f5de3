"""Groups of cells -> sites (to be coded) and misses (to be left as they are)."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from lorc_fx.decoder import Decoder
from lorc_fx.records import Miss

from .axes import Axes, arg, dim_of
from .caches import Caches, Group
from .epilogue import trimmed_decoder
from .facts import STAYS, Facts, NoSite, Region, Rows
from .readers import Reader, find_reader, is_read, viewed, written
from .rules import rule_of

aten = torch.ops.aten

UNREAD = "no attention"
"""Kind of a Miss that is no loss: a state of another sort (a convolution's last inputs, say), to which all this does
not apply."""


@dataclass(frozen=True, eq=False)
class Site:
    """One projection whose result is cached: the rows node, what it is made of, and who reads it.

    ``layer`` pairs a key site with its value site, from 0; ``ordinal`` tells apart sites of equal kind and weights.
    ``weights``: placeholders of the affine chain; ``consts``: placeholders (or attributes) the epilogue reads.
    """

    layer: int
    kind: str
    ordinal: int
    node: Node
    rows: Rows
    group: Group
    reader: Reader | None
    decoder: Decoder
    weights: tuple[Node, ...]
    consts: tuple[Node, ...]
    window: int | None

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.kind}"

    @property
    def head(self) -> int:
        """Columns of one head, 1 where the layout does not tell heads apart."""
        features = [size for size in self.decoder.layout if isinstance(size, int)]
        return features[-1] if len(features) > 1 else 1

    @property
    def recipe(self) -> tuple[Any, ...]:
        """What is computed between x and the cache besides the tensors that go in: ops and numbers, in order. Two sites
        of the same tensors with other recipes (a scale or a slope changed, another activation) need other codecs; the
        prefill and the decode steps of one site have the same."""
        return tuple(part for region in (self.rows.chain, self.rows.epilogue) for part in _recipe(region))

    @property
    def width_in(self) -> int:
        return int(self.rows.x.meta["val"].shape[-1])


@dataclass(frozen=True, eq=False)
class Matched:
    """What matching found in one graph: ``coded`` groups only hold sites and LatentKV inputs."""

    caches: Caches
    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    coded: frozenset[Group]

    @property
    def lost(self) -> tuple[Miss, ...]:
        """Misses that cost memory."""
        return tuple(m for m in self.misses if m.kind != UNREAD)


def match(gm: GraphModule) -> Matched:
    """Find the sites of a canonical graph. Never raises for a value it does not understand: that is a Miss."""
    nodes = list(gm.graph.nodes)
    caches, facts = Caches(nodes), Facts(nodes)
    misses: list[Miss] = []
    found: list[tuple[Node, Rows, Group, Decoder, tuple[Node, ...]]] = []
    coded: set[Group] = set()
    for group, cells in caches.groups().items():
        try:
            if not group.latents and not any(map(is_read, cells)):
                misses.append(_unread(cells[0]))
                continue
            if group.broken is not None:
                raise NoSite(*group.broken)
            parts = [(node, facts.describe(node, token)) for node, token in group.rows.items()]
            cut = [(node, *trimmed_decoder(rows, words(rows))) for node, rows in parts]
            made = [(node, rows, group, decoder, consts) for node, rows, decoder, consts in cut]
            _same_projection([m[1] for m in made])
            found += made
            if group.latents or made:
                coded.add(group)
        except NoSite as why:
            misses.append(Miss(why.node.name, "not understood", why.reason, source_line(why.node), why.step))
    for write in caches.dense:
        try:
            facts.describe(write.rows, write.token)
        except NoSite:
            continue
        if not any(map(is_read, (write.node, *viewed(written(write.node) or write.node)))):
            misses.append(_unread(write.node))
            continue
        reason = "the cache was filled or allocated outside of a compiled graph, so it stays dense"
        step = 'compile the model itself, model.compile(backend="lorc"), so that what fills it is compiled too'
        misses.append(Miss(write.node.name, "preallocated", reason, source_line(write.node), step))
    return Matched(caches, tuple(_sites(found, facts)), tuple(misses), frozenset(coded))


_CUTS = {aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem}


def _recipe(region: Region) -> Iterator[tuple[Any, ...]]:
    """Layout ops count where they pick features only: sizes and axes differ between the graphs of one site."""
    for node, axes in region.nodes:
        rule = rule_of(node)
        if rule is not None and (rule.role == "layout" or rule.sized):
            if node.target not in _CUTS or _along_tokens(node, axes):
                continue
        numbers = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, (int, float, complex))]
        if rule is not None and rule.role == "contract":
            yield tuple(numbers)  # ``linear`` and ``addmm`` are one product, spelled for other shapes
        else:
            yield str(node.target), *numbers


def _along_tokens(node: Node, axes: Axes) -> bool:
    """Whether a slice is one of tokens or batch rows: it drops none of them, whatever its numbers are."""
    source = node.args[0].meta["val"]
    return node.target is aten.slice.Tensor and dim_of(arg(node, 1, "dim", 0), source.dim()) in axes


def _unread(node: Node) -> Miss:
    return Miss(node.name, UNREAD, "no attention reads it, so it is left as it is", source_line(node), STAYS)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')


def source_line(node: Node, limit: int = 8) -> str:
    """``path:line: code`` of the user's line that a node comes from (else of what it is made of), or nothing."""
    while limit and not node.meta.get("stack_trace") and node.all_input_nodes:
        node, limit = node.all_input_nodes[0], limit - 1
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return "{}:{}: {}".format(*frames[-1]).strip() if frames else ""


def _same_projection(rows: list[Rows]) -> None:
    """One buffer has one codec: all that is written to it must come through the same weights."""
    for other in rows[1:]:
        if set(other.chain.inputs) - {other.x} != set(rows[0].chain.inputs) - {rows[0].x}:
            raise NoSite(other.y, "one cache is written by several projections")


def _sites(found: list[tuple[Node, Rows, Group, Decoder, tuple[Node, ...]]], facts: Facts) -> list[Site]:
    read = []
    for node, rows, group, decoder, consts in found:
        reader = find_reader(node)
        kind = reader.kind if reader else "key" if decoder.needs_positions else "value"
        read.append((facts.order[node], kind, reader, node, rows, group, decoder, consts))
    read.sort(key=lambda item: item[0])
    layers = {"key": 0, "value": 0}
    ordinals: dict[tuple[str, frozenset[Node]], int] = {}
    sites = []
    for _, kind, reader, node, rows, group, decoder, consts in read:
        weights = tuple(sorted((n for n in rows.chain.inputs if n is not rows.x), key=facts.order.__getitem__))
        key = (kind, frozenset(weights))
        ordinals[key] = ordinals.get(key, -1) + 1
        sites.append(
            Site(layers[kind], kind, ordinals[key], node, rows, group, reader, decoder, weights, consts, group.window)
        )
        layers[kind] += 1
    return sites


def words(rows: Rows) -> str:
    """The epilogue in words, from the ops in it (no names of models: only what is computed)."""
    targets = {str(n.target) for n, _ in rows.epilogue.nodes}
    parts = []
    if any("rsqrt" in t or "rms_norm" in t for t in targets):
        parts.append("RMS norm")
    if any("layer_norm" in t for t in targets):
        parts.append("LayerNorm")
    if any("vector_norm" in t or "aten.norm" in t for t in targets):
        parts.append("L2 norm")
    if rows.position is not None:
        parts.append("rotary")
    if any("clamp" in t for t in targets):
        parts.append("clamp")
    return " + ".join(parts) if parts else "none" if _is_linear(rows) else "token-wise"


def _is_linear(rows: Rows) -> bool:
    return all((rule := rule_of(n)) is not None and rule.role in ("layout", "sum") for n, _ in rows.epilogue.nodes)
