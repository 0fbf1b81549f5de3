"""``progressive``: LoRC's schedule (arXiv 2410.03111), shallow layers wide, deep layers narrow.

With kappa_l = cond(W_k^l) * cond(W_v^l) and the cumulative kappa~_l = prod_{j >= l} kappa_j (as a sum of logarithms),
d_l = floor(d_min + (d_max - d_min) * (log kappa~_l - min) / (max - min)). The formula itself is in
``lorc_fx.formulas``; this file solves its knobs from a byte budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lorc_fx import formulas
from lorc_fx.errors import BadOption, KnobsDoNotFit
from lorc_fx.records import Depth
from lorc_fx.schedulers.common import cost, site_bytes, spend
from lorc_fx.schedulers.registry import register_scheduler

if TYPE_CHECKING:
    from lorc_fx.options import Options
    from lorc_fx.records import SiteSpec

#: Condition numbers above this count as this one (rank-deficient weights have an infinite one; in fp32 anything past
#: 1/eps ~ 1.7e7 is noise of sigma_min, and real checkpoints go up to 2e9).
COND_CAP = 1e12


def log_cumulative(kappas: Sequence[float]) -> list[float]:
    """log kappa~_l for each layer: the sum of log kappa_j over j >= l. ``kappas`` are >= 1 and finite."""
    out: list[float] = []
    total = 0.0
    for kappa in reversed(kappas):
        total += math.log(kappa)
        out.append(total)
    return out[::-1]


def _checked(name: str, values: Sequence[float]) -> list[float]:
    """The condition numbers, capped at ``COND_CAP``. Raises BadOption for NaN or anything below 1."""
    out = []
    for value in values:
        number = float(value)
        if not number >= 1.0:
            raise BadOption(name, value, "condition numbers >= 1 (infinite ones are capped)")
        out.append(min(number, COND_CAP))
    return out


def progressive_ranks(cond_k: Sequence[float], cond_v: Sequence[float], *, d_min: int, d_max: int) -> list[int]:
    """Rank (columns) of each layer, from the condition numbers of its stacked key and value weights.

    Infinite condition numbers count as 1e12; where all layers are equal, all get ``d_max``. Raises BadOption for
    lists of different lengths, NaN or values below 1, and unless 1 <= d_min <= d_max. Source: arXiv 2410.03111,
    checked against the published ranks of Llama-3-8B (tests/data).
    """
    for name, value in (("d_min", d_min), ("d_max", d_max)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadOption(name, value, "a positive int, in columns")
    if d_min > d_max:
        raise BadOption("d_min", d_min, f"at most d_max={d_max}")
    if len(cond_k) != len(cond_v):
        raise BadOption("cond_v", f"{len(cond_v)} values", f"one per layer, as cond_k with {len(cond_k)}")
    logs = log_cumulative([k * v for k, v in zip(_checked("cond_k", cond_k), _checked("cond_v", cond_v), strict=True)])
    if not logs:
        return []
    low, high = min(logs), max(logs)
    return [formulas.rank(d_min, d_max, log, low, high) for log in logs]


@dataclass(frozen=True)
class _Layers:
    """The sites grouped by layer, shallow first. ``full`` layers are protected: every site at its own width."""

    sites: Sequence[SiteSpec]
    members: list[list[int]]
    logs: list[float]
    span: tuple[float, float]
    full: list[bool]

    def site_ranks(self, layer_ranks: Sequence[int]) -> list[int]:
        """Columns of each site when its layer gets this many, clipped to 1..width; protected layers are full."""
        ranks = [0] * len(self.sites)
        for layer, indices in enumerate(self.members):
            for i in indices:
                width = self.sites[i].width
                ranks[i] = width if self.full[layer] else min(max(layer_ranks[layer], 1), width)
        return ranks

    def layer_ranks(self, d_min: int, d_max: int) -> list[int]:
        """The formula's rank of each layer, in columns, before clipping."""
        low, high = self.span
        return [formulas.rank(d_min, d_max, log, low, high) for log in self.logs]

    def wishes(self, d_min: int, d_max: int) -> list[float]:
        """The same before the floor."""
        low, high = self.span
        return [formulas.real_rank(d_min, d_max, log, low, high) for log in self.logs]

    def depths(self) -> list[int]:
        """For each site the index of its layer among ``members``."""
        position = {i: at for at, indices in enumerate(self.members) for i in indices}
        return [position[i] for i in range(len(self.sites))]

    def cost(self, d_min: int, d_max: int) -> int:
        """Bytes per token of all sites under these knobs."""
        return cost(self.sites, self.site_ranks(self.layer_ranks(d_min, d_max)))


class Conditioned(Protocol):
    """A site as far as condition numbers go."""

    @property
    def layer(self) -> int: ...

    @property
    def cond(self) -> float: ...


def cumulative_logs(sites: Sequence[Conditioned]) -> list[float]:
    """log kappa~_l for each layer of ``sites``, by layer number. A layer without a key or value counts with the other.

    Raises BadOption for a condition number that is NaN or below 1.
    """
    numbers = sorted({site.layer for site in sites})
    return log_cumulative([math.prod(_checked("cond", [s.cond for s in sites if s.layer == n])) for n in numbers])


def depths(sites: Sequence[SiteSpec]) -> dict[int, Depth]:
    """The place of each layer in a whole model, whose ``sites`` these are."""
    numbers, logs = sorted({site.layer for site in sites}), cumulative_logs(sites)
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    return {n: Depth(log, low, high, numbers[-1]) for n, log in zip(numbers, logs, strict=True)}


def _group(sites: Sequence[SiteSpec], options: Options) -> _Layers:
    """Raises BadOption for a condition number that is NaN or below 1.

    ``protect_first`` counts the model's layers from 0, ``protect_last`` back from its last (the last of these sites
    where their ``depth`` is not given).
    """
    numbers = sorted({site.layer for site in sites})
    members = [[i for i, site in enumerate(sites) if site.layer == number] for number in numbers]
    places = [sites[indices[0]].depth for indices in members]
    if all(place is not None for place in places):
        logs = [place.log_cumulative for place in places if place is not None]
        span, last = (places[0].log_min, places[0].log_max), places[0].last  # type: ignore[union-attr]
    else:
        logs = cumulative_logs(sites)
        span, last = (min(logs), max(logs)), numbers[-1]
    full = [number < options.protect_first or number > last - options.protect_last for number in numbers]
    return _Layers(sites, members, logs, span, full)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest knob in low..high that fits (fits is monotone: true, then false); None where even low does not."""
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Knobs:
    """Solved knobs, in columns, and the real-valued knobs of the next step up, which do not fit any more."""

    d_min: int
    d_max: int
    next_min: int
    next_max: int


def solve_knobs(layers: _Layers, budget: int, d_min: int | None, d_max: int | None) -> Knobs | None:
    """Knobs in columns: those given stay; d_max = n first, then d_min falls to 1, then d_max falls.

    None where no choice of the free knobs meets ``budget`` (bytes per token).
    """
    widest = max(site.width for site in layers.sites)
    if d_min is not None and d_max is not None:
        return Knobs(d_min, d_max, d_min, d_max) if layers.cost(d_min, d_max) <= budget else None
    if d_min is None:
        top = widest if d_max is None else d_max
        low = _largest(1, top, lambda knob: layers.cost(knob, top) <= budget)
        if low is not None:
            return Knobs(low, top, low + 1, top)
        if d_max is not None:
            return None
    bottom = 1 if d_min is None else d_min
    high = _largest(bottom, max(widest, bottom), lambda knob: layers.cost(bottom, knob) <= budget)
    return None if high is None else Knobs(bottom, high, bottom, high + 1)


def _refusal(layers: _Layers, budget: int, options: Options) -> KnobsDoNotFit:
    """The error that says what the user's knobs need and which value of them would fit."""
    d_min, d_max = options.d_min, options.d_max
    names = ("d_min", "d_max", "protect_first", "protect_last")
    knobs = {name: value for name in names if (value := getattr(options, name))}
    bottom = d_min or 1
    needed = layers.cost(bottom, d_max or bottom)
    found: list[str] = []
    if d_max:
        high = _largest(bottom, d_max, lambda knob: layers.cost(bottom, knob) <= budget)
        found += [f"d_max={high}" if d_min is None else f"d_min={d_min} with d_max={high}"] if high else []
    if d_min:
        low = _largest(1, d_min, lambda knob: layers.cost(knob, d_max or knob) <= budget)
        found += [f"d_min={low}" + (f" with d_max={d_max}" if d_max else "")] if low else []
    if not found and any(layers.full):
        found.append("fewer protected layers")
    if not found:
        low = _largest(1, min(bottom, d_max or bottom), lambda knob: layers.cost(knob, knob) <= budget)
        found.append(f"d_min=d_max={low}" if low else "no value of these knobs")
    fixed = sum(s.fixed_bytes for s in layers.sites)
    return KnobsDoNotFit(knobs, needed, budget, sum(s.dense_bytes for s in layers.sites), " or ".join(found), fixed)


@register_scheduler("progressive")
def progressive(sites: Sequence[SiteSpec], budget: int, options: Options) -> list[int]:
    """Bytes per token for each site; keys and values of a layer share its rank, clipped to each site's width.

    Knobs that are not given are solved from ``budget`` (see ``solve_knobs``). What the formula's floors then leave is
    spent layer by layer where its real value exceeds the rank most, the last few bytes on single sites, so that less
    than one column is left (``d_max``, where given, is not passed). Where the user gives both ``d_min`` and ``d_max``
    the ranks are exactly the formula's and the rest stays unspent. ``budget`` holds at least one column per site
    (``schedule`` checks it). Raises KnobsDoNotFit where the knobs given need more, BadOption for a bad cond.
    """
    layers = _group(sites, options)
    solved = solve_knobs(layers, budget, options.d_min, options.d_max)
    if solved is None:
        raise _refusal(layers, budget, options)
    start = layers.layer_ranks(solved.d_min, solved.d_max)
    ranks = layers.site_ranks(start)
    if options.d_min is not None and options.d_max is not None:
        return site_bytes(sites, ranks)

    # The real-valued schedule of the next knob up, the first that does not fit: it says who gets the rest.
    wishes = layers.wishes(solved.next_min, solved.next_max)
    depth = layers.depths()
    cap = options.d_max if options.d_max is not None else max(site.width for site in sites)
    limits = [s.width if layers.full[at] else min(cap, s.width) for s, at in zip(sites, depth, strict=True)]
    left = budget - cost(sites, ranks)

    def layer_step(layer: int, rank: int) -> int:
        return sum(sites[i].column_bytes for i in layers.members[layer] if rank < limits[i])

    tops = [
        start[at] if layers.full[at] else max(limits[i] for i in members) for at, members in enumerate(layers.members)
    ]
    start = [max(rank, 1) for rank in start]
    more, left = spend(wishes, start, tops, layer_step, left)
    ranks = layers.site_ranks(more)
    of_layer = [wishes[at] for at in depth]
    ranks, _ = spend(of_layer, ranks, limits, lambda i, _: sites[i].column_bytes, left)
    return site_bytes(sites, ranks)
