"""Checks and times everything that runs on a GPU, in one call of under 8 minutes, into one JSON.

    python -m bench.gpu [--seconds 420] [--only op steps] [--out bench/results/gpu.json]   on any CUDA machine
    TRITON_INTERPRET=1 python -m bench.gpu --device cpu --quick --out FILE                 the same code, tiny

Checks: the generated kernels of a table of readers in fp32, bf16 and fp16 against fp64 (``values``); small models whose
greedy tokens must be eager's, with dynamic and static caches and CUDA graphs (``models``). Times: bandwidth of a copy;
attention over rows beside dense SDPA, each config of a small search (``tuned``) and then the best at all lengths
(``op``); new rows (``encode``); decode steps and prompts of layers of Llama 3 8B's shape (``steps``). What does not fit
in the budget is left out and listed (``skipped``), what raised as well (``failed``). Where Triton compiles, processes
beside this one do it, so that one bad kernel costs its own process only. Nothing need be installed but torch and
transformers: a checkout with ``ln -s ../kernels ../passes lorc_fx/`` is enough.

Goals, as booleans in ``goals`` (null: not measured):

    bandwidth   at 16k tokens and more, int8 and 4-bit rows are read at 90 % of a copy's bandwidth or more
    half        there, attention over int8 rows (half the bytes) takes 1 / 1.7 of dense SDPA's time or less
    quarter     there, attention over 4-bit rows (a quarter) takes 1 / 3 or less
    step        a decode step at 32k tokens, batch 16, over int8 rows is 1.4 times as fast as the fastest dense one
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import gpu_cases, gpu_models, gpu_op
from bench.gpu_report import Jobs, Report
from bench.gpu_timing import COPIED, Clock, bandwidths
from bench.kernel_runs import VALUES
from bench.run import RESULTS, machine
from lorc_fx.backend import lorc

LONG = 16384
GOALS = {"bandwidth": 0.9, "half": 1.7, "quarter": 3.0, "step": 1.4}
WHOLE_STEP = (32768, 16)
"""Tokens and batch of the goal ``step``."""


@dataclass(frozen=True)
class Sizes:
    """What is run. ``names``: readers whose values are checked; ``ways``, ``formats``: of attention and of new rows;
    ``checks``, ``variants``: of models; ``configs``: how many a way has, the default first; ``inner``: the inner
    compiler of models, None for the usual one; ``steps``: (tokens, batch), the first whose caches fit in memory is
    taken."""

    shape: gpu_cases.Shape
    names: tuple[str, ...]
    ways: tuple[str, ...]
    formats: tuple[str, ...]
    checks: tuple[str, ...]
    variants: tuple[str, ...]
    configs: int
    tune: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    small: Sequence[int]
    layers: Sequence[int]
    steps: tuple[tuple[int, int], ...]
    prompt: int
    rows: tuple[int, ...]
    depth: int
    copied: int
    repeats: int
    inner: str | None


def all_values() -> tuple[str, ...]:
    """Cases in their own dtype, then in the others."""
    kinds = ("float32", "bfloat16", "float16")
    own = {name: str(case.dtype).removeprefix("torch.") for name, case in VALUES.items()}
    return (*VALUES, *(f"{name}@{kind}" for name in VALUES for kind in kinds if kind != own[name]))


FULL = Sizes(
    shape=gpu_cases.LLAMA,
    names=all_values(),
    ways=tuple(gpu_cases.WAYS),
    formats=tuple(gpu_op.ROWS),
    checks=tuple(gpu_models.CHECKS),
    variants=tuple(gpu_models.VARIANTS),
    configs=1 + len(gpu_cases.CONFIGS),
    tune=((LONG, 4), (LONG, 16)),
    tokens=(16384, 32768, 2048, 65536, 8192),
    batches=(16, 4, 1),
    small=gpu_models.SMALL,
    layers=gpu_models.LLAMA,
    steps=(WHOLE_STEP, (32768, 4), (8192, 4), (2048, 2)),
    prompt=512,
    rows=(1, 16, 2048),
    depth=gpu_op.DEPTH,
    copied=COPIED,
    repeats=9,
    inner=None,
)
QUICK = Sizes(
    shape=gpu_cases.TINY,
    names=("several blocks", "rotary", "8 bits@bfloat16"),
    ways=gpu_cases.QUICK,
    formats=("8 and 4 bits",),
    checks=("full rank, static", "full rank, static, CUDA graphs"),
    variants=("dense", "int8 rows", "int8 rows, static, CUDA graphs"),
    configs=2,
    tune=((64, 2),),
    tokens=(64,),
    batches=(2,),
    small=gpu_models.TINY,
    layers=gpu_models.TINY,
    steps=((64, 2),),
    prompt=16,
    rows=(2,),
    depth=64,
    copied=1 << 20,
    repeats=1,
    inner="eager",
)


def gpu(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers were made; None for what cannot be told."""
    found = machine() | {"triton": None, "driver": None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if device.type != "cuda":
        return found
    p = torch.cuda.get_device_properties(device)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return found | {
        "gpu": p.name,
        "capability": [p.major, p.minor],
        "memory_bytes": p.total_memory,
        "processors": p.multi_processor_count,
        "l2_bytes": getattr(p, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }


def fits(device: torch.device, size: int) -> bool:
    """Whether ``size`` more bytes are free on the device, and a fifth of it to spare."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] > 1.2 * size


def models(report: Report, sizes: Sizes, device: torch.device) -> None:
    for name in sizes.checks:
        check = gpu_models.CHECKS[name]
        if device.type != "cuda" and "mode" in check.options:
            report.skip(f"model: {name}", "CUDA graphs need CUDA")
            continue
        run = partial(gpu_models.checked, check, device, sizes.inner, sizes.small)
        found = report.attempt(f"model: {name}", 30, run)
        report.data["checks"]["models"][name] = found
        report.say(f"{name}: {found}")


def values(report: Report, jobs: Jobs, seconds: float) -> None:
    found, missing = jobs.results(seconds)
    for name, why in missing.items():
        report.skip(f"values: {name}", why)
    bad = [name for name, f in found.items() if not f["right"]]
    report.data["checks"]["values"] = {"right": len(found) - len(bad), "wrong": bad, "cases": found}
    report.say(f"values: {len(found) - len(bad)} right, {len(bad)} wrong, {len(missing)} not known")


def attention(report: Report, sizes: Sizes, clock: Clock, known: dict[int, dict[str, list[int]]], copy: float) -> None:
    """``known``: batch -> way -> numbers of configs to try."""
    best: dict[int, dict[str, list[str]]] = {}
    for tokens, batch in sizes.tune:
        for way in sizes.ways:
            chosen = known[batch].get(way, [])
            size = 2 * gpu_op.dense_bytes(sizes.shape, tokens, batch)
            if not fits(clock.device, size):
                report.skip(f"tune {way}, batch {batch}", f"{size} bytes are not free")
                continue
            run = partial(gpu_op.tuned, clock, sizes.shape, way, tokens, batch, chosen, sizes.repeats)
            found = report.attempt(f"tune {way}, batch {batch}", 8, run)
            if found is not None:
                report.data["tuned"].append(found)
                names = list(found["ms"])
                if names:  # the default too, but not where it is wrong or does not compile
                    kept = names[: gpu_op.KEPT] + [n for n in names[gpu_op.KEPT :] if n == "default"]
                    best.setdefault(batch, {})[way] = kept
    for batch in sizes.batches:
        near = min(best, key=lambda b: abs(b - batch), default=None)
        if near is None:
            report.skip(f"op at batch {batch}", "no config is known to work")
            continue
        for tokens in sizes.tokens:
            size = 5 * gpu_op.dense_bytes(sizes.shape, tokens, batch)
            if not fits(clock.device, size):
                report.skip(f"op, {tokens} tokens, batch {batch}", f"{size} bytes are not free")
                continue
            run = partial(gpu_op.timed, clock, sizes.shape, tokens, batch, best[near], copy, sizes.repeats)
            row = report.attempt(f"op, {tokens} tokens, batch {batch}", 15, run)
            if row is not None:
                report.data["op"].append(row)
                for w in row["ways"]:
                    text = f"{w['ms']:.3f} ms, {w['share_of_copy']:.0%} of a copy, {w['times_dense']:.2f} times dense"
                    report.say(f"{tokens} x {batch} {w['way']}: {text}")


def steps(report: Report, sizes: Sizes, clock: Clock) -> None:
    """Decode steps, then prompts, of all variants in turns."""
    layers, width = sizes.layers[0], 2 * 2 * sizes.layers[3] * sizes.layers[4]
    chosen = [(t, b) for t, b in sizes.steps if fits(clock.device, 4 * layers * width * t * b)]
    if not chosen:
        report.skip("steps", "no memory for any of their sizes")
        return
    tokens, batch = chosen[0]
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    model = report.attempt("model of steps", 60, lambda: gpu_models.made(sizes.layers, clock.device, dtype))
    if model is None:
        return
    prompt = torch.randint(0, sizes.layers[-1], (batch, sizes.prompt), device=clock.device)
    ready = {}
    for name in sizes.variants:
        run = partial(gpu_models.ready, model, gpu_models.VARIANTS[name], prompt, tokens, 64, sizes.inner)
        made = report.attempt(f"compile: {name}", 50 if clock.cuda else 1, run)
        if made is not None:
            ready[name] = made
    calls = {name: one.step for name, one in ready.items()}
    ms = report.attempt("steps", 5, lambda: clock.medians(calls, sizes.repeats)) if calls else None
    prompts = {name: one.prefill for name, one in ready.items() if not one.variant.static}
    filled = report.attempt("prompts", 5, lambda: clock.medians(prompts, min(sizes.repeats, 3))) if prompts else None
    report.data["steps"] = {
        "tokens": tokens,
        "batch": batch,
        "layers": layers,
        "sizes": list(sizes.layers),
        "ms": ms,
        "prompt": sizes.prompt,
        "prompt_ms": filled,
        "cache_bytes": {name: gpu_models.held(one) for name, one in ready.items()},
    }
    report.say(f"steps: {ms}, prompts: {filled}")


def goals(data: dict[str, Any]) -> dict[str, Any]:
    """What was aimed at, the worst that was measured, and whether that is enough; None where nothing was."""
    rows = [w for row in data["op"] if row["tokens"] >= LONG for w in row["ways"]]
    shares = [w["share_of_copy"] for w in rows if w["way"] in ("int8", "4 bits")]
    half, quarter = ([w["times_dense"] for w in rows if w["way"] == way] for way in ("int8", "4 bits"))
    step, about = [], data["steps"] or {}
    if about.get("ms") and (about["tokens"], about["batch"]) == WHOLE_STEP:
        dense, coded = ([ms for n, ms in about["ms"].items() if n.startswith(kind)] for kind in ("dense", "int8"))
        step = [min(dense) / min(coded)] if dense and coded else []
    found = {"bandwidth": shares, "half": half, "quarter": quarter, "step": step}
    return {
        name: {"wanted": wanted, "worst": min(found[name], default=None), "met": min(found[name]) >= wanted}
        if found[name]
        else {"wanted": wanted, "worst": None, "met": None}
        for name, wanted in GOALS.items()
    }


def configs(report: Report, sizes: Sizes, warming: Jobs | None, seconds: float) -> dict[int, dict[str, list[int]]]:
    """batch -> way -> numbers of configs to try: those that ``warming`` has compiled, or all where it is None."""
    batches = [batch for _, batch in sizes.tune]
    if warming is None:
        return {b: dict.fromkeys(sizes.ways, list(range(sizes.configs))) for b in batches}
    done, missing = warming.results(seconds)
    for name, why in missing.items():
        report.skip(f"config {name}", why)
    for name in [n for n, found in done.items() if "failed" in found]:
        report.data["failed"].append({"what": f"config {name}", "error": done.pop(name)["failed"]})
    return {b: gpu_op.compiled(done, b) for b in batches}


PARTS = ("values", "models", "op", "steps", "encode")


def run(report: Report, sizes: Sizes, device: torch.device, parts: Sequence[str]) -> None:
    """``parts`` of all; what only compiles runs beside the first of them."""
    report.data |= {"checks": {"values": None, "models": {}}, "tuned": [], "op": [], "encode": [], "steps": None}
    report.data["bandwidth"] = None
    cuda = device.type == "cuda"
    runs = importlib.util.find_spec("triton") is not None and (cuda or os.environ.get("TRITON_INTERPRET") == "1")
    for part in PARTS:
        if part not in parts:
            report.skip(part, "it was not asked for")
        elif part in ("values", "op", "encode") and not runs:
            report.skip(part, "no Triton, or no interpreter (TRITON_INTERPRET=1) without a GPU")
    parts = [p for p in parts if runs or p in ("models", "steps")]
    processes = max(1, min(6, (os.cpu_count() or 2) // 2 - 1))
    checking = Jobs("values", device, sizes.names, processes) if "values" in parts else None
    names = gpu_op.jobs([batch for _, batch in sizes.tune])
    warming = Jobs("warm", device, names, processes) if "op" in parts and cuda and sizes is FULL else None
    if "models" in parts:
        models(report, sizes, device)
    if checking is not None:
        values(report, checking, max(report.left - 0.7 * report.seconds, 1.0))
    clock = Clock(device)
    if "op" in parts:
        known = configs(report, sizes, warming, max(report.left - 0.6 * report.seconds, 1.0))
        speed = report.attempt("bandwidth", 2, lambda: bandwidths(clock, sizes.copied, sizes.repeats))
        report.data["bandwidth"] = speed
        if speed is not None:
            attention(report, sizes, clock, known, speed["copy"])
    if "steps" in parts:
        steps(report, sizes, clock)
    if "encode" in parts:
        made = gpu_op.encodings(clock, report, sizes.formats, sizes.rows, sizes.depth, sizes.repeats)
        report.data["encode"] = made


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Checks and times everything that runs on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the script works")
    parser.add_argument("--seconds", type=float, default=420.0, help="what it may take, about")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "lorc" not in torch._dynamo.list_backends(exclude_tags=()):  # lorc_fx is not installed
        torch._dynamo.register_backend(compiler_fn=lorc, name="lorc")
    head = {"command": "python -m bench.gpu", "machine": gpu(device), "quick": args.quick, "device": args.device}
    report = Report(args.out, args.seconds, head)
    run(report, QUICK if args.quick else FULL, device, args.only)
    report.data["goals"] = goals(report.data)
    report.write()
    for name, goal in report.data["goals"].items():
        report.say(f"goal {name}: {goal}")


if __name__ == "__main__":
    main()
