"""The registry of schedulers, and the one place where what a scheduler returns is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from lorc_fx.errors import AlreadyRegistered, BadOption, BadSchedule, BudgetTooSmall, UnknownScheduler
from lorc_fx.schedulers.common import least_bytes

if TYPE_CHECKING:
    from lorc_fx.options import Options
    from lorc_fx.records import SiteSpec


class Scheduler(Protocol):
    """Decides how many bytes per token each site gets.

    ``sites`` all keep the same number of tokens (one ``window``); ``budget`` is bytes per token for all of them
    together. The result has one int per site: ``fixed_bytes + k * column_bytes`` with ``1 <= k <= width``; its sum
    is at most ``budget``.
    """

    def __call__(self, sites: Sequence[SiteSpec], budget: int, options: Options) -> list[int]:
        """Bytes per token for each site, in the order of ``sites``."""
        ...


S = TypeVar("S", bound=Callable[..., list[int]])

_REGISTRY: dict[str, Scheduler] = {}


def register_scheduler(name: str) -> Callable[[S], S]:
    """Decorator: make a scheduler known as ``options={"scheduler": name}``.

    Raises BadOption for a name that is no string or empty, AlreadyRegistered where the name is in use.
    """
    if not isinstance(name, str) or not name.strip():
        raise BadOption("name", name, "a non-empty string")

    def register(function: S) -> S:
        if name in _REGISTRY:
            raise AlreadyRegistered("scheduler", name, _label(_REGISTRY[name]))
        if not callable(function):
            raise BadOption(f"scheduler {name!r}", function, "a function (sites, budget, options) -> list[int]")
        _REGISTRY[name] = function
        return function

    return register


def registered_schedulers() -> tuple[str, ...]:
    """The names that ``scheduler=`` accepts, sorted."""
    return tuple(sorted(_REGISTRY))


def get_scheduler(name: str) -> Scheduler:
    """The scheduler registered under ``name``. Raises UnknownScheduler."""
    found = _REGISTRY.get(name) if isinstance(name, str) else None
    if found is None:
        raise UnknownScheduler(name, _REGISTRY)
    return found


def schedule(scheduler: str | Scheduler, sites: Sequence[SiteSpec], budget: int, options: Options) -> list[int]:
    """Run a scheduler (by name or as a function) and check what it returns.

    ``budget`` and the result are bytes per token; the result has one entry per site. Raises BudgetTooSmall where not
    one column per site fits, UnknownScheduler, BadOption for a budget that is no int or sites of several windows,
    BadSchedule where the result breaks the contract, and what the scheduler itself raises.
    """
    function = get_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
    label = scheduler if isinstance(scheduler, str) else _label(scheduler)
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BadOption("budget", budget, "an int, bytes per token")
    windows = {site.window for site in sites}
    if len(windows) > 1:
        raise BadOption("sites", windows, "sites of one window: call once per group that keeps the same tokens")
    if not sites:
        return []
    least = least_bytes(sites)
    if budget < least:
        raise BudgetTooSmall(
            budget, least, sum(site.dense_bytes for site in sites), len(sites), sum(site.fixed_bytes for site in sites)
        )
    result = function(tuple(sites), budget, options)
    _check(label, result, sites, budget)
    return [int(value) for value in result]


def _check(label: str, result: object, sites: Sequence[SiteSpec], budget: int) -> None:
    """Raises BadSchedule unless ``result`` is a schedule of ``sites`` within ``budget`` bytes per token."""
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise BadSchedule(label, f"{type(result).__name__} instead of a list")
    if len(result) != len(sites):
        raise BadSchedule(label, f"{len(result)} entries for {len(sites)} sites")
    for index, (value, site) in enumerate(zip(result, sites, strict=True)):
        where = f"entry {index} (layer {site.layer} {site.kind}) is {value!r}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadSchedule(label, f"{where}, no int")
        columns, rest = divmod(value - site.fixed_bytes, site.column_bytes)
        if rest:
            raise BadSchedule(label, f"{where}, not {site.fixed_bytes} + k * {site.column_bytes}")
        if not 1 <= columns <= site.width:
            raise BadSchedule(label, f"{where}, {columns} columns of 1..{site.width}")
    total = sum(result)
    if total > budget:
        raise BadSchedule(label, f"{total} bytes per token in all, the budget is {budget}")


def _label(function: object) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))
