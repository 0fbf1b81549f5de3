"""Bytes, peak memory, prefill and decode time of one cache in one case; ``bench.peers_run`` runs it, each case in a
process of its own.

    python -m bench.peer_steps CASE.json OUT.json

The prompt is read once and some steps are made before anything is measured: what compiles has compiled, and is not in
the peaks, which count from there. Needs only torch and transformers where the case is kvpress's, whose environment has
an older transformers and no lorc_fx.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.resident import give_back, reset_peak, resident

#: steps before measured ones: under inductor the first two or three compile
WARMUP = 4
PACKAGES = ("torch", "transformers", "optimum-quanto", "hqq", "kvpress")


@dataclass(frozen=True)
class Case:
    """One peer on one model. ``kind``: dynamic, static, quantized, press, straightforward or lorc; ``given``: its
    arguments; ``ids``: a prompt of ``context`` tokens and the tokens of the steps."""

    kind: str
    given: dict[str, Any]
    compiled: bool
    checkpoint: str
    ids: list[int]
    context: int
    prefills: int
    steps: int
    threads: int


@dataclass(frozen=True)
class Way:
    """How a case is run: a fresh cache, what surrounds a prefill, further arguments of a step, and a cache's bytes
    (``bytes`` shown, ``held_bytes`` of all storages behind them)."""

    cache: Callable[[], Any]
    count: Callable[[Any], dict[str, int]]
    prefill: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    more: Callable[[Any, int], dict[str, Any]] = lambda cache, at: {}


def shown(cache: Any) -> dict[str, int]:
    """Of a dense or latent cache."""
    from lorc_fx.evaluate import cache_bytes
    from lorc_fx.latent import cache_nbytes

    return {"bytes": cache_nbytes(cache, used=True), "held_bytes": cache_bytes(cache)}


def stored(cache: Any) -> dict[str, int]:
    """Of a QuantizedCache, which has no spare: its tensors lie in dicts and in tensor subclasses."""
    from lorc_fx.evaluate import cache_bytes

    return {"bytes": cache_bytes(cache), "held_bytes": cache_bytes(cache)}


def plain(cache: Any) -> dict[str, int]:
    """Of a dense cache, without lorc_fx."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {"bytes": sum(t.numel() * t.element_size() for t in tensors), "held_bytes": sum(storages.values())}


def quantized_cache(config: Any, given: dict[str, Any]) -> Any:
    """A QuantizedCache, which refuses windows: told that all layers have full attention, it keeps all their tokens (the
    model's masks still apply)."""
    from transformers import QuantizedCache

    config = copy.deepcopy(config)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    return QuantizedCache(config=config, **given)


def way(case: Case, model: Any, stack: contextlib.ExitStack) -> Way:
    """How to run ``case``; what it changes in the model lasts until ``stack`` is left."""
    from transformers import DynamicCache, StaticCache

    def dynamic() -> Any:
        return DynamicCache(config=model.config)

    if case.kind == "static":
        room = case.context + WARMUP + case.steps
        return Way(lambda: StaticCache(config=model.config, max_cache_len=room), shown)
    if case.kind == "quantized":
        return Way(lambda: quantized_cache(model.config, case.given), stored)
    if case.kind == "press":
        from bench.kvpress_rows import make_press, seen_by

        press = make_press(**case.given) if case.given else None
        within = (lambda: press(model)) if press else contextlib.nullcontext
        return Way(dynamic, plain, within, lambda cache, at: seen_by(model, cache, at, 1))
    if case.kind == "straightforward":
        from bench.straightforward import straightforward

        stack.enter_context(straightforward(model, **case.given))
    elif case.kind == "lorc":
        from lorc_fx.evaluate import compressed

        stack.enter_context(compressed(model, case.given))
    elif case.kind != "dynamic":
        raise ValueError(f"no peer of kind {case.kind!r}")
    return Way(dynamic, shown)


@dataclass
class Run:
    """A model, and one way to run it on a prompt and the tokens after it (``ids`` [1, N])."""

    model: Any
    way: Way
    ids: torch.Tensor
    context: int
    marked: bool

    def __post_init__(self) -> None:
        named = inspect.signature(self.model.forward).parameters
        self.keyword = "cache" if "cache" in named else "past_key_values"

    def prefill(self) -> tuple[Any, float]:
        """A fresh cache with the prompt in it, and the seconds that took."""
        cache, prompt = self.way.cache(), self.ids[:, : self.context].clone()
        if self.marked:  # what compiles serves other contexts too, from inductor's cache on disk
            torch._dynamo.maybe_mark_dynamic(prompt, 1)
        begin = time.perf_counter()
        with self.way.prefill():
            self.model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{self.keyword: cache})
        seconds = time.perf_counter() - begin
        if self.marked:
            for value in (v for layer in cache.layers for v in (layer.keys, layer.values)):
                if value.shape[2] == self.context and type(value) is torch.Tensor:
                    torch._dynamo.maybe_mark_dynamic(value, 2)
        return cache, seconds

    def steps(self, cache: Any, first: int, count: int) -> list[float]:
        """The seconds of each of ``count`` steps, the first of which is the ``first`` after the prompt."""
        seconds = []
        for at in range(self.context + first, self.context + first + count):
            token, more = self.ids[:, at : at + 1].clone(), self.way.more(cache, at)
            begin = time.perf_counter()
            self.model(input_ids=token, use_cache=True, logits_to_keep=1, **{self.keyword: cache}, **more)
            seconds.append(time.perf_counter() - begin)
        return seconds


def graphs() -> int:
    """How many Dynamo has compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    """All that is measured of a case; peaks are bytes above what the process held before."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(case.threads)
    source = {"dtype": torch.bfloat16, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint, **source).eval()
    with contextlib.ExitStack() as stack:
        run = Run(model, way(case, model, stack), torch.tensor(case.ids)[None], case.context, case.compiled)
        if case.compiled and case.kind != "lorc":
            from lorc_fx.compat import compile_limits

            model.compile(backend="inductor", **compile_limits(64))
        begin = time.perf_counter()
        run.steps(run.prefill()[0], 0, WARMUP)
        found: dict[str, Any] = {"warmup_s": time.perf_counter() - begin}
        before = graphs()
        give_back()
        base = reset_peak()
        prefill_s: list[float] = []
        for _ in range(case.prefills):
            cache = None  # the one of before does not count
            cache, seconds = run.prefill()
            prefill_s.append(seconds)
        found |= {"prefill_s": prefill_s, "prefill_peak_bytes": resident("VmHWM") - base}
        give_back()
        reset_peak()
        decode_s = run.steps(cache, 0, WARMUP + case.steps)[WARMUP:]
        found |= {"decode_s": decode_s, "decode_peak_bytes": resident("VmHWM") - base}
        found |= run.way.count(cache) | {"base_bytes": base, "compiled_while_measured": graphs() - before}
    found |= {f"{name}_median_s": statistics.median(found[f"{name}_s"]) for name in ("prefill", "decode")}
    return found | {"versions": versions(), "load": os.getloadavg()[0]}


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of those packages that are installed here."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(source: Path, target: Path) -> None:
    warnings.simplefilter("ignore")
    target.write_text(json.dumps(measure(Case(**json.loads(source.read_text())))))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
