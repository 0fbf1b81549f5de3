"""Times attention over rows, and the making of new rows, for ``bench.gpu``."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import gpu_cases
from bench.attention_cases import BF16, Given
from bench.gpu_cases import CONFIGS, WAYS, Shape, candidates, grown, reader, row_bytes, words
from bench.gpu_report import Report
from bench.gpu_timing import Call, Clock
from bench.kernel_runs import TOLERANCE
from lorc_fx.errors import KernelWarning
from lorc_fx.kernels import encode, launch, reference
from lorc_fx.kernels.config import Config
from lorc_fx.packing import Format, Segment

KEPT = 3
"""Configs of a way, the best, that are timed at all lengths."""

CHECKED = 2048
"""Tokens over which each config is compared with fp64, at most."""


def jobs(batches: Sequence[int]) -> list[str]:
    """Configs to compile, as jobs of ``bench.kernel_runs``: first the default of all ways."""
    return [f"{way}:{i}:{batch}" for i in range(len(CONFIGS) + 1) for way in WAYS for batch in batches]


def compiled(done: Collection[str], batch: int) -> dict[str, list[int]]:
    """way -> numbers of its configs that ``jobs`` have compiled for a batch."""
    found: dict[str, list[int]] = {way: [] for way in WAYS}
    for job in done:
        way, i, size = job.rsplit(":", 2)
        if int(size) == batch:
            found[way].append(int(i))
    return {way: sorted(numbers) for way, numbers in found.items()}


def wrong(given: Given, config: Config, want: torch.Tensor) -> str | None:
    """Why a config cannot be used: no kernel, or other values than ``want``."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = launch.attend(*given, config)
    for warning in said:
        if issubclass(warning.category, KernelWarning):
            return str(warning.message)[:400]
    error = float((got.double() - want).abs().max() / want.abs().max())
    return None if error < TOLERANCE[given[1].dtype] else f"error {error:.2g}"


def tuned(
    clock: Clock, shape: Shape, way: str, tokens: int, batch: int, chosen: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Milliseconds of a way's configs (``chosen``: their numbers) by name, best first, and why others are out."""
    every = list(candidates(way, shape).items())
    small = grown(reader(way, shape), min(tokens, CHECKED), batch, clock.device)
    want = reference.attend(*small)
    given = grown(reader(way, shape), tokens, batch, clock.device)
    calls, out = {}, {}
    for name, config in (every[i] for i in chosen if i < len(every)):
        reason = wrong(small, config, want)
        if reason is not None:
            out[name] = reason
            continue
        calls[name] = clock.captured(partial(launch.attend, *given, config))[0]
    ms = clock.medians(calls, repeats) if calls else {}
    best = dict(sorted(ms.items(), key=lambda item: item[1]))
    return {"way": way, "batch": batch, "tokens": tokens, "ms": best, "out": out}


def timed(
    clock: Clock, shape: Shape, tokens: int, batch: int, best: Mapping[str, Sequence[str]], copy: float, repeats: int
) -> dict[str, Any]:
    """All ways at one size, beside dense attention. ``best``: way -> names of configs, the best first; ``copy``: bytes
    per second. ``default_ms`` is None where the default is not among them."""
    calls: dict[str, Call] = {}
    eager, sizes = set(), {}
    for name, call in gpu_cases.dense_calls(shape, tokens, batch, clock.device).items():
        calls[f"dense|{name}"] = call
    for way, names in best.items():
        given = grown(reader(way, shape), tokens, batch, clock.device)
        sizes[way] = row_bytes(given) * tokens * batch
        every = candidates(way, shape)
        tried = {words(every[name]): every[name] for name in names}
        tried |= {words(c): c for c in splits(every[names[0]], shape, batch, clock.device)}
        for name, config in tried.items():
            calls[f"{way}|{name}"] = partial(launch.attend, *given, config)
    for name, call in calls.items():
        calls[name], is_graph = clock.captured(call)
        eager |= set() if is_graph else {name}
    ms = clock.medians(calls, repeats)

    def of(way: str) -> dict[str, float]:
        return {k.split("|")[1]: v for k, v in ms.items() if k.split("|")[0] == way}

    dense = of("dense")
    least = min(dense.values())
    found = []
    for way in best:
        own = of(way)
        config = min(own, key=lambda name: own[name])
        rate = sizes[way] / own[config] * 1e3
        about = {
            "way": way,
            "share_of_dense_bytes": sizes[way] / dense_bytes(shape, tokens, batch),
            "ms": own[config],
            "config": config,
            "default_ms": own.get(words(candidates(way, shape)["default"])),
            "bytes_per_s": rate,
            "share_of_copy": rate / copy,
            "times_dense": least / own[config],
        }
        found.append(about)
    return {"tokens": tokens, "batch": batch, "dense_ms": dense, "ways": found, "not_captured": sorted(eager)}


def dense_bytes(shape: Shape, tokens: int, batch: int) -> int:
    """Bytes of a dense cache in 16 bits."""
    return 2 * 2 * shape.cached * shape.dim * tokens * batch


def splits(config: Config, shape: Shape, batch: int, device: torch.device) -> list[Config]:
    """The config with one, two and four programs for each multiprocessor, about."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return [replace(config, splits=max(1, n * processors // (batch * shape.cached))) for n in (1, 2, 4)]


# -- new rows ---------------------------------------------------------------------------------------------------------

ROWS = {"int8": ((512, 8),), "4 bits": ((1024, 4),), "8 and 4 bits": ((128, 8), (384, 4))}
"""Formats of new rows: joint columns of Llama 3 8B's keys or values."""
DEPTH = 4096


def encoding(
    clock: Clock, name: str, segments: tuple[tuple[int, int], ...], rows: int, depth: int, compile: bool, repeats: int
) -> dict[str, Any]:
    """Milliseconds to make ``rows`` new rows in bf16: by torch's ops, by what inductor makes of them (``compile``), and
    by the kernels of ``kernels/encode.py``; and which share of rows the two have in common, byte by byte."""
    form = Format(tuple(Segment(*s) for s in segments), 1, BF16)
    make = torch.Generator(clock.device).manual_seed(0)
    x = torch.randn(1, rows, depth, device=clock.device, generator=make).to(BF16)
    matrix = torch.randn(form.columns, depth, device=clock.device, generator=make) / depth**0.5
    spread = torch.linspace(2, 0.5, form.columns, device=clock.device)
    given = (x, matrix, None, None, spread, form)
    want, got = encode.reference(*given), encode.encode(*given)
    calls: dict[str, Call] = {"torch": lambda: encode.reference(*given), "kernels": lambda: encode.encode(*given)}
    if compile:
        made = torch.compile(encode.reference, dynamic=False)
        calls["inductor"] = lambda: made(*given)
    calls = {n: clock.captured(call)[0] for n, call in calls.items()}
    found = {"rows": rows, "format": name, "ms": clock.medians(calls, repeats)}
    return found | {"equal_rows": float((want == got).all(-1).float().mean())}


def encodings(
    clock: Clock, report: Report, formats: Sequence[str], sizes: Sequence[int], depth: int, repeats: int
) -> list[dict[str, Any]]:
    """Formats of ``ROWS`` at every number of rows, as far as time goes."""
    found = []
    for name in formats:
        for rows in sizes:
            compile = clock.cuda and rows <= encode.FEW
            run = partial(encoding, clock, name, ROWS[name], rows, depth, compile, repeats)
            found.append(report.attempt(f"encode {name}, {rows} rows", 15 if compile else 2, run))
    return [f for f in found if f is not None]
