"""Rank correlation, as Spearman defined it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1 up; equal values share the mean of theirs."""
    order = sorted(values)
    first = {value: order.index(value) for value in set(values)}
    count = {value: order.count(value) for value in first}
    return [first[value] + (count[value] + 1) / 2 for value in values]


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, in [-1, 1]; None where one side does not vary, or there is one pair.
    Raises ValueError for sequences of different lengths."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values and {len(y)} are no pairs")
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(ranks(x), ranks(y))
