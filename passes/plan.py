"""Sites and a byte budget -> a rank per site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lorc_fx.codec import Factors
from lorc_fx.errors import BadPlan
from lorc_fx.formulas import rank_of_bytes, row_bytes
from lorc_fx.options import Options
from lorc_fx.records import Plan, PlannedSite, SiteSpec
from lorc_fx.schedulers import depths, schedule

from .caches import Group
from .sites import Site

POSITION_BYTES = 4
"""One int32 per token, once for all sites whose epilogues need it and that keep the same tokens."""


def spec_of(site: Site, factors: Factors, keeps_positions: bool) -> SiteSpec:
    """What the scheduler sees of a site; ``keeps_positions``: it pays for the positions of all that share them."""
    decoder = site.decoder
    element = torch.empty(0, dtype=decoder.dtype).element_size()
    dense = element
    for size in decoder.layout:
        dense *= size if isinstance(size, int) else 1
    return SiteSpec(
        layer=site.layer,
        kind=site.kind,
        width=factors.rank,
        column_bytes=element,
        fixed_bytes=POSITION_BYTES if keeps_positions else 0,
        dense_bytes=dense,
        cond=factors.condition,
        spectrum=tuple(factors.singular[: factors.rank].tolist()),
        window=site.window,
    )


def make_plan(
    sites: Sequence[Site], factors: Mapping[Site, Factors], tracks: Mapping[Group, Group], options: Options
) -> Plan:
    """Give each site its bytes: sites that keep the same number of tokens meet the budget together.

    So the budget holds at every length, sliding windows too. ``tracks``: who keeps the positions of whom. Raises what
    schedulers raise, and BadPlan where a given plan does not fit the model.
    """
    groups = {site: site.group.find() for site in sites}
    specs = {site: spec_of(site, factors[site], tracks.get(groups[site]) is groups[site]) for site in sites}
    places = depths(list(specs.values()))
    specs = {site: replace(spec, depth=places[spec.layer]) for site, spec in specs.items()}
    if options.plan is not None:
        given = Plan.load(options.plan) if isinstance(options.plan, str) else options.plan
        return _checked(given, list(specs.values()))
    planned: dict[Site, PlannedSite] = {}
    for window in {site.window for site in sites}:
        group = [site for site in sites if site.window == window]
        views = [specs[site] for site in group]
        budget = options.budget(views, list(specs.values()))
        for site, spec, cost in zip(group, views, schedule(options.scheduler, views, budget, options), strict=True):
            planned[site] = planned_site(spec, rank_of_bytes(cost, spec.fixed_bytes, spec.column_bytes))
    return Plan(tuple(planned[site] for site in sites))


def planned_site(spec: SiteSpec, rank: int) -> PlannedSite:
    cost = row_bytes(spec.fixed_bytes, spec.column_bytes, rank)
    return PlannedSite(spec.layer, spec.kind, spec.width, rank, cost, spec.dense_bytes, spec.window, spec.cond)


def _checked(plan: Plan, specs: Sequence[SiteSpec]) -> Plan:
    """A given plan on this model's sites, in their order."""
    found = []
    for spec in specs:
        rank = plan.ranks.get((spec.layer, spec.kind))
        if rank is None:
            raise BadPlan(plan, f"it has no rank for layer {spec.layer} {spec.kind}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= spec.width:
            raise BadPlan(plan, f"layer {spec.layer} {spec.kind}: rank {rank!r} is not in 1..{spec.width}")
        found.append(planned_site(spec, rank))
    extra = set(plan.ranks) - {(s.layer, s.kind) for s in specs}
    if extra:
        raise BadPlan(plan, f"it has ranks for sites that this model lacks: {sorted(extra)[:4]}")
    return Plan(tuple(found))
