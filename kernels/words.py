"""Readers and devices in words, as a tuner's database has them.

Readers of one kind share a name though their codecs differ: plans that follow the data give every layer bits of its
own, and other ones with the next prompt. So widths of latents are rounded up to powers of two.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from lorc_fx.packing import MODEL

from .attend import Attend, Operand
from .config import Given
from .tuned import Target, bucket

TILED_SOURCES = (
    "tiled.py", "tile_readers.py", "fused.py", "chain.py", "native.py", "turned.py", "headers.cpp", "vectors.cpp",
    "rows.cpp", "heads.cpp", "runs.cpp", "turn.cpp", "attend.cpp", "attend_op.cpp",
)  # fmt: skip
"""Of this folder: what runs attention on a CPU."""


def tiled_words(about: Attend, ways: tuple[str, str], heads: int, queries: int) -> str:
    """A reader as ``tiled`` runs it: ``heads`` query heads, ``queries`` of each; ``ways``: what reads keys and values.
    Which bits columns have is left out: what reads a row unpacks it once, and tiles are made of numbers."""
    parts = [f"tiled: {heads} query heads, {queries} queries"]
    for name, o, way in zip(("keys", "values"), (about.keys, about.values), ways, strict=True):
        parts.append(f"{name} {_operand(o)} {'plain' if o.format.plain else 'packed'} by {way}")
    return "; ".join([*parts, _scores(about)])


def kernel_words(about: Attend, given: Given) -> str:
    """A reader as a kernel is generated for it."""
    parts = [f"kernel: {given.heads} query heads, {given.queries} queries, {given.product}"]
    for name, o in (("keys", about.keys), ("values", about.values)):
        bits = "+".join(_dtype(o.format.dtype) if b == MODEL else str(b) for b in sorted({b for _, b in o.format.spec}))
        means = f", {o.format.choices} means" if o.format.choices > 1 else ""
        parts.append(f"{name} {_operand(o)} at {bits}{means}")
    met = ["".join("bhst"[i] for i, m in enumerate((e.batch, e.head, e.query, e.token)) if m) for e in given.extras]
    shapes = [f"{e.kind} [{m}]" for e, m in zip(given.extras, met, strict=True)]
    return "; ".join([*parts, ", ".join([_scores(about), *shapes])])


def _operand(o: Operand) -> str:
    how = "" if o.absorbed else f" ({o.decoder.words})"
    matrix = " latents" if o.decodes else " columns"
    return f"{o.heads} x {o.head_dim}{how} of {1 << bucket(o.format.columns)}{matrix}"


def _scores(about: Attend) -> str:
    """The ops between product and softmax."""
    calls = [n.target for n in about.scores.graph.nodes if n.op.startswith("call_")]
    ops = [str(getattr(target, "_opname", getattr(target, "__name__", target))) for target in calls]
    more = [f"{len(about.extras)} extras"] * bool(about.extras) + ["a sink"] * about.sink
    return ", ".join([f"scores {' '.join(ops) or 'as they are'}", *more])


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- devices ----------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """A GPU by its name; a CPU by its name and the threads that torch uses, which change what is best."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{_cpu()}, {threads} thread{'s' * (threads > 1)}"


@functools.cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def tiled_target() -> Target:
    """Of ``tiled`` on this CPU, with as many threads as torch uses now."""
    return Target(device_name(torch.device("cpu")), _tiled_sources(), "")


@functools.cache
def _tiled_sources() -> str:
    return hashed(Path(__file__).parent / name for name in TILED_SOURCES)


def hashed(files: Iterable[Path]) -> str:
    """A hash of their contents."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
