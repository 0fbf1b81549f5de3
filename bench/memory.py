"""Peak memory of one long prefill, a process per variant, under inductor with a warm compile cache.

    python -m bench.memory [--tokens 8192] [--out bench/results/memory.json]

Each variant runs twice in a process of its own: the first run fills inductor's on-disk cache, the second is measured
(``ru_maxrss``; ``prefill_peak_bytes`` is what it rose by after the model was loaded). ``cache_misses`` shows that the
measured run compiled nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import cases

RESULTS = Path(__file__).parent / "results"


def child(variant_name: str, tokens: int, model_name: str) -> dict[str, Any]:
    """Runs in the process that is measured."""
    import torch
    from torch._dynamo.utils import counters

    from bench import models
    from lorc_fx import PAPER
    from lorc_fx.evaluate import cache_bytes, cache_keyword

    variant = next(v for v in cases.MEMORY_VARIANTS if v.name == variant_name)
    model = models.build(model_name)
    if variant.ratio is None:
        model.compile(backend="inductor")
    else:
        model.compile(backend="lorc", options={**PAPER, "ratio": variant.ratio})
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = models.random_ids(tokens)
    loaded = _peak()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    counted = counters["inductor"]
    return {
        "variant": variant_name,
        "loaded_bytes": loaded,
        "peak_bytes": _peak(),
        "prefill_peak_bytes": _peak() - loaded,
        "held_bytes": cache_bytes(cache),
        "cache_hits": counted["fxgraph_cache_hit"],
        "cache_misses": counted["fxgraph_cache_miss"] + counted["fxgraph_cache_bypass"],
    }


def _peak() -> int:
    """Bytes; Linux counts KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(variant: str, tokens: int, model: str, folder: str) -> dict[str, Any]:
    """A warming and a measured process, with a compile cache of their own in ``folder``."""
    command = [sys.executable, "-m", "bench.memory", "--child", variant, "--tokens", str(tokens), "--model", model]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
    row: dict[str, Any] = {}
    for _ in range(2):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one long prefill.")
    parser.add_argument("--tokens", type=int, default=cases.MEMORY_TOKENS)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(child(args.child, args.tokens, args.model)))
        return
    from bench.run import machine
    from lorc_fx.console import write_json

    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "dtype": "float32", "model": args.model, "tokens": args.tokens}
    result["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in cases.MEMORY_VARIANTS:
            result["rows"].append(measure(variant.name, args.tokens, args.model, os.path.join(folder, variant.name)))
            print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
