"""``uniform``: every site keeps the same fraction of its dense bytes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from lorc_fx.schedulers.common import round_wishes, site_bytes
from lorc_fx.schedulers.registry import register_scheduler

if TYPE_CHECKING:
    from lorc_fx.options import Options
    from lorc_fx.records import SiteSpec


@register_scheduler("uniform")
def uniform(sites: Sequence[SiteSpec], budget: int, options: Options) -> list[int]:
    """Bytes per token for each site: ``budget * dense_i / dense`` exactly, rounded to columns by largest remainder.

    ``budget`` is bytes per token and holds at least one column per site (``schedule`` checks it). What a site cannot
    use (it is full) goes to the others.
    """
    fraction = Fraction(budget, sum(site.dense_bytes for site in sites))
    wishes = [(fraction * site.dense_bytes - site.fixed_bytes) / site.column_bytes for site in sites]
    return site_bytes(sites, round_wishes(sites, wishes, budget))
