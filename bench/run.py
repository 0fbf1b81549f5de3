"""Times of backend="lorc" as ratios to backend="inductor" on the same weights: decode, prefill, compile.

    python -m bench.run [--quick] [--models llama gpt2] [--out bench/results/cpu.json]

One process; all variants of a case take turns within each repeat, so drift of the machine meets all of them. All times
are written. ``inner_seconds`` is the time inside the callables that inductor made, measured at the same boundary for
both backends: the rest of a step is Dynamo's guards, the cache object, and for lorc the wrapping of latents.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cases, models
from bench.cases import Case, Variant
from lorc_fx import PAPER, backend
from lorc_fx.compat import compile_with_inductor
from lorc_fx.console import write_json
from lorc_fx.decode_command import WARMUP, apart, interleaved, twin
from lorc_fx.evaluate import cache_bytes, cache_keyword
from lorc_fx.latent import cache_nbytes

RESULTS = Path(__file__).parent / "results"


class Timed:
    """Inductor, counting its compiles, their seconds, and the seconds that the compiled callables take."""

    def __init__(self, lower: Callable[[Any, Any], Any]) -> None:
        self.lower = lower
        self.compiles, self.compile_s, self.run_s = 0, 0.0, 0.0

    def __call__(self, gm: Any, examples: Any) -> Callable[..., Any]:
        start = time.perf_counter()
        compiled = self.lower(gm, examples)
        self.compiles += 1
        self.compile_s += time.perf_counter() - start

        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = compiled(*args)
            self.run_s += time.perf_counter() - start
            return result

        return run


def _inductor(gm: Any, examples: Any) -> Any:
    return torch._dynamo.lookup_backend("inductor")(gm, examples)


def _inductor_in_lorc(gm: Any, examples: Any) -> Any:
    return compile_with_inductor(gm, examples, None)


class Handle:
    """One variant of a model: a module of its own over shared weights, compiled apart from the others."""

    def __init__(self, variant: Variant, model: Any) -> None:
        self.variant, self.model = variant, model
        self.inner = Timed(_inductor if variant.ratio is None else _inductor_in_lorc)
        if variant.ratio is None:
            model.compile(backend=self.inner, **apart())
        else:
            model.compile(backend="lorc", options={**PAPER, "ratio": variant.ratio, "inner": self.inner}, **apart())
        self.keyword = cache_keyword(model)

    def cache(self, capacity: int) -> Any:
        """A fresh cache; a static one has room for ``capacity`` tokens."""
        from transformers import DynamicCache, StaticCache

        if self.variant.static:
            return StaticCache(config=self.model.config, max_cache_len=capacity)
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def call(self, ids: torch.Tensor, cache: Any) -> tuple[float, float]:
        """Feed ``ids`` [1, S]; seconds of the call, and those spent inside inductor's callables."""
        inside = self.inner.run_s
        start = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self.keyword: cache})
        return time.perf_counter() - start, self.inner.run_s - inside


def filled(handles: Sequence[Handle], tokens: int, room: int) -> list[Any]:
    """A cache of ``tokens`` for each handle, which it filled in chunks, and its decode step compiled; static ones have
    ``room`` for so many steps after these."""
    ids, token = models.random_ids(tokens), models.random_ids(1)
    caches = []
    for handle in handles:
        cache = handle.cache(tokens + WARMUP + room)
        for start in range(0, tokens, cases.CHUNK):
            handle.call(ids[:, start : start + cases.CHUNK], cache)
        for _ in range(WARMUP):
            handle.call(token, cache)
        caches.append(cache)
    return caches


def measure_decode(handles: Sequence[Handle], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One step on a cache of ``tokens``. Each step appends a token."""
    caches, token = filled(handles, tokens, repeats), models.random_ids(1)
    sizes = [{"held_bytes": cache_bytes(cache), "used_bytes": cache_nbytes(cache, used=True)} for cache in caches]
    times = interleaved([lambda h=h, c=c: h.call(token, c) for h, c in zip(handles, caches, strict=True)], repeats)
    return [_row(handle, times[i]) | sizes[i] for i, handle in enumerate(handles)]


def measure_prefill(handles: Sequence[Handle], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """``tokens`` in one piece into a fresh cache."""
    ids = models.random_ids(tokens)
    runs = [lambda h=h: h.call(ids, h.cache(tokens)) for h in handles]
    for run in runs:
        run()
    times = interleaved(runs, repeats)
    return [_row(handle, times[i]) for i, handle in enumerate(handles)]


def _row(handle: Handle, times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    seconds, inside = [t for t, _ in times], [t for _, t in times]
    return {
        "variant": handle.variant.name,
        "seconds": seconds,
        "inner_seconds": inside,
        "median_s": statistics.median(seconds),
        "overhead_s": statistics.median(total - inner for total, inner in times),
    }


def measure_compile(variant: Variant, model: Any) -> dict[str, Any]:
    """Cold compiles of prefill and decode, every compile cache off, weights of its own so that no factor is reused.

    ``seconds`` is what the first prompt took more than the same prompt warm; ``inner_compiles`` and ``backend_calls``
    are cumulative, after each prompt of ``cases.PROMPTS``.
    """
    from torch._inductor import config

    torch.compiler.reset()  # else Dynamo remembers which sizes varied before, and compiles less
    handle = Handle(variant, copy.deepcopy(model))
    backend.reset_timings()
    calls, compiles, first = [], [], 0.0
    with config.patch(force_disable_caches=True):
        for i, tokens in enumerate(cases.PROMPTS):
            seconds = _prompt(handle, tokens)
            if i == 0:
                first, inner_s, passes = seconds, handle.inner.compile_s, backend.timings()
            compiles.append(handle.inner.compiles)
            calls.append(handle.inner.compiles if variant.ratio is None else backend.counts()["backend_calls"])
    warm = statistics.median(_prompt(handle, cases.PROMPTS[0]) for _ in range(3))
    return {
        "variant": variant.name,
        "seconds": first - warm,
        "inner_s": inner_s,
        "passes": passes if variant.ratio is not None else {},
        "backend_calls": calls,
        "inner_compiles": compiles,
    }


def _prompt(handle: Handle, tokens: int) -> float:
    ids, token = models.random_ids(tokens), models.random_ids(1)
    cache = handle.cache(tokens + cases.STEPS)
    return handle.call(ids, cache)[0] + sum(handle.call(token, cache)[0] for _ in range(cases.STEPS))


def machine() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
        if Path("/proc/cpuinfo").exists()
        else iter(()),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def command(name: str, argv: Sequence[str] | None) -> str:
    """The command line of ``python -m bench.NAME``; ``argv``: what ``main`` was given, None for the process' own."""
    return shlex.join(["python", "-m", f"bench.{name}", *(sys.argv[1:] if argv is None else argv)])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(name: str, chosen: Sequence[Case], repeats: dict[str, int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """All rows of one model."""
    model = models.build(name, dtype)
    rows: list[dict[str, Any]] = []
    say(f"{name}: compile")
    _prompt(Handle(cases.BASE, copy.deepcopy(model)), 16)  # starts inductor's workers, builds its headers
    for repeat in range(repeats["compile"]):
        for variant in cases.COMPILED[:: 1 if repeat % 2 == 0 else -1]:
            rows.append({"model": name, "kind": "compile"} | measure_compile(variant, model))
            say(f"  {variant.name} {rows[-1]['seconds']:.1f} s, inner compiles {rows[-1]['inner_compiles']}")
    handles = [Handle(variant, twin(model)) for variant in cases.VARIANTS]
    for case in chosen:
        say(f"{name}: {case.kind} {case.tokens}")
        function = measure_decode if case.kind == "decode" else measure_prefill
        for row in function(handles, case.tokens, repeats[case.kind]):
            rows.append({"model": name, "kind": case.kind, "tokens": case.tokens} | row)
            say(
                f"  {row['variant']} {1e3 * row['median_s']:.2f} ms, outside the graph {1e6 * row['overhead_s']:.0f} us"
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times of backend='lorc' as ratios to backend='inductor'.")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--models", nargs="+", default=list(models.CONFIGS), choices=list(models.CONFIGS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = cases.QUICK if args.quick else cases.CASES
    repeats = cases.QUICK_REPEATS if args.quick else cases.REPEATS
    result: dict[str, Any] = {"machine": machine(), "dtype": args.dtype, "quick": args.quick, "rows": []}
    for name in args.models:
        torch.compiler.reset()
        result["rows"] += measure(name, chosen, repeats, getattr(torch, args.dtype))
        write_json(args.out, result)
    say(f"written to {args.out}")


if __name__ == "__main__":
    main()
