"""What ``lorc bench decode`` does: decode steps of one model, dense and compressed ways in turns."""

from __future__ import annotations

import copy
import inspect
import itertools
import platform
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from rich import box
from rich.table import Table

from .compat import compile_limits
from .errors import LorcWarning
from .evaluate import RECOMPILE_LIMIT, Show, cache_bytes, cache_keyword
from .options import Options

WARMUP = 3
"""Steps before the timed ones: the second step of a dynamic cache may compile once more."""


@dataclass(frozen=True)
class Asked:
    """``tokens`` cached before the first step, ``batch`` rows, ``repeats`` timed steps; ``static`` caches or dynamic
    ones; ``inner``, the compiler of all models."""

    tokens: tuple[int, ...]
    batch: int = 1
    repeats: int = 9
    static: bool = False
    inner: str = "inductor"


def ways(options: Mapping[str, Any], ratios: Sequence[float]) -> list[Options | None]:
    """Dense (None), then ``options`` at each ratio, or at the default one. Raises what ``Options`` raises."""
    return [None, *(Options.parse({**options, "ratio": r}) for r in ratios or (Options().ratio,))]


@dataclass
class Runner:
    """One way: a module of its own over shared weights, and one that fills its caches without waiting for inductor.
    ``options``: None for a dense cache, under ``inner`` or (None) not compiled; ``static``: its caches are."""

    options: Options | None
    model: Any
    inner: str | None = "inductor"
    static: bool = False
    filler: Any = field(init=False)

    def __post_init__(self) -> None:
        self.filler = twin(self.model)
        if self.options is not None:
            given = self.options.given()
            self.model.compile(backend="lorc", options=given, **apart())
            self.filler.compile(backend="lorc", options={**given, "inner": "eager"}, **apart())
        elif self.inner is not None:
            self.model.compile(backend=self.inner, **apart())
        self.keyword = cache_keyword(self.model)
        # else a long prompt's logits take more memory than its cache
        last = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.more = {"use_cache": True, **({"logits_to_keep": 1} if last else {})}

    @property
    def name(self) -> str:
        return "dense" if self.options is None else f"lorc, ratio {float(self.options.ratio or 0):g}"

    @torch.no_grad()
    def call(self, ids: torch.Tensor, cache: Any, model: Any = None) -> float:
        """Feed ``ids`` [B, S] to the way's own module, or to ``model``; seconds."""
        start = time.perf_counter()
        out = (model or self.model)(input_ids=ids, **self.more, **{self.keyword: cache})
        if out.logits.device.type == "cuda":
            torch.cuda.synchronize(out.logits.device)
        return time.perf_counter() - start

    def filled(self, ids: torch.Tensor, room: int) -> Any:
        """A cache of ``ids`` [B, T]; a static one has room for ``room`` more tokens."""
        config, length = self.model.config, ids.shape[1] + room
        cache = (
            transformers.StaticCache(config=config, max_cache_len=length)
            if self.static
            else transformers.DynamicCache(config=config)
        )
        self.call(ids, cache, self.filler)
        return cache


def twin(model: Any) -> Any:
    """A second module of the same class that shares every parameter and buffer."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def apart() -> dict[str, Any]:
    """Keywords of ``torch.compile`` for one of several twins: many graphs, which are its own. torch 2.11 cannot keep
    them apart: there all twins share one list of graphs, which a call looks through, and one limit."""
    found: dict[str, Any] = dict(compile_limits(RECOMPILE_LIMIT))
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        found["isolate_recompiles"] = True
    return found


def interleaved(runs: Sequence[Any], repeats: int) -> list[list[float]]:
    """Each run once per repeat, beginning with another one each time."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats):
        for k in range(len(runs)):
            i = (k + repeat) % len(runs)
            times[i].append(runs[i]())
    return times


def run(show: Show, model: Any, wanted: Sequence[Options | None], asked: Asked) -> dict[str, Any]:
    """All figures, ready for JSON: one row for each number of tokens and way. Prompts are random ids."""
    torch.compiler.reset()
    runners = [Runner(options, twin(model), asked.inner, asked.static) for options in wanted]
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorcWarning)  # random ids have a quality of their own
        for tokens in asked.tokens:
            rows += _measured(show, runners, tokens, asked)
    torch.compiler.reset()
    about = {"batch": asked.batch, "static": asked.static, "inner": asked.inner, "machine": platform.machine()}
    about |= {"device": str(model.device), "threads": torch.get_num_threads()}
    return about | {"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}


def _measured(show: Show, runners: Sequence[Runner], tokens: int, asked: Asked) -> list[dict[str, Any]]:
    vocabulary, device = runners[0].model.get_input_embeddings().weight.shape[0], runners[0].model.device
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, vocabulary, (asked.batch, tokens), generator=generator).to(device)
    caches = []
    for runner in runners:
        show.stage(f"A prompt of {tokens} tokens and first steps: {runner.name}")
        caches.append(runner.filled(ids, WARMUP + asked.repeats + 1))
        for _ in range(WARMUP):
            runner.call(ids[:, :1], caches[-1])
    held = [cache_bytes(cache) for cache in caches]
    show.stage(f"{asked.repeats} steps of each over {tokens} tokens, in turns")
    calls = [lambda r=r, c=c: r.call(ids[:, :1], c) for r, c in zip(runners, caches, strict=True)]
    times = interleaved(calls, asked.repeats)
    return [
        {"way": r.name, "ratio": r.options and float(r.options.ratio or 0), "tokens": tokens, "seconds": seconds,
         "median_s": statistics.median(seconds), "held_bytes": size}
        for r, seconds, size in zip(runners, times, held, strict=True)
    ]  # fmt: skip


def table(result: Mapping[str, Any]) -> Table:
    """Milliseconds and bytes, and both as ratios to the dense way's."""
    kind = "static" if result["static"] else "dynamic"
    title = f"decode steps, batch {result['batch']}, {kind} caches, {result['inner']}, {result['dtype']}"
    shown = Table(title=title, box=box.SIMPLE)
    for name in ("tokens", "cache", "ms", "times faster", "MiB held", "of dense"):
        shown.add_column(name, justify="left" if name == "cache" else "right")
    for row in result["rows"]:
        base = next(r for r in result["rows"] if r["tokens"] == row["tokens"] and r["way"] == "dense")
        faster, share = base["median_s"] / row["median_s"], row["held_bytes"] / base["held_bytes"]
        size = f"{row['held_bytes'] / 2**20:.1f}"
        shown.add_row(
            str(row["tokens"]), row["way"], f"{1e3 * row['median_s']:.2f}", f"{faster:.2f}", size, f"{share:.3f}"
        )
    return shown
