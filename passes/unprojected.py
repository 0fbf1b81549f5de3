"""Sites that are cached as they are, at lower precision only (basis ``"identity"``): what is stored is what the dense
cache would hold, after norms and rotation, so reading it needs no decoding: the product is taken with the stored
levels.

    joint      x -> c = x (P^T W)^T -> row           read: row -> c S -> epilogue -> product
    identity   x -> y -> epilogue -> row             read: row -> product

``auto`` is joint, but where that is predicted to be slower than the dense cache: keys that would have to be decoded at
each step (rotated or normed ones), and what a device reads more slowly as latents of all heads than head by head. It
needs bits: at few, dropping columns by what they hold is worth more, and such sites have columns for each head
(``lorc_fx.groups``). At any number of bits it is identity where decoding would need more beside the codes than
``sites.SIDE_SHARE`` (cosines of each token, say, of a layer that is compiled by itself): dense is what is left else.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch.fx import Graph, GraphModule, Node

from lorc_fx.bases import GROUPED
from lorc_fx.decoder import Decoder
from lorc_fx.options import Options
from lorc_fx.packing import SCALE_BYTES

from .axes import Axes
from .cost import seconds, typical
from .epilogue import aten, from_rows
from .operands import features, selection
from .readers import query_heads
from .sites import Matched, Site, costly, without

IDENTITY, AUTO = "identity", "auto"

LONG = 1 << 16
"""Tokens of a cache for which lowerings are compared: what does not grow with it counts nothing."""

BITS_AS_IT_IS = {"key": 8, "value": 6}
"""Bits that ``auto`` must have for each number of a site that it keeps as it is. Keys: some channels are many times
larger than others, and all share a scale (Gemma 3 270M at ratio 0.45, heads not turned: +0.97 % of loss where they may
have 6 or 5 bits)."""

FEWEST_BITS = 5
"""Bits per column that the other sites must have where ``auto`` keeps some as they are: with fewer, those bytes are
worth more where columns are dropped by what they hold (Gemma 3 270M: 4 bits without a projection lose ten times
what a mix does)."""


def without_projection(matched: Matched, options: Options) -> Matched:
    """``matched`` where the sites that ``options`` (or the cache that comes in) want unprojected are so. Only then is
    it known what the others keep beside their codes. Where that is too much, ``auto`` keeps them as they are too, at
    whatever bits there are; what no option lets be unprojected stays dense."""
    found = _as_they_are(matched, _chosen(matched, options))
    if options.plan is None and options.precision == "auto":
        lost = costly(found)
        found = _as_they_are(found, {s for s in found.sites if s.group in lost and options.basis_for(s.kind) == AUTO})
    return _in_groups(without(found, costly(found)), options)


def _in_groups(matched: Matched, options: Options) -> Matched:
    """``matched`` where sites are marked that have columns for each group of heads: those that the options want so, and
    of what ``auto`` projects those of several heads that are predicted to be slower than the dense cache as latents of
    all (on a CPU: kernels for others read every column). A plan says it itself."""
    if options.plan is not None:
        return matched
    trades = options.objective != "bytes" and options.precision != "model"
    wanted = {
        site
        for site in matched.sites
        if (name := options.basis_for(site.kind)) == GROUPED or (name == AUTO and trades and _gains(site))
    }
    sites = tuple(replace(s, grouped=True) if s in wanted and not s.unprojected else s for s in matched.sites)
    return matched if sites == matched.sites else replace(matched, sites=sites)


def _gains(site: Site) -> bool:
    """Whether groups of heads make a site faster, which would be slow without."""
    several = site.decoder.width > site.head > 1
    return several and site.node.meta["val"].device.type == "cpu" and (_decodes(site) or _slower(site))


def _as_they_are(matched: Matched, chosen: set[Site]) -> Matched:
    sites = tuple(s if s.unprojected or not _wanted(s, chosen) else _unprojected(s) for s in matched.sites)
    return matched if sites == matched.sites else replace(matched, sites=sites)


def _chosen(matched: Matched, options: Options) -> set[Site]:
    """The sites that the plan, or else the basis, keeps as they are."""
    if options.plan is not None:
        kept = {(s.layer, s.kind) for s in options.plan.sites if not s.projected}
        return {site for site in matched.sites if (site.layer, site.kind) in kept}
    names = {site: options.basis_for(site.kind) for site in matched.sites}
    auto = _by_objective(matched, options) if AUTO in names.values() else frozenset()
    return {site for site, name in names.items() if name == IDENTITY or (name == AUTO and site in auto)}


def _by_objective(matched: Matched, options: Options) -> frozenset[Site]:
    """The sites that ``auto`` keeps as they are, where the budget has ``BITS_AS_IT_IS`` for them and ``FEWEST_BITS``
    for the others. By ``objective``: "balanced", keys that attention cannot read as latents and what would be slower
    than dense as latents, else only the former; "time", all sites (a product of heads is shorter than one of latents),
    else as for "balanced"; "bytes", none."""
    if options.precision not in ("auto", "int8") or options.objective == "bytes":
        return frozenset()
    sizes = {site: features(site.decoder) for site in matched.sites}
    dense = sum(size * site.decoder.dtype.itemsize for site, size in sizes.items())
    given = options.bytes_per_token if options.ratio is None else options.ratio * dense
    if given is None:
        return frozenset()
    keys = frozenset(site for site in sizes if _decodes(site))
    every, slow = frozenset(sizes), keys | {site for site in sizes if _slower(site)}
    for kept in (every, slow, keys) if options.objective == "time" else (slow, keys):
        bits = sum(size * (BITS_AS_IT_IS[s.kind] if s in kept else FEWEST_BITS) for s, size in sizes.items())
        if given >= bits / 8 + SCALE_BYTES * len(sizes):
            return kept
    return frozenset()


def _decodes(site: Site) -> bool:
    """Whether reading means decoding: there is a rotation or a norm between y and the cache."""
    return site.kind == "key" and selection(site.decoder) is None


def _slower(site: Site) -> bool:
    """Whether reading the latents of a long cache is predicted to take longer than reading the dense one, with as many
    of them as there are features; and longer than as many numbers as they are, which must be unpacked as well."""
    heads, value = query_heads(site.reader), site.node.meta["val"]
    if heads is None:
        return False
    width, element = features(site.decoder), site.decoder.dtype.itemsize
    sizes = {"B": 1, "T": LONG, "S": 1, "H": heads, "D": site.head, "n": width, "k": width, "w": width, "e": element}
    device = typical(value.device.type)
    latent, *others = (seconds(way, device, **sizes) for way in ("latent", "dense", "rows"))
    return latent > max(others)


def _wanted(site: Site, chosen: set[Site]) -> bool:
    """A cache goes on as it began. Where the cache holds other numbers than the projection makes (features repeated or
    dropped between), projecting is the smaller form."""
    if features(site.decoder) != site.decoder.width:
        return False
    for node in site.group.find().latents:
        return node.meta["latent"].codec.unprojected
    return site in chosen


def _unprojected(site: Site) -> Site:
    decoder = as_it_is(site.decoder.layout, site.decoder.dtype)
    return replace(site, decoder=decoder, consts=(), unprojected=True)


@cache
def as_it_is(layout: tuple[str | int, ...], dtype: torch.dtype) -> Decoder:
    """The decoder of a token's features in the dense cache's own layout; where there are heads, each is turned back by
    the constant that the codec has for that (``codec.turning``)."""
    graph = Graph()
    y, _ = graph.placeholder("y"), graph.placeholder("positions")
    sizes = [size for size in layout if isinstance(size, int)]
    width, head = torch.Size(sizes).numel(), sizes[-1]
    batch, tokens = (graph.call_function(aten.sym_size.int, (y, i)) for i in (0, 1))
    whole: Node = y
    if len(sizes) > 1:
        back = graph.call_function(aten.transpose.int, (graph.placeholder("const0"), 0, 1))
        exact = graph.call_function(aten.to.dtype, (y, torch.promote_types(dtype, torch.float32)))
        heads = graph.call_function(aten.reshape.default, (exact, [batch, tokens, width // head, head]))
        turned = graph.call_function(aten.matmul.default, (heads, back))
        whole = graph.call_function(aten.to.dtype, (turned, dtype))
    axes = Axes(layout.index("B") if "B" in layout else None, layout.index("T"))
    graph.output(from_rows(graph, whole, sizes, axes, batch, tokens))
    graph.eliminate_dead_code()
    return Decoder(GraphModule(torch.nn.Module(), graph), width, layout, dtype, None, "none")
