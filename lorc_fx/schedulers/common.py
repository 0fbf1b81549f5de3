"""What the schedulers share: exact costs, and turning real-valued rank wishes into integer ranks.

Ranks are columns, costs are bytes per token, all ints: a budget is never exceeded, not even by rounding.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from lorc_fx.formulas import row_bytes

if TYPE_CHECKING:
    from lorc_fx.records import SiteSpec

#: what a site would like to have, in columns, before rounding
Wish = float | Fraction


def site_bytes(sites: Sequence[SiteSpec], ranks: Sequence[int]) -> list[int]:
    """Bytes per token of each site at these ranks."""
    return [row_bytes(s.fixed_bytes, s.column_bytes, k) for s, k in zip(sites, ranks, strict=True)]


def cost(sites: Sequence[SiteSpec], ranks: Sequence[int]) -> int:
    """Bytes per token of all sites together at these ranks."""
    return sum(site_bytes(sites, ranks))


def least_bytes(sites: Sequence[SiteSpec]) -> int:
    """Bytes per token with one column per site: the smallest budget that works."""
    return cost(sites, [1] * len(sites))


def spend(
    wishes: Sequence[Wish],
    ranks: Sequence[int],
    limits: Sequence[int],
    step_cost: Callable[[int, int], int],
    left: int,
) -> tuple[list[int], int]:
    """Largest remainder: give ``left`` bytes away one column at a time, always where wish - rank is largest.

    ``step_cost(i, rank)`` is what the next column of item i costs, in bytes; no item passes its limit; ties go to the
    lower index. Returns the new ranks and the bytes that are left: less than any column that could still be added (for
    a step cost that does not fall with the rank).
    """
    out = list(ranks)
    heap = [(out[i] - wishes[i], i) for i in range(len(out)) if out[i] < limits[i]]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        price = step_cost(i, out[i])
        if price > left:
            continue  # what is left only shrinks: this item is done
        left -= price
        out[i] += 1
        if out[i] < limits[i]:
            heapq.heappush(heap, (out[i] - wishes[i], i))
    return out, left


def shrink(wishes: Sequence[Wish], ranks: Sequence[int], sites: Sequence[SiteSpec], over: int) -> list[int]:
    """Take columns away, where rank - wish is largest (ties: the last index), until ``over`` bytes are saved.

    No site falls below one column; the caller has made sure that one column per site fits.
    """
    out = list(ranks)
    heap = [(wishes[i] - out[i], -i) for i in range(len(out)) if out[i] > 1]
    heapq.heapify(heap)
    while over > 0 and heap:
        _, negative = heapq.heappop(heap)
        i = -negative
        out[i] -= 1
        over -= sites[i].column_bytes
        if out[i] > 1:
            heapq.heappush(heap, (wishes[i] - out[i], negative))
    return out


def round_wishes(sites: Sequence[SiteSpec], wishes: Sequence[Wish], budget: int) -> list[int]:
    """Integer ranks, 1..width, as near to the wishes as the budget allows, and within one column of full use.

    Floors, then takes away what the floor of one column costs too much, then spends the rest by largest remainder.
    ``budget`` is bytes per token and at least ``least_bytes(sites)``.
    """
    ranks = [min(max(int(w // 1), 1), s.width) for s, w in zip(sites, wishes, strict=True)]
    ranks = shrink(wishes, ranks, sites, cost(sites, ranks) - budget)
    limits = [s.width for s in sites]
    ranks, _ = spend(wishes, ranks, limits, lambda i, _: sites[i].column_bytes, budget - cost(sites, ranks))
    return ranks
