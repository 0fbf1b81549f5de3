"""Frozen records that flow between the stages of the pipeline.

Axis letters everywhere in the project: B batch, T cached tokens, S query tokens, H heads, D head dim, R rank.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import BadPlan
from .packing import BITS, MODEL, Segment

PLAN_VERSION = 2


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
    ``codec.condition_number``); ``spectrum`` its singular values, descending, length ``width``. ``depth`` places the
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
    """A cache write that stays dense: where (``node``, a graph name), why (``reason``), and a short ``kind``."""

    node: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class PlannedSite:
    """One line of a plan: the segments of columns that the site gets, of ``choices`` means, and what they cost in bytes
    per token (positions included)."""

    layer: int
    kind: str
    width: int
    segments: tuple[Segment, ...]
    choices: int
    bytes: int
    dense_bytes: int
    window: int | None
    cond: float

    @property
    def rank(self) -> int:
        """Stored columns, at whatever precision."""
        return sum(s.columns for s in self.segments)

    def line(self) -> dict[str, Any]:
        segments = [[s.columns, "model" if s.bits == MODEL else s.bits] for s in self.segments]
        return {**asdict(self), "segments": segments}

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> PlannedSite:
        """Raises TypeError, KeyError or ValueError for a line that is none."""
        segments = []
        for columns, bits in line["segments"]:
            if isinstance(columns, bool) or not isinstance(columns, int) or bits not in ("model", *BITS):
                raise ValueError(f"segment {[columns, bits]} is not [columns, 'model' or one of {BITS}]")
            segments.append(Segment(columns, MODEL if bits == "model" else bits))
        return cls(**{**line, "segments": tuple(segments)})


@dataclass(frozen=True)
class Plan:
    """What each site gets. ``ranks`` maps (layer, kind) to columns."""

    sites: tuple[PlannedSite, ...]

    @property
    def ranks(self) -> dict[tuple[int, str], int]:
        return {(s.layer, s.kind): s.rank for s in self.sites}

    @property
    def bytes_per_token(self) -> int:
        return sum(s.bytes for s in self.sites)

    @property
    def bytes_per_token_dense(self) -> int:
        return sum(s.dense_bytes for s in self.sites)

    def save(self, path: str | Path) -> None:
        """Write the plan as readable JSON (one line per site), atomically."""
        target = Path(path)
        lines = ",\n".join("  " + json.dumps(s.line()) for s in self.sites)
        text = f'{{"lorc_fx_plan": {PLAN_VERSION}, "sites": [\n{lines}\n]}}\n'
        partial = target.with_name(target.name + ".part")
        partial.write_text(text)
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan. Raises BadPlan where the file is missing, is no plan, or is of another version."""
        try:
            data = json.loads(Path(path).read_text())
            if data.get("lorc_fx_plan") != PLAN_VERSION:
                raise BadPlan(str(path), f"it is not a plan of version {PLAN_VERSION}")
            return cls(tuple(PlannedSite.of_line(s) for s in data["sites"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as why:
            if isinstance(why, BadPlan):
                raise
            raise BadPlan(str(path), f"it cannot be read as a plan ({why})") from None
