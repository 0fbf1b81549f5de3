"""Sites and a byte budget -> segments of columns per site."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorc_fx.allocate import BLOCK, DROPPED, Columns, allocate, least, predicted, row_bytes, segments
from lorc_fx.codec import Basis
from lorc_fx.errors import BadPlan, BudgetTooSmall, QualityWarning
from lorc_fx.factors import Factors, rank_of
from lorc_fx.options import FIRST_PROMPT, FIRST_PROMPT_TOKENS, Options
from lorc_fx.packing import BITS, MODEL, Segment
from lorc_fx.records import Plan, PlannedSite, SiteSpec
from lorc_fx.schedulers import depths, schedule

from .caches import Group
from .operands import features
from .sites import Site
from .unprojected import AUTO, BITS_AS_IT_IS

LEVELS: dict[str, tuple[int, ...]] = {"model": (MODEL,), "int8": (8,), "int4": (4,), "auto": (MODEL, *BITS)}
"""Bits that a column may have under each ``precision``."""

SAFE = 4
"""The fewest bits of a column where the data is not known: then nobody can tell which columns may have less."""


@dataclass(frozen=True)
class Candidate:
    """A site as the planner sees it: ``columns`` for the allocator, ``spec`` for the scheduler, bytes of positions,
    whether losses are in nats per token, whether it is projected, and groups of its columns."""

    columns: Columns
    spec: SiteSpec
    fixed: int
    nats: bool
    projected: bool = True
    groups: int = 1

    @property
    def least(self) -> int:
        return self.fixed + row_bytes(least(self.columns), self.columns)


def candidate(site: Site, factors: Factors, basis: Basis, keeps_positions: bool, options: Options) -> Candidate:
    """``keeps_positions``: the site pays for the positions of all that share them.

    A column's loss is its share of the site's energy, so every key and every value site counts the same; where the
    basis knows what it costs, half its energy, in nats per token (the second-order term of the loss). Columns may be
    dropped where the basis knows the data, and in the paper's method.
    """
    decoder = site.decoder
    element = decoder.dtype.itemsize
    dense = features(decoder) * element
    fixed = decoder.side.nbytes if keeps_positions and decoder.side is not None else 0
    width, only_model = min(factors.rank, len(basis.energy)), options.precision == "model"
    if site.unprojected:
        width = len(basis.energy)
    elif basis.groups > 1:
        width = basis.groups * places(basis)
    energy = basis.energy[:width].clamp_min(0)
    share = (energy / 2 if basis.absolute else energy / energy.sum().clamp_min(1e-300)).tolist()
    paper = only_model and options.calibration == "none"
    droppable = (paper or basis.informed) and not site.unprojected
    levels = LEVELS[str(options.precision)] + ((DROPPED,) if droppable else ())
    if not basis.informed or site.unprojected:
        chosen = site.unprojected and options.basis_for(site.kind) == AUTO
        safe = BITS_AS_IT_IS[site.kind] if chosen else SAFE
        levels = tuple(b for b in levels if b in (MODEL, DROPPED) or b >= safe)
    block = width if site.unprojected else basis.groups * (1 if only_model else BLOCK)
    columns = Columns(tuple(share), levels, element, len(basis.means), block)
    # The scheduler deals in columns' worth of bytes on top of the least that the site can have.
    base = fixed + row_bytes(least(columns), columns)
    full = fixed + row_bytes({max(levels, key=_precision): width}, columns)
    worth = min(-(-(full - base) // element) + 1, width)
    spec = SiteSpec(
        layer=site.layer,
        kind=site.kind,
        width=worth,
        column_bytes=element,
        fixed_bytes=base - element,
        dense_bytes=dense,
        cond=factors.condition,
        spectrum=tuple(energy.sqrt()[:worth].tolist()),
        window=site.window,
    )
    return Candidate(columns, spec, fixed, basis.absolute, not site.unprojected, basis.groups)


def places(basis: Basis) -> int:
    """Columns that each group of a basis may have: the most that one needs (repeated heads fill no more)."""
    return max(rank_of(energy.sqrt()) for energy in basis.energy.clamp_min(0).view(-1, basis.groups).T)


def _precision(level: int) -> int:
    return 99 if level == MODEL else level


def make_plan(
    sites: Sequence[Site],
    factors: Mapping[Site, Factors],
    bases: Mapping[Site, Basis],
    tracks: Mapping[Group, Group],
    options: Options,
) -> Plan:
    """Give each site its bytes, and spend them: sites that keep the same number of tokens meet the budget together.

    So the budget holds at every length, sliding windows too. ``tracks``: who keeps the positions of whom. Raises what
    schedulers raise, and BadPlan where a given plan does not fit the model.
    """
    groups = {site: site.group.find() for site in sites}
    found = {s: candidate(s, factors[s], bases[s], tracks.get(groups[s]) is groups[s], options) for s in sites}
    places = depths([c.spec for c in found.values()])
    found = {s: replace(c, spec=replace(c.spec, depth=places[c.spec.layer])) for s, c in found.items()}
    if options.plan is not None:
        return _checked(options.plan, [(found[s], bases[s]) for s in sites])
    planned: dict[Site, PlannedSite] = {}
    for window in {site.window for site in sites}:
        group = [site for site in sites if site.window == window]
        views = [found[site] for site in group]
        budget = options.budget([v.spec for v in views], [c.spec for c in found.values()], [v.fixed for v in views])
        if options.scheduler == "loss" and _lossless(views, budget):
            planned |= {site: planned_site(exact(v), _whole(v)) for site, v in zip(group, views, strict=True)}
            continue
        for site, view, chosen in zip(group, views, _spend(views, budget, options), strict=True):
            planned[site] = planned_site(view, chosen)
    return Plan(tuple(planned[site] for site in sites))


def exact(view: Candidate) -> Candidate:
    """The site with one mean: where nothing is dropped or rounded, a sink needs none of its own."""
    return replace(view, columns=replace(view.columns, choices=1))


def _whole(view: Candidate) -> tuple[Segment, ...]:
    return (Segment(len(view.columns.loss), MODEL),)


def _lossless(views: Sequence[Candidate], budget: int) -> bool:
    """Whether there are bytes for every column in the model's dtype, and that is allowed."""
    needed = sum(v.fixed + row_bytes({MODEL: len(v.columns.loss)}, exact(v).columns) for v in views)
    return needed <= budget and all(MODEL in v.columns.levels for v in views)


def _spend(views: Sequence[Candidate], budget: int, options: Options) -> list[tuple[Segment, ...]]:
    """All sites together, or each within the bytes that the scheduler gives it."""
    needed = sum(v.least for v in views)
    if budget < needed and options.calibration == FIRST_PROMPT:
        text = (
            f"until a prompt of {FIRST_PROMPT_TOKENS} tokens gives statistics, the cache keeps {needed} bytes per "
            f"token instead of {budget}: the least that is safe without them"
        )
        warnings.warn(text, QualityWarning, stacklevel=2)
        return [segments(least(v.columns)) for v in views]
    if options.scheduler == "loss":
        if budget < needed:
            dense, beside = sum(v.spec.dense_bytes for v in views), sum(v.fixed for v in views)
            raise BudgetTooSmall(budget, needed, dense, len(views), beside)
        return allocate([v.columns for v in views], budget - sum(v.fixed for v in views))
    costs = schedule(options.scheduler, [v.spec for v in views], budget, options)
    return [allocate([v.columns], cost - v.fixed)[0] for v, cost in zip(views, costs, strict=True)]


def planned_site(view: Candidate, chosen: tuple[Segment, ...]) -> PlannedSite:
    spec, counts = view.spec, {s.bits: s.columns for s in chosen}
    cost = view.fixed + row_bytes(counts, view.columns)
    width, choices = len(view.columns.loss), view.columns.choices
    return PlannedSite(
        spec.layer,
        spec.kind,
        width,
        chosen,
        choices,
        cost,
        spec.dense_bytes,
        spec.window,
        spec.cond,
        predicted(view.columns, chosen),
        view.nats,
        view.projected,
        view.groups,
    )


def checked_groups(plan: Plan, line: PlannedSite, width: int) -> int:
    """The groups of a planned site of ``width`` columns. Raises BadPlan where they cannot be."""
    if width % line.groups or any(s.columns % line.groups for s in line.segments):
        raise BadPlan(plan, f"{line.name}: {width} columns, and its segments, are not in {line.groups} equal groups")
    return line.groups


def _checked(plan: Plan, views: Sequence[tuple[Candidate, Basis]]) -> Plan:
    """A given plan on some of this model's sites, in their order."""
    places = plan.places()
    found = []
    for view, basis in views:
        spec, width = view.spec, len(view.columns.loss)
        if (spec.layer, spec.kind) not in places:
            raise BadPlan(plan, f"it has no rank for layer {spec.layer} {spec.kind}")
        line = plan.sites[places[spec.layer, spec.kind]]
        if any(s.columns < 1 for s in line.segments) or not 1 <= line.rank <= width:
            raise BadPlan(plan, f"{line.name}: rank {line.rank!r} is not in 1..{width}")
        if checked_groups(plan, line, len(basis.means[0])) != view.groups:
            raise BadPlan(plan, f"{line.name} was planned in {line.groups} groups, it has {view.groups}")
        if basis.informed and line.rank > basis.analysis.shape[1]:
            reason = f"{line.name} asks for {line.rank} columns, its tensor file holds {basis.analysis.shape[1]}"
            raise BadPlan(plan, reason)
        if line.choices == 1 and line.segments == _whole(view):
            view = exact(view)
        if line.choices != view.columns.choices:
            reason = f"{line.name} was planned for {line.choices} means, it has {view.columns.choices}"
            raise BadPlan(plan, f"{reason}: give the calibration that it was made with")
        found.append(planned_site(view, line.segments))
    return Plan(tuple(found))
