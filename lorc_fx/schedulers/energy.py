"""``energy``: columns go where they keep most of a site's energy, per byte (reverse water-filling).

The energy of column i of a site is sigma_i^2 / sum sigma^2, so each key and each value site of each layer counts the
same: unnormalised, layers with large weights would take everything.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorc_fx.errors import BadOption
from lorc_fx.schedulers.common import least_bytes, site_bytes
from lorc_fx.schedulers.registry import register_scheduler

if TYPE_CHECKING:
    from lorc_fx.options import Options
    from lorc_fx.records import SiteSpec


def column_energy(site: SiteSpec) -> list[float]:
    """Relative energy of each column, descending, summing to 1 (all 0 for an all-zero weight). Length ``width``.

    Raises BadOption where the spectrum is longer than the width, or not finite and non-negative. Missing singular
    values are zeros.
    """
    spectrum = site.spectrum
    if len(spectrum) > site.width or any(not math.isfinite(s) or s < 0 for s in spectrum):
        allowed = f"at most {site.width} finite singular values, none negative"
        raise BadOption(f"spectrum of layer {site.layer} {site.kind}", f"{len(spectrum)} values", allowed)
    largest = max(spectrum, default=0.0)
    if largest == 0.0:
        return [0.0] * site.width
    squares = sorted(((s / largest) ** 2 for s in spectrum), reverse=True)
    total = math.fsum(squares)
    return [s / total for s in squares] + [0.0] * (site.width - len(squares))


@register_scheduler("energy")
def energy(sites: Sequence[SiteSpec], budget: int, options: Options) -> list[int]:
    """Bytes per token for each site: greedily the column with most energy per byte that still fits.

    ``budget`` is bytes per token and holds at least one column per site (``schedule`` checks it). Ties go to the site
    with fewer columns, then to the lower index. Raises BadOption for a bad spectrum.
    """
    gains = [column_energy(site) for site in sites]
    ranks = [1] * len(sites)
    left = budget - least_bytes(sites)

    def entry(i: int) -> tuple[float, int, int]:
        return (-gains[i][ranks[i]] / sites[i].column_bytes, ranks[i], i)

    heap = [entry(i) for i, site in enumerate(sites) if site.width > 1]
    heapq.heapify(heap)
    while heap:
        _, _, i = heapq.heappop(heap)
        if sites[i].column_bytes > left:
            continue  # what is left only shrinks: this site is done
        left -= sites[i].column_bytes
        ranks[i] += 1
        if ranks[i] < sites[i].width:
            heapq.heappush(heap, entry(i))
    return site_bytes(sites, ranks)
