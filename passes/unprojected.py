"""Sites that are cached as they are, at lower precision only (basis ``"identity"``): what is stored is what the dense
cache would hold, after norms and rotation, so reading it needs no decoding: the product is taken with the stored
levels.

    joint      x -> c = x (P^T W)^T -> row           read: row -> c S -> epilogue -> product
    identity   x -> y -> epilogue -> row             read: row -> product
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch.fx import Graph, GraphModule

from lorc_fx.decoder import Decoder
from lorc_fx.options import Options

from .axes import Axes
from .epilogue import aten, from_rows
from .operands import features
from .sites import Matched, Site

IDENTITY = "identity"


def without_projection(matched: Matched, options: Options) -> Matched:
    """``matched`` where the sites that ``options`` (or the cache that comes in) want unprojected are so."""
    sites = tuple(_unprojected(site) if _wanted(site, options) else site for site in matched.sites)
    return matched if sites == matched.sites else replace(matched, sites=sites)


def _wanted(site: Site, options: Options) -> bool:
    """A cache goes on as it began. Where the cache holds other numbers than the projection makes (features repeated or
    dropped between), projecting is the smaller form."""
    if features(site.decoder) != site.decoder.width:
        return False
    for node in site.group.find().latents:
        return node.meta["latent"].codec.unprojected
    if options.plan is not None:
        return any((s.layer, s.kind) == (site.layer, site.kind) and not s.projected for s in options.plan.sites)
    return options.basis_for(site.kind) == IDENTITY


def _unprojected(site: Site) -> Site:
    decoder = as_it_is(site.decoder.layout, site.decoder.dtype)
    return replace(site, decoder=decoder, consts=(), unprojected=True)


@cache
def as_it_is(layout: tuple[str | int, ...], dtype: torch.dtype) -> Decoder:
    """The decoder of a token's features in the dense cache's own layout."""
    graph = Graph()
    y, _ = graph.placeholder("y"), graph.placeholder("positions")
    sizes = [size for size in layout if isinstance(size, int)]
    batch, tokens = (graph.call_function(aten.sym_size.int, (y, i)) for i in (0, 1))
    axes = Axes(layout.index("B") if "B" in layout else None, layout.index("T"))
    graph.output(from_rows(graph, y, sizes, axes, batch, tokens))
    graph.eliminate_dead_code()
    width = torch.Size(sizes).numel()
    return Decoder(GraphModule(torch.nn.Module(), graph), width, layout, dtype, None, "none")
