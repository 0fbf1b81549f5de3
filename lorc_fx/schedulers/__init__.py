"""Schedulers: sites + budget (bytes per token) -> bytes per site. One file each.

A scheduler is a function ``(sites, budget, options) -> list[int]`` with one int per site, ``fixed_bytes + k *
column_bytes`` for 1 <= k <= width, together at most the budget. ``@register_scheduler("mine")`` makes it known as
``options={"scheduler": "mine"}``; ``schedule`` runs one and checks what it returns.
"""

from lorc_fx.schedulers.energy import energy
from lorc_fx.schedulers.loss import loss
from lorc_fx.schedulers.progressive import depths, progressive, progressive_ranks
from lorc_fx.schedulers.registry import (
    Scheduler,
    get_scheduler,
    register_scheduler,
    registered_schedulers,
    schedule,
)
from lorc_fx.schedulers.uniform import uniform

__all__ = [
    "Scheduler",
    "depths",
    "energy",
    "get_scheduler",
    "loss",
    "progressive",
    "progressive_ranks",
    "register_scheduler",
    "registered_schedulers",
    "schedule",
    "uniform",
]
