"""Frozen records that flow between the stages of the pipeline.

Axis letters everywhere in the project: B batch, T cached tokens, S query tokens, H heads, D head dim, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import plan_file
from .errors import BadPlan
from .packing import BITS, MODEL, Segment
from .plan_data import SiteBasis


@dataclass(frozen=True)
class Depth:
    """A layer's place in the whole model: log of its cumulative condition number, the least and the largest such
    number over all layers, and the index of the last layer."""

    log_cumulative: float
    log_min: float
    log_max: float
    last: int


@dataclass(frozen=True)
class SiteSpec:
    """What a scheduler may know of one site (one cached key or value projection).

    ``layer`` numbers the attention layers from 0 (shallow) and pairs a key site with its value site; ``kind`` is
    ``"key"`` or ``"value"``; ``width`` is n = H_kv * D, the largest useful rank; ``column_bytes`` is what one
    latent column costs per token, in bytes; ``fixed_bytes`` is what the site costs per token before any column
    (positions); ``dense_bytes`` is the dense cache's cost per token; ``window`` is the number of tokens the site
    keeps (None: all of them); ``cond`` is sigma_max / sigma_min of the effective weight (floored, see
    ``factors.condition_number``); ``spectrum`` its singular values, descending, length ``width``. ``depth`` places the
    layer in the whole model, which the sites of one window are only a part of (None: they are all).
    """

    layer: int
    kind: str
    width: int
    column_bytes: int
    fixed_bytes: int
    dense_bytes: int
    cond: float
    spectrum: tuple[float, ...]
    window: int | None = None
    depth: Depth | None = None


@dataclass(frozen=True)
class Miss:
    """A cache write that stays dense: ``node`` in the graph and ``source``, the user's line that it comes from; why, in
    short (``kind``) and in full (``reason``); and what to do (``step``)."""

    node: str
    kind: str
    reason: str
    source: str = ""
    step: str = ""

    def __str__(self) -> str:
        where = f" [{self.source}]" if self.source else ""
        return f"{self.node}: {self.kind}: {self.reason}{where}" + (f"; {self.step}" if self.step else "")


@dataclass(frozen=True)
class PlannedSite:
    """One line of a plan: the segments of columns that the site gets, of ``choices`` means, and what they cost in bytes
    per token (positions included). ``predicted`` is the loss that is expected of that: in nats per token (``nats``), or
    as a share of the site's energy; None in old plans. ``projected``: False for a site that is cached as it is (basis
    "identity"). ``groups``: of heads, each in columns of its own (basis "grouped")."""

    layer: int
    kind: str
    width: int
    segments: tuple[Segment, ...]
    choices: int
    bytes: int
    dense_bytes: int
    window: int | None
    cond: float
    predicted: float | None = None
    nats: bool = False
    projected: bool = True
    groups: int = 1

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.kind}"

    @property
    def rank(self) -> int:
        """Stored columns, at whatever precision."""
        return sum(s.columns for s in self.segments)

    def line(self) -> dict[str, Any]:
        segments = [[s.columns, "model" if s.bits == MODEL else s.bits] for s in self.segments]
        line = {**asdict(self), "segments": segments}
        if self.groups == 1:
            del line["groups"]  # as the plans that had none, and who reads only these
        return line

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> PlannedSite:
        """Raises TypeError, KeyError or ValueError for a line that is none."""
        segments = []
        for columns, bits in line["segments"]:
            if isinstance(columns, bool) or not isinstance(columns, int) or bits not in ("model", *BITS):
                raise ValueError(f"segment {[columns, bits]} is not [columns, 'model' or one of {BITS}]")
            segments.append(Segment(columns, MODEL if bits == "model" else bits))
        groups = line.get("groups", 1)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups {groups!r} is no int of at least 1")
        return cls(**{**line, "segments": tuple(segments)})


@dataclass(frozen=True)
class Plan:
    """What each site gets. ``ranks`` maps (layer, kind) to columns.

    ``bases`` is what the codecs need of the data, one per site in their order: then the plan serves its model alone. It
    is empty where the plan was made without statistics. Plans are compared by content.
    """

    sites: tuple[PlannedSite, ...]
    bases: tuple[SiteBasis, ...] = ()

    def __repr__(self) -> str:
        return f"Plan({len(self.sites)} sites, {self.bytes_per_token} of {self.bytes_per_token_dense} bytes per token)"

    @property
    def ranks(self) -> dict[tuple[int, str], int]:
        return {(s.layer, s.kind): s.rank for s in self.sites}

    @property
    def bytes_per_token(self) -> int:
        return sum(s.bytes for s in self.sites)

    @property
    def bytes_per_token_dense(self) -> int:
        return sum(s.dense_bytes for s in self.sites)

    @property
    def predicted(self) -> float | None:
        """Over all sites: nats per token where ``nats``, else a sum of shares of energy. None where a site has none."""
        known = [s.predicted for s in self.sites if s.predicted is not None]
        return sum(known) if len(known) == len(self.sites) else None

    @property
    def nats(self) -> bool:
        """Whether ``predicted`` is in nats per token (the statistics had gradients)."""
        return bool(self.sites) and all(s.nats for s in self.sites)

    @classmethod
    def joined(cls, plans: Iterable[Plan]) -> Plan:
        """The plans of a model's graphs as one."""
        parts = [plan for plan in plans if plan.sites]
        bases = tuple(b for plan in parts for b in plan.bases) if all(plan.bases for plan in parts) else ()
        return cls(tuple(s for plan in parts for s in plan.sites), bases)

    def places(self) -> dict[tuple[int, str], int]:
        """(layer, kind) -> index of the site. Raises BadPlan where two sites have one name."""
        found: dict[tuple[int, str], int] = {}
        for i, site in enumerate(self.sites):
            if found.setdefault((site.layer, site.kind), i) != i:
                reason = f"it has {site.name} twice (a model with graph breaks has a plan for each of its graphs)"
                raise BadPlan(self, reason)
        return found

    def save(self, path: str | Path) -> None:
        """Write ``NAME.json`` (readable, one line per site) and, where the plan has bases, ``NAME.safetensors`` beside
        it; each is replaced whole. Raises BadPlan for two sites of one name, OSError where nothing can be written."""
        places = self.places()
        tensors = {
            f"{layer}.{kind}.{part}": tensor
            for (layer, kind), i in places.items()
            if self.bases
            for part, tensor in self.bases[i].tensors().items()
        }
        plan_file.write(Path(path), [s.line() for s in self.sites], tensors)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan. Raises BadPlan where a file is missing, cut off, of another version, or no plan's."""
        lines, tensors = plan_file.read(Path(path))
        named: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            site, _, part = name.rpartition(".")
            named.setdefault(site, {})[part] = tensor
        try:
            sites = tuple(PlannedSite.of_line(line) for line in lines)
            bases = tuple(
                SiteBasis.of_tensors(named[f"{s.layer}.{s.kind}"], s.nats, s.groups) for s in sites if tensors
            )
        except (ValueError, TypeError, KeyError) as why:
            raise BadPlan(str(path), f"it cannot be read as a plan ({why})") from None
        return cls(sites, bases)


@dataclass(frozen=True)
class Fidelity:
    """How well a codec reads back what it was made of: |y' - y| / |y - mean|, in the root mean square over tokens that
    are no sinks; as the planner ``predicted`` it from the statistics, and as ``measured`` on tokens of the prompt."""

    name: str
    predicted: float
    measured: float
