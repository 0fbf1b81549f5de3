"""Groups of cells -> sites (to be coded) and misses (to be left as they are)."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from lorc_fx.decoder import Decoder
from lorc_fx.records import Miss

from .caches import Caches, Group
from .epilogue import along_tokens, trimmed_decoder
from .facts import INSIDE, STAYS, Facts, NoSite, Region, Rows
from .readers import Reader, find_reader, is_masked, is_read, viewed, written
from .rules import rule_of

aten = torch.ops.aten

UNREAD = "no attention"
"""Kind of a Miss that is no loss: a state of another sort (a convolution's last inputs, say), to which all this does
not apply."""


SIDE_SHARE = 0.5
"""What a cache may keep beside codes, cosines say, as a share of its dense bytes; a position always may."""

Found = tuple[Node, Rows, Group, Decoder, tuple[Node, ...]]


@dataclass(frozen=True, eq=False)
class Site:
    """One projection whose result is cached: the rows node, what it is made of, and who reads it.

    ``layer`` pairs a key site with its value site, from 0 (keys and values that stay dense count too);
    ``ordinal`` tells apart sites of equal kind and weights.
    ``weights``: placeholders of the affine chain; ``consts``: placeholders (or attributes) the epilogue reads.
    ``grouped``: its columns are each of one group of heads (``lorc_fx.groups``).
    ``unprojected``: what is stored is what the dense cache would hold (``unprojected.py``), not a latent of y.
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
    unprojected: bool = False
    grouped: bool = False

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
        prefill and the decode steps of one site have the same. Where features are kept beside y, so does the recipe say
        exactly which and in what order."""
        wide = self.decoder.side is not None and self.decoder.side.width is not None
        ops = tuple(part for region in (self.rows.chain, self.rows.epilogue) for part in _recipe(region))
        return (*ops, self.decoder.digest) if wide else ops

    @property
    def one_product(self) -> bool:
        """Whether y is a single product with a weight, and perhaps a bias: rounded as such, and once."""
        rules = [rule_of(node) for node, _ in self.rows.chain.nodes if node.target is not aten.lift_fresh_copy.default]
        roles = [None if rule is None else rule.role for rule in rules]
        known = all(role in ("contract", "layout", "sum") for role in roles)
        return known and roles.count("contract") == 1 and roles.count("sum") <= 1


@dataclass(frozen=True, eq=False)
class Matched:
    """What matching found in one graph: ``coded`` groups only hold sites and LatentKV inputs."""

    caches: Caches
    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    coded: frozenset[Group]

    @functools.cached_property
    def leads(self) -> dict[Site, Site]:
        """Each site and the first one of its cache, whose codec it has: what is written to a cache in several places of
        a graph (a decoder's own tokens and an encoder's, read at once) is planned and informed once."""
        first: dict[Group, Site] = {}
        return {site: first.setdefault(site.group.find(), site) for site in self.sites}

    @functools.cached_property
    def planned(self) -> tuple[Site, ...]:
        """One site of each cache."""
        return tuple(dict.fromkeys(self.leads.values()))

    @functools.cached_property
    def bare(self) -> frozenset[Group]:
        """Buffers written in place whose attention may read rows that hold no token yet."""
        sites = [s for s in self.sites if s.group.find().in_place]
        return frozenset(s.group.find() for s in sites if s.reader is None or not is_masked(s.reader))

    @property
    def lost(self) -> tuple[Miss, ...]:
        """Misses that cost memory."""
        return tuple(m for m in self.misses if m.kind != UNREAD)


def match(gm: GraphModule) -> Matched:
    """Find the sites of a canonical graph. Never raises for a value it does not understand: that is a Miss."""
    nodes = list(gm.graph.nodes)
    caches, facts = Caches(nodes), Facts(nodes)
    misses: list[Miss] = []
    found: list[Found] = []
    others: list[tuple[int, str]] = []  # keys and values that are read dense: they count in numbers of layers
    coded: set[Group] = set()
    for group, cells in caches.groups().items():
        try:
            if not group.latents and not any(map(is_read, cells)):
                misses.append(_unread(cells[0]))
                continue
            if group.broken is not None:
                raise NoSite(*group.broken)
            made = [(node, *_as_kept(facts, group, node, token)) for node, token in group.rows.items()]
            _same_projection([m[1] for m in made], [m[3] for m in made])
            for node, _, _, decoder, _ in made if group.split is not None else ():
                if decoder.batch_dim != group.split:
                    raise NoSite(node, "single entries of it are written along another axis than the batch")
                if decoder.shared_positions:  # decoding reads those of row 0, which may lie elsewhere or not be there
                    raise NoSite(node, "its batch rows are written one by one, and share their positions")
            found += made
            if group.latents or made:
                coded.add(group)
        except NoSite as why:
            misses.append(_not_understood(why))
            others += _read_as(facts, next(iter(group.rows), None))
    for write in caches.dense:
        others += _read_as(facts, write.rows)
        try:
            facts.describe(write.rows, write.token)
        except NoSite:
            continue
        if not any(map(is_read, (write.node, *viewed(written(write.node) or write.node)))):
            misses.append(_unread(write.node))
            continue
        reason = "the cache was filled or allocated outside of a compiled graph, so it stays dense"
        step = (
            'compile the model itself, model.compile(backend="lorc"), so that what fills it is compiled too; '
            "buffers of a module must be made anew in it where a prompt begins"
        )
        misses.append(Miss(write.node.name, "preallocated", reason, source_line(write.node), step))
    return Matched(caches, tuple(_sites(found, others, facts)), tuple(misses), frozenset(coded))


def _read_as(facts: Facts, rows: Node | None) -> list[tuple[int, str]]:
    """Where in the graph rows are, and whether attention reads them as keys or values; [] where it does not."""
    reader = None if rows is None else find_reader(rows)
    return [] if rows is None or reader is None else [(facts.order[rows], reader.kind)]


def _as_kept(facts: Facts, group: Group, node: Node, token: int) -> tuple[Rows, Group, Decoder, tuple[Node, ...]]:
    """What rows are made of, in the way in which the cache that they go to keeps its tokens, where that is one."""
    kept = next((n.meta["latent"].codec.decoder for n in group.latents), None)
    first: tuple[Rows, Group, Decoder, tuple[Node, ...]] | None = None
    for way in facts.describe(node, token, None if kept is None else kept.side):
        rows, decoder, consts = trimmed_decoder(way, words(way))
        if kept is None or decoder.digest == kept.digest:
            return rows, group, decoder, consts
        first = first or (rows, group, decoder, consts)
    assert first is not None  # else ``describe`` has raised
    return first


def _not_understood(why: NoSite) -> Miss:
    return Miss(why.node.name, "not understood", why.reason, source_line(why.node), why.step)


def costly(matched: Matched) -> dict[Group, Miss]:
    """Groups that would keep more of each token beside its codes than ``SIDE_SHARE`` of the dense bytes, with what they
    share counted once, where they can share. Sites that are unprojected keep nothing beside."""
    together: dict[Any, list[Site]] = {}
    for site in matched.sites:
        if site.decoder.side is not None and site.decoder.side.width is not None:
            key = (site.rows.sides, id(site.group.find()) if site.group.in_place else site.window)
            together.setdefault(key, []).append(site)
    found: dict[Group, Miss] = {}
    for (sides, _), items in together.items():
        side = items[0].decoder.side
        dense = {s.group: math.prod(x for x in s.decoder.layout if isinstance(x, int)) for s in items}
        size = sum(dense.values()) * items[0].decoder.dtype.itemsize
        if side is not None and side.nbytes > SIDE_SHARE * size:
            reason = f"it needs {side.nbytes} bytes per token beside the projection, and the cache {size}"
            found |= {group: _not_understood(NoSite(sides[0][0], reason, INSIDE)) for group in dense}
    return found


def without(matched: Matched, lost: dict[Group, Miss]) -> Matched:
    """``matched`` with the groups ``lost`` left dense."""
    sites = tuple(site for site in matched.sites if site.group not in lost)
    return replace(matched, sites=sites, misses=(*matched.misses, *lost.values()), coded=matched.coded - lost.keys())


_CHANGES = {aten.neg.default, aten.flip.default, aten.roll.default, aten.sum.dim_IntList, aten.mean.dim}
_CUTS = {aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem}


def _recipe(region: Region) -> Iterator[tuple[Any, ...]]:
    """Layout ops count where they pick features only: sizes and axes differ between the graphs of one site."""
    for node, axes in region.nodes:
        rule = rule_of(node)
        if node.target in _CHANGES:  # layout by its rule, but other numbers come out
            yield str(node.target), *([str(node.args[1])] if node.target is aten.roll.default else [])
            continue
        if rule is not None and (rule.role == "layout" or rule.sized):
            if node.target not in _CUTS or along_tokens(node, axes):
                continue
        numbers = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, (int, float, complex))]
        if rule is not None and rule.role == "contract":
            yield tuple(numbers)  # ``linear`` and ``addmm`` are one product, spelled for other shapes
        else:
            yield str(node.target), *numbers


def _unread(node: Node) -> Miss:
    return Miss(node.name, UNREAD, "no attention reads it, so it is left as it is", source_line(node), STAYS)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')


def source_line(node: Node, limit: int = 8) -> str:
    """``path:line: code`` of the user's line that a node comes from (else of what it is made of), or nothing."""
    while limit and not node.meta.get("stack_trace") and node.all_input_nodes:
        node, limit = node.all_input_nodes[0], limit - 1
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return "{}:{}: {}".format(*frames[-1]).strip() if frames else ""


def _same_projection(rows: list[Rows], decoders: list[Decoder]) -> None:
    """One buffer has one codec: all that is written to it must come through the same weights, and the same ops."""
    for other, decoder in zip(rows[1:], decoders[1:], strict=True):
        if set(other.chain.inputs) - {other.x} != set(rows[0].chain.inputs) - {rows[0].x}:
            raise NoSite(other.y, "one cache is written by several projections")
        if decoder.digest != decoders[0].digest or [*_recipe(other.chain)] != [*_recipe(rows[0].chain)]:
            raise NoSite(other.y, "one cache is written by one projection in several ways")


def _sites(found: list[Found], others: list[tuple[int, str]], facts: Facts) -> list[Site]:
    read = []
    for node, rows, group, decoder, consts in found:
        reader = find_reader(node)
        kind = reader.kind if reader else "key" if decoder.needs_positions else "value"
        read.append((facts.order[node], kind, reader, node, rows, group, decoder, consts))
    read.sort(key=lambda item: item[0])
    ordinals: dict[tuple[str, frozenset[Node]], int] = {}
    layers: dict[str, int] = {}
    sites = []
    numbers: dict[Group, tuple[int, int]] = {}
    for at, kind, reader, node, rows, group, decoder, consts in read:
        weights = tuple(sorted((n for n in rows.chain.inputs if n is not rows.x), key=facts.order.__getitem__))
        if group.find() not in numbers:  # else it is the same cache, written in another place
            key = (kind, frozenset(weights))
            ordinals[key] = ordinals.get(key, -1) + 1
            layers[kind] = layers.get(kind, -1) + 1
            dense = sum(k == kind and i < at for i, k in others)
            numbers[group.find()] = layers[kind] + dense, ordinals[key]
        layer, ordinal = numbers[group.find()]
        sites.append(Site(layer, kind, ordinal, node, rows, group, reader, decoder, weights, consts, group.window))
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
    if rows.side is not None:
        parts.append("rotary")
    if any("clamp" in t for t in targets):
        parts.append("clamp")
    return " + ".join(parts) if parts else "none" if _is_linear(rows) else "token-wise"


def _is_linear(rows: Rows) -> bool:
    return all((rule := rule_of(n)) is not None and rule.role in ("layout", "sum") for n, _ in rows.epilogue.nodes)
