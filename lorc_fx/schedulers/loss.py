"""``loss``: bytes go where they remove most predicted loss, over all sites at once (reverse water-filling).

The planner hands this scheduler's work to ``allocate``, which knows the precisions that a column can have and not only
whether it is kept. On plain columns (``precision="model"``) and without statistics that is the ``energy`` schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorc_fx.schedulers.energy import energy
from lorc_fx.schedulers.registry import register_scheduler

if TYPE_CHECKING:
    from lorc_fx.options import Options
    from lorc_fx.records import SiteSpec


@register_scheduler("loss")
def loss(sites: Sequence[SiteSpec], budget: int, options: Options) -> list[int]:
    """Bytes per token for each site, where only whole columns count: see ``energy``."""
    return energy(sites, budget, options)
