"""Options: every option of ``torch.compile(model, backend="lorc", options={...})``, validated in one place.

``Options`` is frozen and hashable, so it can be part of a cache key. Without data (``calibration="none"``) scheduler
and precision are the paper's (``PAPER``) by default.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn

from lorc_fx import formulas
from lorc_fx.bases import BUILT_IN, GROUPED, registered_bases
from lorc_fx.compat import backends, inductor_modes
from lorc_fx.errors import BadOption, BadPlan, ConflictingOptions, UnknownBackend, UnknownOption
from lorc_fx.schedulers import get_scheduler

if TYPE_CHECKING:
    from lorc_fx.records import SiteSpec

DEFAULT_RATIO = 0.45
#: knobs that only the progressive schedule has
PROGRESSIVE_KNOBS = ("d_min", "d_max", "protect_first", "protect_last")
#: option -> its values
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("model", "int8", "int4", "auto"),
    "basis": BUILT_IN,
    "objective": ("balanced", "bytes", "time"),
}
#: the ``calibration`` that waits for the first long enough prompt
FIRST_PROMPT = "first-prompt"
#: real tokens, over all rows, that such a prompt must have
FIRST_PROMPT_TOKENS = 256
#: the options that a codec depends on, beside the weights
CODEC_OPTIONS = (
    "ratio", "bytes_per_token", "scheduler", "precision", "d_min", "d_max", "protect_first", "protect_last",
    "calibration", "plan", "basis", "group_size", "objective",
)  # fmt: skip


class FrozenOptions(dict[str, Any]):
    """A dict that cannot be changed; ``PAPER | {"ratio": 0.5}`` and ``dict(PAPER)`` give ordinary dicts.

    A dict (not a mapping proxy), since callers deep-copy, pickle and serialise the options they are given.
    """

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("these options are immutable: make your own with dict(PAPER, ratio=0.5)")

    __setitem__ = __delitem__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        return dict(self) | dict(other)

    def __copy__(self) -> FrozenOptions:
        return self

    def __deepcopy__(self, memo: object) -> FrozenOptions:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (FrozenOptions, (dict(self),))

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


#: the options of the paper's method (arXiv 2410.03111)
PAPER = FrozenOptions(scheduler="progressive", precision="model", basis="joint", calibration="none")


@dataclass(frozen=True)
class Options:
    """All options, validated on construction. Budgets are bytes per token, ranks are columns.

    Raises BadOption, ConflictingOptions, UnknownScheduler, UnknownBackend, BadPlan or BadCalibration. ``ratio`` is
    0.45 where neither it nor ``bytes_per_token`` nor ``plan`` is given, else None. Where the data is known or will be
    (``calibration`` is not "none"), the default ``scheduler`` is "loss" (but "progressive" with one of its knobs) and
    ``precision`` "auto"; else they are the paper's, "progressive" and "model".
    """

    ratio: float | Fraction | None = None
    bytes_per_token: int | None = None
    scheduler: str | None = None
    precision: str | None = None
    d_min: int | None = None
    d_max: int | None = None
    protect_first: int = 0
    protect_last: int = 0
    mode: str | None = None
    basis: str | tuple[str, str] = "auto"
    group_size: int | None = None
    objective: str = "balanced"
    calibration: Any = FIRST_PROMPT
    plan: Any = None
    inner: str | Callable[..., Any] = "inductor"
    strict: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None = None, /, **kwargs: Any) -> Options:
        """Options from a mapping (as torch.compile passes it), keywords (None: not given), or both.

        Raises UnknownOption for a name that does not exist, ConflictingOptions where mapping and keyword disagree,
        and all that ``Options`` raises.
        """
        if isinstance(options, Options):
            options = options.given()
        elif not (options is None or isinstance(options, Mapping)):
            raise BadOption("options", options, "a mapping of option names to values, or None", {})
        known = tuple(field.name for field in fields(cls))
        merged = dict(options or {})
        for name, value in kwargs.items():
            if name in merged and value is not None and merged[name] is not None and merged[name] != value:
                reason = f"options say {merged[name]!r}, the keyword says {value!r}"
                raise ConflictingOptions((f"options[{name!r}]", name), reason, "Give it once")
            if value is not None or name not in known:
                merged[name] = value
        for name in merged:
            if name not in known:
                raise UnknownOption(name, known)
        return cls(**merged)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, for reports and for ``parse``."""
        standard = {field.name: field.default for field in fields(self)} | {"ratio": DEFAULT_RATIO}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        implied = Options(calibration=self.calibration, **{name: values[name] for name in PROGRESSIVE_KNOBS})
        standard |= {"scheduler": implied.scheduler, "precision": implied.precision}
        return {name: value for name, value in values.items() if value is not None and value != standard[name]}

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", _calibration(self.calibration))
        object.__setattr__(self, "plan", _plan(self.plan))
        if self.plan is not None:
            self._check_plan()
        informed = self.calibration != "none"
        knobs = any(getattr(self, name) for name in PROGRESSIVE_KNOBS)
        scheduler, precision = "loss" if informed and not knobs else "progressive", "auto" if informed else "model"
        if self.scheduler is None:
            object.__setattr__(self, "scheduler", scheduler)
        if self.precision is None:
            object.__setattr__(self, "precision", precision)
        self._check_budget()
        self._check_schedule(scheduler)
        for name, default in (("precision", precision), ("basis", "auto"), ("objective", "balanced")):
            object.__setattr__(self, name, _choice(name, getattr(self, name), default))
        if self.group_size is not None:
            _integer("group_size", self.group_size, 1, 1)
            if GROUPED not in (self.basis_for("key"), self.basis_for("value")):
                reason = "only grouped bases have groups"
                raise ConflictingOptions(("group_size", f"basis={self.basis!r}"), reason, "Give basis='grouped' too")
        if not isinstance(self.strict, bool):
            raise BadOption("strict", self.strict, "True or False", False)
        _check_inner(self.inner)
        _check_mode(self.mode, self.inner)
        if self.ratio is None and self.bytes_per_token is None and self.plan is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)

    def _check_plan(self) -> None:
        """A plan says what each site gets, and may bring what its codecs need of the data: no prompt changes that."""
        names = [name for name in ("ratio", "bytes_per_token", *PROGRESSIVE_KNOBS) if getattr(self, name)]
        if names:
            reason = "a plan already says what each site gets"
            raise ConflictingOptions(("plan", *names), reason, "Give the plan alone, or make a new one")
        if self.calibration == FIRST_PROMPT:
            object.__setattr__(self, "calibration", "none")
        if self.calibration != "none" and getattr(self.plan, "bases", ()):
            reason = "this plan already holds what its calibration said"
            raise ConflictingOptions(("plan", "calibration"), reason, "Give the plan alone, or make a new one")

    def _check_budget(self) -> None:
        if self.ratio is not None:
            number = isinstance(self.ratio, (int, float, Fraction)) and not isinstance(self.ratio, bool)
            if not number or not 0 < self.ratio <= 1:
                raise BadOption("ratio", self.ratio, "a number in (0, 1]", DEFAULT_RATIO)
        if self.bytes_per_token is not None:
            _integer("bytes_per_token", self.bytes_per_token, 1, None)
            if self.ratio is not None:
                raise ConflictingOptions(("ratio", "bytes_per_token"), "both set the budget", "Give one of them")

    def _check_schedule(self, default: str) -> None:
        if not isinstance(self.scheduler, str):
            hint = " A function becomes a scheduler with @lorc_fx.register_scheduler(name)."
            raise BadOption("scheduler", self.scheduler, "the name of a registered scheduler", default, hint)
        get_scheduler(self.scheduler)
        for name in ("d_min", "d_max"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, None)
        for name in ("protect_first", "protect_last"):
            _integer(name, getattr(self, name), 0, 0)
        knobs = [name for name in PROGRESSIVE_KNOBS if getattr(self, name)]
        if knobs and self.scheduler != "progressive":
            reason = "these knobs belong to the progressive schedule"
            raise ConflictingOptions((f"scheduler={self.scheduler!r}", *knobs), reason, "Leave the knobs out")
        if self.d_min is not None and self.d_max is not None and self.d_min > self.d_max:
            reason = f"d_min={self.d_min} is above d_max={self.d_max}"
            raise ConflictingOptions(("d_min", "d_max"), reason, "Give 1 <= d_min <= d_max <= width")

    def basis_for(self, kind: str) -> str:
        """The basis of "key" or "value" sites."""
        return self.basis[kind == "value"] if isinstance(self.basis, tuple) else str(self.basis)

    def budget(
        self, group: Sequence[SiteSpec], sites: Sequence[SiteSpec] | None = None, fixed: Sequence[int] | None = None
    ) -> int:
        """Bytes per token that the sites of ``group`` (one window) may use; exact integers.

        With ``ratio`` it is floor(ratio * dense bytes of the group); at ratio 1 what the sites store besides columns
        (positions: ``fixed``, by default each site's ``fixed_bytes``) comes on top. With ``bytes_per_token`` the group
        gets its share by dense bytes of all ``sites`` (default: the group is all). Raises ConflictingOptions where a
        plan replaces the budget.
        """
        dense = sum(site.dense_bytes for site in group)
        if self.bytes_per_token is not None:
            total = sum(site.dense_bytes for site in (group if sites is None else sites))
            return formulas.budget_bytes(Fraction(self.bytes_per_token, max(total, 1)), dense)
        if self.ratio is None:
            raise ConflictingOptions(("plan", "ratio"), "a plan has no budget", "Use the plan's own bytes")
        extra = [site.fixed_bytes for site in group] if fixed is None else fixed
        return formulas.budget_bytes(self.ratio, dense) + (sum(extra) if self.ratio == 1 else 0)


def _integer(name: str, value: object, low: int, default: object) -> None:
    """Raises BadOption unless ``value`` is an int (no bool) of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise BadOption(name, value, f"an int of at least {low}", default)


def _choice(name: str, value: object, default: str) -> Any:
    """A value of ``CHOICES``, or (basis only) a pair of them for K and V, which is one value where both are the
    same. Raises BadOption for any other."""
    choices = CHOICES[name] + (registered_bases() if name == "basis" else ())
    allowed = " or ".join(repr(choice) for choice in choices)
    if name == "basis":
        allowed += ", or a pair of these for keys and values"
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, str) for part in value):
            pair = tuple(_choice(name, part, default) for part in value)
            return pair[0] if pair[0] == pair[1] else pair
    if isinstance(value, str) and value in choices:
        return value
    raise BadOption(name, value, allowed, default)


def _calibration(value: Any) -> Any:
    """What ``calibration`` says, a path read. Raises BadCalibration where it cannot be, BadOption for anything else."""
    from lorc_fx.calibration import Calibration

    words = ("none", FIRST_PROMPT)
    if isinstance(value, Calibration) or value in words:
        return value
    typo = isinstance(value, str) and bool(difflib.get_close_matches(value, words, cutoff=0.7))
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value and not typo):
        return Calibration.load(value)
    allowed = "'none', 'first-prompt', a Calibration, or the path of a saved one"
    raise BadOption("calibration", value, allowed, FIRST_PROMPT)


def _plan(plan: Any) -> Any:
    """None, or a plan (has ``ranks`` and is hashable), a path read: codecs follow its content, not its name. Raises
    BadPlan."""
    if isinstance(plan, (str, os.PathLike)):
        from lorc_fx.records import Plan

        path = os.fsdecode(plan)
        if not path:
            raise BadPlan(plan, "the path is empty")
        return Plan.load(path)
    if plan is not None and not hasattr(plan, "ranks"):
        raise BadPlan(plan, f"a {type(plan).__name__} is neither a Plan nor a path")
    try:
        hash(plan)
    except TypeError:
        raise BadPlan(plan, "it cannot be hashed, so it cannot be part of a cache key") from None
    return plan


def _check_inner(inner: object) -> None:
    """Raises UnknownBackend unless ``inner`` is a callable or a backend name of torch other than lorc."""
    if callable(inner) and getattr(inner, "__module__", None) != "lorc_fx.backend":
        if type(inner).__hash__ is None:
            raise BadOption("inner", inner, "a backend name or a hashable callable", "inductor")
        return
    known = [name for name in backends() if name != "lorc"]
    if not isinstance(inner, str) or inner not in known:
        raise UnknownBackend(inner, known)


def _check_mode(mode: object, inner: object) -> None:
    """Raises BadOption for a mode that torch.compile lacks, ConflictingOptions where ``inner`` takes none."""
    if mode is None:
        return
    known = inductor_modes()
    if not isinstance(mode, str) or mode not in known:
        raise BadOption("mode", mode, "one of " + ", ".join(repr(name) for name in known))
    if inner != "inductor" and mode != "default":
        raise ConflictingOptions(("mode", "inner"), f"inner={inner!r} has no modes", "Leave mode out")
