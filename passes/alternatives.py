"""What each site would cost with another basis, at the bytes that its plan gives it: predicted loss, and how a decode
step would read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule

from lorc_fx.allocate import allocate, least, predicted, row_bytes
from lorc_fx.codec import Basis
from lorc_fx.errors import LorcError
from lorc_fx.factors import Factors
from lorc_fx.options import Options
from lorc_fx.packing import Format
from lorc_fx.records import PlannedSite

from . import attention, turns
from .cost import absorbs
from .operands import selection
from .plan import candidate
from .readers import query_heads
from .sites import Matched, Site
from .tracks import shared_tracks
from .unprojected import without_projection

BASES = ("joint", "grouped", "identity")


@dataclass(frozen=True)
class Alternative:
    """A site in another ``basis``: ``loss`` as ``PlannedSite.predicted`` has it, ``lowering`` the line of
    ``cost.LOWERINGS`` that reads it, ``latent_width`` numbers in ``row_bytes`` bytes of a row, in ``groups``."""

    basis: str
    loss: float
    lowering: str
    latent_width: int
    row_bytes: int
    groups: int


Prepare = Callable[[Matched, Options], Mapping[Site, tuple[Factors, Basis]]]


def alternatives(
    canonical: GraphModule, matched: Matched, options: Options, lines: Sequence[PlannedSite], prepare: Prepare
) -> dict[tuple[int, str], tuple[Alternative, ...]]:
    """By (layer, kind) of ``lines``: what each of ``BASES`` would give, those left out that cannot have so few bytes.
    ``matched``: with every site projected; ``prepare``: sites with their factors and bases under some options."""
    places = {(line.layer, line.kind): line for line in lines}
    found: dict[tuple[int, str], tuple[Alternative, ...]] = dict.fromkeys(places, ())
    for name in BASES:
        asked = replace(options, basis=name, group_size=options.group_size if name == "grouped" else None)
        try:
            chosen = without_projection(matched, asked)
            prepared = prepare(chosen, asked)
        except LorcError:  # heads that fill no groups, say: then there is no such alternative
            continue
        tracks = shared_tracks(canonical, chosen)
        for site, (factors, basis) in prepared.items():
            line, group = places.get((site.layer, site.kind)), site.group.find()
            if line is None or (name == "identity") != site.unprojected:
                continue
            made = _alternative(name, site, factors, basis, line.bytes, tracks.get(group) is group, asked)
            found[line.layer, line.kind] += () if made is None else (made,)
    return found


def _alternative(
    name: str, site: Site, factors: Factors, basis: Basis, given: int, keeps_positions: bool, options: Options
) -> Alternative | None:
    """None where ``given`` bytes are too few."""
    view = candidate(site, factors, basis, keeps_positions, options)
    budget = given - view.fixed
    if budget < row_bytes(least(view.columns), view.columns):
        return None
    chosen = allocate([view.columns], budget)[0]
    form = Format(chosen, view.columns.choices, site.decoder.dtype)
    width = form.columns + form.choices - 1
    heads = query_heads(site.reader) or site.decoder.width // site.head
    if site.unprojected:
        lowering = "rows"
    elif selection(site.decoder) is not None and absorbs(1, heads, site.head, site.decoder.width, width, basis.groups):
        lowering = "latent"
    else:
        value: torch.Tensor = site.node.meta["val"]
        turned = attention.TURNS and not form.plain and turns.of_site(site) is not None
        lowering = "tiles" if value.device.type != "cpu" else "turned" if turned else "decoding"
    return Alternative(name, predicted(view.columns, chosen), lowering, width, form.nbytes, basis.groups)
