"""Bytes -> bits: which columns of which site are kept, and how precisely (reverse water-filling).

Every block of columns climbs the levels 0, 1, 2, 3, 4, 5, 6, 8 bits, model dtype. A step is worth the predicted loss
that it removes; the steps of all blocks of all sites are taken by worth per byte until the bytes are spent. Dropping
a column is its 0-bit level. Costs are exact: scales, packing and row padding count.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .packing import (
    BITS,
    MODEL,
    SCALE_BYTES,
    STEPS,
    Segment,
    dequantise,
    index_bytes,
    quantise,
    segment_bytes,
)

BLOCK = 8
"""Columns that climb together where precision is mixed: whole bytes at any number of bits."""

DROPPED = -1
"""The level of a column that is not stored."""

MODEL_DISTORTION = 2.0**-18
"""What storing in bf16 loses of a column's energy; below every quantised level's."""


@functools.cache
def distortion(bits: int) -> float:
    """Mean share of a column's energy that ``bits`` lose: measured on the quantiser itself, on 4096 Gaussian tokens of
    64 columns (one scale per token). 1 for a dropped column."""
    if bits == DROPPED:
        return 1.0
    if bits == MODEL:
        return MODEL_DISTORTION
    values = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    levels, scale = quantise(values, [(64, bits)])
    error = dequantise(levels, scale.float() * STEPS[bits], 1 << (bits - 1)) - values
    return float(error.double().square().sum() / values.double().square().sum())


@dataclass(frozen=True)
class Columns:
    """What the allocator knows of one site: ``loss`` what each column costs where it is dropped (descending), the bits
    it may have (``DROPPED`` among them where it may be), bytes of one number in the model's dtype, and how many means
    a token can have. ``block``: columns that climb together."""

    loss: tuple[float, ...]
    levels: tuple[int, ...]
    element: int
    choices: int = 1
    block: int = BLOCK


def row_bytes(counts: dict[int, int], site: Columns) -> int:
    """Bytes of a row with ``counts[bits]`` columns at each precision; the same as ``Format.nbytes``."""
    total = sum(segment_bytes(n, bits, site.element) for bits, n in counts.items() if bits != DROPPED)
    quantised = any(n for bits, n in counts.items() if bits not in (MODEL, DROPPED))
    total += SCALE_BYTES * quantised + index_bytes(site.choices, quantised)
    align = max(site.element if counts.get(MODEL) else 1, SCALE_BYTES if quantised else 1)
    return -(-total // align) * align


def _order(level: int) -> int:
    """Levels from the least precise to the most."""
    return 99 if level == MODEL else level


def _steps(site: Columns) -> tuple[list[int], list[tuple[int, int]]]:
    """The levels on the lower convex hull of (bytes, loss) of one column, and each step between them."""
    points = [
        (0.0 if b == DROPPED else site.element * 8.0 if b == MODEL else float(b), distortion(b), b)
        for b in sorted(site.levels, key=_order)
    ]
    hull: list[tuple[float, float, int]] = []
    for point in points:
        if hull and point[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        if not hull or point[1] < hull[-1][1]:
            hull.append(point)
    levels = [b for _, _, b in hull]
    return levels, list(zip(levels, levels[1:], strict=False))


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    """Loss removed per bit from a to b."""
    return (a[1] - b[1]) / (b[0] - a[0])


def least(site: Columns) -> dict[int, int]:
    """The cheapest contents of a row: every column at its lowest level, but one block kept where columns may be
    dropped."""
    levels, _ = _steps(site)
    counts = {levels[0]: len(site.loss)}
    if levels[0] == DROPPED:
        kept = min(site.block, len(site.loss))
        counts = {DROPPED: len(site.loss) - kept, levels[1]: kept}
    return counts


def allocate(sites: Sequence[Columns], budget: int) -> list[tuple[Segment, ...]]:
    """Segments for each site, at most ``budget`` bytes per token in all (the caller has made sure that ``least`` fits).

    No block gets a level before a block of more worth. A step that does not fit when its turn comes is not tried again,
    so a few bytes that another block's scale or padding freed may stay.
    """
    counts = [least(site) for site in sites]
    costs = [row_bytes(c, s) for c, s in zip(counts, sites, strict=True)]
    left = budget - sum(costs)
    steps: list[tuple[float, int, int, int, int, int]] = []
    for i, site in enumerate(sites):
        _, climbs = _steps(site)
        for number, start in enumerate(range(0, len(site.loss), site.block)):
            energy = sum(site.loss[start : start + site.block])
            size = min(site.block, len(site.loss) - start)
            for rung, (low, high) in enumerate(climbs):
                width = (site.element * 8 if high == MODEL else high) - (0 if low == DROPPED else low)
                worth = energy * (distortion(low) - distortion(high)) / (width * size)
                steps.append((-worth, rung, i, number, low, high))
    steps.sort()
    rungs: dict[tuple[int, int], int] = {}
    for i, site in enumerate(sites):
        levels, _ = _steps(site)
        rungs.update({(i, b): 0 for b in range(-(-len(site.loss) // site.block))})
        if levels[0] == DROPPED:
            rungs[i, 0] = 1
    for _, rung, i, number, low, high in steps:
        if rungs[i, number] != rung:
            continue  # the least contents have it, or an earlier step did not fit
        site = sites[i]
        size = min(site.block, len(site.loss) - number * site.block)
        made = dict(counts[i])
        made[low] -= size
        made[high] = made.get(high, 0) + size
        price = row_bytes(made, site) - costs[i]
        if price > left:
            continue
        counts[i], costs[i], left = made, costs[i] + price, left - price
        rungs[i, number] = rung + 1
    return [segments(c) for c in counts]


def segments(counts: dict[int, int]) -> tuple[Segment, ...]:
    """Stored segments by falling precision."""
    return tuple(Segment(counts[b], b) for b in (MODEL, *BITS) if counts.get(b))


def predicted(site: Columns, chosen: Sequence[Segment]) -> float:
    """The loss that these segments leave of ``site``."""
    total, at = 0.0, 0
    for columns, bits in chosen:
        total += sum(site.loss[at : at + columns]) * distortion(bits)
        at += columns
    return total + sum(site.loss[at:])
