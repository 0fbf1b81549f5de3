"""``explain``: what would be compressed in a model, how, at what cost, and what would not and why."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from .backend import examine
from .device import device_of
from .errors import StrictMiss, UnloadedWeights
from .options import FIRST_PROMPT, FIRST_PROMPT_TOKENS, Options
from .packing import MODEL, Segment
from .passes.alternatives import BASES, Alternative
from .passes.cost import Device, seconds
from .passes.sites import UNREAD
from .records import Fidelity, Miss, Plan
from .store import fidelity

STEP_TOKENS = 8192
"""Cached tokens for which reports predict the time of a decode step."""


@dataclass(frozen=True)
class SiteReport:
    """One site: widths and ranks in columns, ``segments`` how many of them at which precision, bytes per token,
    ``energy`` the share of the site's energy (without statistics: of its weight's squared singular values) that the
    stored columns hold, ``lowering`` how a decode step reads it, ``singular`` its weight's singular values, descending
    (too many for ``Report.json``), ``predicted`` the loss that is expected (``PlannedSite``), ``others`` what other
    bases would cost at the same bytes (``explain`` alone asks for that)."""

    layer: int
    kind: str
    width: int
    rank: int
    segments: tuple[Segment, ...]
    epilogue: str
    cond: float
    sigma_max: float
    sigma_min: float
    energy: float
    bytes: int
    dense_bytes: int
    window: int | None
    lowering: str
    codec_bytes: int
    row_bytes: int
    latent_width: int
    query_heads: int
    head_dim: int
    dtype_bytes: int
    singular: tuple[float, ...] = ()
    groups: int = 1
    unprojected: bool = False
    predicted: float | None = None
    nats: bool = False
    others: tuple[Alternative, ...] = ()

    def sizes(self, tokens: int, batch: int, other: Alternative | None = None) -> dict[str, int]:
        """What ``cost.counted`` needs for one decode step, as planned or in another basis."""
        kept, rows = tokens if self.window is None else min(tokens, self.window), other or self
        sizes = {"B": batch, "T": kept, "S": 1, "H": self.query_heads, "D": self.head_dim, "n": self.width}
        return sizes | {"k": rows.latent_width, "w": rows.row_bytes, "e": self.dtype_bytes, "g": rows.groups}

    def line(self) -> dict[str, Any]:
        """As plain data, without the singular values."""
        return {name: v for name, v in asdict(self).items() if name != "singular"} | {"segments": self.precision()}

    def precision(self) -> str:
        """The stored columns in words: "115", or "64 x 8 bits + 128 x 4 bits"."""
        if all(bits == MODEL for _, bits in self.segments):
            return str(self.rank)
        return " + ".join(f"{n}" if bits == MODEL else f"{n} x {bits} bits" for n, bits in self.segments)

    @property
    def basis(self) -> str:
        """The one that was chosen, by the names of ``alternatives.BASES``."""
        return "identity" if self.unprojected else "grouped" if self.groups > 1 else "joint"


@dataclass(frozen=True)
class Report:
    """What ``explain`` found. Bytes are per cached token over all sites, positions included. ``waiting``: this is how
    short prompts are coded; the first long enough one brings statistics, and then other segments. ``fidelity``: what
    that prompt showed, once it has come. ``where`` the model is, for predictions of time."""

    sites: tuple[SiteReport, ...]
    misses: tuple[Miss, ...]
    plan: Plan | None
    waiting: bool = False
    fidelity: tuple[Fidelity, ...] = ()
    where: torch.device = torch.device("cpu")

    @property
    def bytes_per_token(self) -> int:
        return sum(s.bytes for s in self.sites)

    @property
    def bytes_per_token_dense(self) -> int:
        return sum(s.dense_bytes for s in self.sites)

    @property
    def codec_bytes(self) -> int:
        """Bytes of all encode and decode matrices, held once per model."""
        return sum(s.codec_bytes for s in self.sites)

    @property
    def break_even(self) -> int | None:
        """The least length of one sequence, in tokens, at which cache and codecs together are no larger than the dense
        cache; None where no length is enough. A site with a window saves nothing more past its window."""
        tokens, missing = 0, self.codec_bytes
        for end in [*sorted({s.window for s in self.sites if s.window is not None}), None]:
            saved = sum(s.dense_bytes - s.bytes for s in self.sites if s.window is None or s.window > tokens)
            length = 0 if not missing else -(-missing // saved) if saved > 0 else None
            if length is not None and (end is None or tokens + length <= end):
                return tokens + length
            if end is not None:
                tokens, missing = end, missing - saved * (end - tokens)
        return None

    def step_seconds(self, tokens: int, batch: int = 1, device: Device | None = None) -> tuple[float, float]:
        """What attention over ``tokens`` cached tokens takes at least in one decode step, in seconds: as coded, and
        dense (``cost.seconds``). ``device``: whose figures; None for those of the model's own."""
        here = device_of(self.where) if device is None else device
        ways = ((s.lowering, s.sizes(tokens, batch)) for s in self.sites)
        coded = sum(seconds(lowering, here, **sizes) for lowering, sizes in ways)
        return coded, sum(seconds("dense", here, **s.sizes(tokens, batch)) for s in self.sites)

    def __rich__(self) -> Group:
        table = Table(title=f"{len(self.sites)} sites, {len(self.misses)} misses")
        for name in ("layer", "site", "width", "rank", "between projection and cache", "cond", "energy kept"):
            table.add_column(name, justify="left" if name.startswith(("site", "between")) else "right")
        for name in ("bytes", "of", "tokens kept", "read by"):
            table.add_column(name, justify="right")
        for s in self.sites:
            row = [str(s.layer), s.kind, str(s.width), s.precision(), s.epilogue, f"{s.cond:.3g}", f"{s.energy:.1%}"]
            table.add_row(*row, str(s.bytes), str(s.dense_bytes), str(s.window or "all"), s.lowering)
        return Group(table, Text(self._summary()), *self._errors(), *self._others())

    def _others(self) -> list[Table]:
        """What was chosen, and what each basis would cost."""
        if not any(s.others for s in self.sites):
            return []
        here = device_of(self.where)
        unit = "nats per token" if all(s.nats for s in self.sites) else "share of energy"
        text = f"at the same bytes: loss ({unit}), us a step at least"
        table = Table(title=text)
        for name in ("layer", "site", "chosen", *BASES):
            table.add_column(name, justify="left" if name in ("site", "chosen") else "right")
        for s in self.sites:
            cells = {o.basis: f"{o.loss:.2g}, {1e6 * self._seconds(s, o, here):.0f}" for o in s.others}
            table.add_row(str(s.layer), s.kind, s.basis, *(cells.get(name, "too few bytes") for name in BASES))
        return [table]

    @staticmethod
    def _seconds(site: SiteReport, other: Alternative, device: Device) -> float:
        return seconds(other.lowering, device, **site.sizes(STEP_TOKENS, 1, other))

    def _errors(self) -> list[Table]:
        """What the first prompt showed, if it has come."""
        if not self.fidelity:
            return []
        table = Table(title="relative error on the first prompt")
        for name in ("site", "predicted", "measured"):
            table.add_column(name, justify="left" if name == "site" else "right")
        for f in self.fidelity:
            table.add_row(f.name, f"{f.predicted:.1%}", f"{f.measured:.1%}")
        return [table]

    def _summary(self) -> str:
        lines = []
        if self.sites:
            share = self.bytes_per_token / self.bytes_per_token_dense
            paid = self.break_even
            when = f"paid for after {paid} tokens" if paid is not None else "paid for at no length"
            lines.append(
                f"{self.bytes_per_token} bytes per token instead of {self.bytes_per_token_dense} ({share:.1%}); "
                f"codecs hold {self.codec_bytes} bytes, {when}."
            )
        if self.fidelity and self.sites:
            lines.append(
                "That is without statistics. The first prompt has come, and caches are coded with what it showed: "
                "their columns have other bits."
            )
        elif self.waiting and self.sites:
            lines.append(
                f"That is without statistics: the first prompt of {FIRST_PROMPT_TOKENS} tokens or more gives them, and "
                "then columns get other bits. `lorc calibrate` gives them now."
            )
        if self.sites:
            here = device_of(self.where)
            coded, dense = self.step_seconds(STEP_TOKENS, device=here)
            lines.append(
                f"On {here.name} ({here.source}) attention over {STEP_TOKENS} tokens takes at least "
                f"{1e3 * coded:.3g} ms in a decode step, {1e3 * dense:.3g} ms with a dense cache."
            )
        lines += [f"miss: {miss}" for miss in self.misses]
        return "\n".join(lines or ["No cached key or value comes from a projection of this model."])

    def json(self) -> dict[str, Any]:
        """All of it as plain data."""
        coded, dense = self.step_seconds(STEP_TOKENS) if self.sites else (0.0, 0.0)
        return {
            "sites": [s.line() | {"others": self._costs(s)} for s in self.sites],
            "misses": [asdict(m) for m in self.misses],
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_token_dense": self.bytes_per_token_dense,
            "codec_bytes": self.codec_bytes,
            "break_even_tokens": self.break_even,
            "waiting_for_first_prompt": self.waiting,
            "fidelity": [asdict(f) for f in self.fidelity],
            "step": {"tokens": STEP_TOKENS, "coded_seconds": coded, "dense_seconds": dense},
        }

    def _costs(self, site: SiteReport) -> list[dict[str, Any]]:
        here = device_of(self.where) if site.others else None
        return [
            {"basis": o.basis, "loss": o.loss, "lowering": o.lowering, "seconds": self._seconds(site, o, here)}
            for o in site.others
            if here is not None
        ]

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(self)
        return out.getvalue()


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run ``model(*args, **kwargs)`` once (dense, under no_grad), and report what backend="lorc" with ``options``
    would make of its cache; prints the report as a table.

    A model must be called so that it fills a cache (``use_cache=True``). Raises StrictMiss for a miss with ``strict``,
    UnloadedWeights for weights on ``meta``, BudgetTooSmall, BadPlan or BadCalibration where budget, plan or
    calibration do not fit the model, and what ``Options`` raises.
    """
    report = examined(model, args, kwargs, Options.parse(options), others=True)
    Console(width=140).print(report)
    return report


def make_plan(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Plan:
    """The plan that backend="lorc" with ``options`` would follow for this model, before a first prompt gives
    statistics: ``Plan.save(path)``, and ``options={"plan": plan or path}`` uses it without planning again.
    Raises what ``explain`` raises."""
    return examined(model, args, kwargs, Options.parse(options)).plan or Plan(())


def examined(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options, others: bool = False
) -> Report:
    """``explain`` without printing, and without ``others`` than the basis that is chosen. A model with graph breaks
    gives the sites of all its graphs."""
    sites: list[SiteReport] = []
    misses: list[Miss] = []
    plans: list[Plan] = []

    def record(gm: GraphModule, examples: Sequence[Any]) -> None:
        found, missed, plan = examine(gm, examples, options, others)
        offset = 1 + max((s.layer for s in sites), default=-1)
        sites.extend(SiteReport(**{**s, "layer": s["layer"] + offset}) for s in found)
        misses.extend(missed)
        plans.append(plan)

    traced(model, args, kwargs, record)
    lost = [m for m in misses if m.kind != UNREAD]
    if options.strict and lost:
        raise StrictMiss(lost)
    waiting = options.calibration == FIRST_PROMPT
    weight = next(model.parameters(), None)
    where = torch.device("cpu") if weight is None else weight.device
    plan = Plan.joined(plans) if sites else None
    return Report(tuple(sites), tuple(misses), plan, waiting, fidelity(model), where)


def traced(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    visit: Callable[[GraphModule, Sequence[Any]], None],
) -> Any:
    """Run the model once, dense and under no_grad, and show each of its graphs to ``visit`` with its inputs; what it
    returned. Raises UnloadedWeights, and what ``visit`` raises."""
    check_loaded(model)
    failed: list[BaseException] = []

    def record(gm: GraphModule, examples: Sequence[Any]) -> Any:
        try:
            visit(gm, examples)
        except Exception as error:  # raised again below, as its own class instead of torch's wrapper
            failed.append(error)
        return gm.forward

    compiled = torch.compile(uncompiled(model), backend=record)
    with torch.no_grad():
        out = compiled(*args, **kwargs)
    if failed:
        raise failed[0]
    return out


def check_loaded(model: torch.nn.Module) -> None:
    """Torch's own error for a model on ``meta`` comes from deep inside of a trace and names no weight."""
    unloaded = [name for name, weight in model.named_parameters() if weight.is_meta]
    if unloaded:
        raise UnloadedWeights(unloaded)


def uncompiled(model: torch.nn.Module) -> Any:
    """The model's own forward, whether or not it was compiled in place."""
    module = getattr(model, "_orig_mod", model)

    def run(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # Dynamo counts recompiles by the code object, and runs code as it is that has had too many: each call gets its own.
    run.__code__ = run.__code__.replace()
    return run
