"""Peak memory of one long prefill, a process per way to run it, under inductor with a warm compile cache.

    python -m bench.memory [--tokens 8192] [--out bench/results/memory.json]

Each way runs twice in a process of its own: the first run fills inductor's on-disk cache, the second is measured.
``prefill_peak_bytes`` is what resident memory rose by at most. ``cache_misses`` shows that the measured run compiled
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.resident import give_back, reset_peak, resident
from lorc_fx import PAPER

RESULTS = Path(__file__).parent / "results"
TOKENS = 8192


@dataclass(frozen=True)
class Way:
    """``backend`` (None: the model as it is) with ``options``, after a prompt of ``first`` tokens."""

    backend: str | None
    options: dict[str, Any] = field(default_factory=dict)
    first: int = 0


FIRST = 512
WAYS = {
    "inductor": Way("inductor"),
    "not compiled": Way(None),
    "LoRC at 1": Way("lorc", {**PAPER, "ratio": 1.0}),
    "LoRC at 0.45": Way("lorc", {**PAPER, "ratio": 0.45}),
    "lorc at 0.45": Way("lorc", {"ratio": 0.45}, FIRST),
    "lorc at 0.25": Way("lorc", {"ratio": 0.25}, FIRST),
    "lorc at 0.45, the first prompt": Way("lorc", {"ratio": 0.45}),
}


def child(name: str, tokens: int, model_name: str) -> dict[str, Any]:
    """Runs in the process that is measured."""
    import torch
    from torch._dynamo.utils import counters
    from transformers import DynamicCache

    from bench import models
    from lorc_fx.evaluate import cache_bytes, cache_keyword

    way = WAYS[name]
    model = models.build(model_name)
    if way.backend is not None:
        model.compile(backend=way.backend, options=way.options or None)

    def prompt(length: int) -> Any:
        cache, ids = DynamicCache(config=model.config), models.random_ids(length)
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
        return cache

    if way.first:
        prompt(way.first)
    give_back()
    loaded = reset_peak()
    cache = prompt(tokens)
    peak, counted = resident("VmHWM"), counters["inductor"]
    return {
        "variant": name,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "prefill_peak_bytes": peak - loaded,
        "held_bytes": cache_bytes(cache),
        "cache_hits": counted["fxgraph_cache_hit"],
        "cache_misses": counted["fxgraph_cache_miss"] + counted["fxgraph_cache_bypass"],
    }


def measure(name: str, tokens: int, model: str, folder: str) -> dict[str, Any]:
    """A warming and a measured process, with a compile cache of their own in ``folder``."""
    command = [sys.executable, "-m", "bench.memory", "--child", name, "--tokens", str(tokens), "--model", model]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
    row: dict[str, Any] = {}
    for _ in range(2):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one long prefill.")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(child(args.child, args.tokens, args.model)))
        return
    from bench.run import command, machine
    from lorc_fx.console import write_json

    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "command": command("memory", argv)}
    result |= {"dtype": "float32", "model": args.model, "tokens": args.tokens}
    result["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(WAYS):
            result["rows"].append(measure(name, args.tokens, args.model, os.path.join(folder, str(i))))
            print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
