"""Whole decode steps: dense caches eager and under inductor beside latents, by context length, batch, dtype and ratio.

    python -m bench.decode [--models llama gpt2] [--tokens 512 2048 8192 32768] [--batch 1 8] [--dtype float32 bfloat16]
        [--out bench/results/decode.json]

One process; all variants of a case take turns within each repeat, medians. Caches are filled with ``FILL`` tokens in
one piece (without inductor: only steps are timed), whose rows are then repeated up to the length of the case: what
attention reads has the size and the form of a real cache, and a prompt of 32768 tokens would take an hour. A case
whose caches would need more than ``MOST`` bytes leaves out the eager variant first, then the whole case; what is left
out is in the file. ``--layers`` measures models of other depths than the shape's own (for the plot of how a step grows
with it, ``bench.plots``).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import models
from bench.run import RESULTS, command, machine, say
from lorc_fx.console import write_json
from lorc_fx.decode_command import WARMUP, Runner, interleaved, twin
from lorc_fx.evaluate import cache_bytes
from lorc_fx.latent import LatentKV, cache_nbytes, extend
from lorc_fx.options import Options

TOKENS, BATCHES, DTYPES = (512, 2048, 8192, 32768), (1, 8), ("float32", "bfloat16")
RATIOS = (0.45, 0.25)
FILL = 512
REPEATS = 9
MOST = 18 << 30
EAGER, DYNAMIC, STATIC = "eager", "inductor", "inductor-static"


@dataclass(frozen=True)
class Way:
    """One way to run a model: dense, eager or under inductor, or under lorc with ``options``."""

    name: str
    options: dict[str, Any] | None = None
    static: bool = False
    compiled: bool = True

    @property
    def about(self) -> dict[str, Any]:
        """Name, ratio (None: dense), and the name without it."""
        ratio = None if self.options is None else self.options["ratio"]
        return {"variant": self.name, "ratio": ratio, "kind": self.name.replace(f"-{ratio:g}" if ratio else "", "")}

    def runner(self, model: Any) -> Runner:
        """A module of its own over the weights of ``model``, compiled apart from the others."""
        options = None if self.options is None else Options.parse(self.options)
        return Runner(options, twin(model), "inductor" if self.compiled else None, self.static)


def ways(ratios: Sequence[float]) -> tuple[Way, ...]:
    """Dense ones, the default at each ratio with both kinds of caches, and LoRC's joint basis at the smallest."""
    lorc = [
        Way(f"lorc-{ratio:g}" + ("-static" if static else ""), {"ratio": ratio}, static)
        for ratio in ratios
        for static in (False, True)
    ]
    joint = Way(f"lorc-{min(ratios):g}-joint", {"ratio": min(ratios), "basis": "joint"})
    return (Way(EAGER, compiled=False), Way(DYNAMIC), Way(STATIC, static=True), *lorc, joint)


def filled(runner: Runner, tokens: int, batch: int, room: int) -> Any:
    """A cache of ``tokens`` whose rows repeat those of ``FILL`` real ones; static ones have ``room`` more."""
    cache = runner.filled(models.random_ids(FILL).expand(batch, -1).contiguous(), tokens + room - FILL)
    _repeat(cache, tokens)
    return cache


def _repeat(cache: Any, tokens: int) -> None:
    """Cached tokens again and again, up to ``tokens``."""
    again = torch.arange(tokens) % FILL
    for layer in cache.layers:
        for name in ("keys", "values"):
            value = getattr(layer, name)
            if isinstance(value, LatentKV):
                setattr(layer, name, _repeated(value, again))
            elif hasattr(layer, "cumulative_length"):
                value[:, :, :tokens] = value[:, :, again]
            else:
                setattr(layer, name, value[:, :, again])
                torch._dynamo.maybe_mark_dynamic(getattr(layer, name), (0, 2))  # else the second step compiles anew
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(tokens)
    _in_step(cache, tokens)


def _repeated(value: LatentKV, again: torch.Tensor) -> LatentKV:
    made = value if value.length >= len(again) else extend([value], len(again) - value.length)[0]
    made.codes[: len(again)] = made.codes[again]
    return made


def _in_step(cache: Any, tokens: int) -> None:
    """Layers share positions, as those of a cache that was filled by a prompt do."""
    latents = [v for layer in cache.layers for v in (layer.keys, layer.values) if isinstance(v, LatentKV)]
    first = next((v for v in latents if v.positions is not None), None)
    if first is None:
        return
    assert first.rows is not None and first.positions is not None
    first.positions[:tokens] = torch.arange(tokens, dtype=first.positions.dtype)[:, None]
    for value in latents:
        if value.positions is not None and value is not first:
            assert value.rows is not None and first.rows.track is not None
            value.rows.moved_to(first.rows.track)


def measure(runners: Sequence[tuple[Way, Runner]], tokens: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """One step of each way's runner on a cache of ``tokens``, in turns; each step appends a token."""
    token = models.random_ids(1).expand(batch, -1).contiguous()
    caches = []
    for _, runner in runners:
        caches.append(filled(runner, tokens, batch, WARMUP + repeats + 1))
        for _ in range(WARMUP):
            runner.call(token, caches[-1])
    sizes = [{"held_bytes": cache_bytes(c), "used_bytes": cache_nbytes(c, used=True)} for c in caches]
    steps = [lambda r=r, c=c: r.call(token, c) for (_, r), c in zip(runners, caches, strict=True)]
    return [
        way.about | {"seconds": seconds, "median_s": statistics.median(seconds)} | size
        for (way, _), seconds, size in zip(runners, interleaved(steps, repeats), sizes, strict=True)
    ]


def dense_bytes(config: Any, tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Of one dense cache."""
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * dtype.itemsize * tokens * batch


def affordable(wanted: Sequence[Way], one: int) -> list[Way]:
    """The ways whose caches fit ``MOST`` bytes together; eager is the first to go. Empty where the others do not."""
    needed = [one if w.options is None else round(one * w.options["ratio"] * 1.2) for w in wanted]
    if sum(needed) <= MOST:
        return list(wanted)
    rest = [w for w in wanted if w.name != EAGER]
    return affordable(rest, one) if len(rest) < len(wanted) else []


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", default=list(models.CONFIGS), choices=list(models.CONFIGS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--ways", nargs="+", default=[], help="names of variants, instead of all")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="depths, instead of the shape's own")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    about = {"command": command("decode", argv), "machine": machine(), "fill": FILL}
    found: dict[str, Any] = {**about, "rows": [], "left_out": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, dtype, layers in itertools.product(args.models, args.dtype, args.layers or [None]):
        torch.compiler.reset()
        model = models.build(name, getattr(torch, dtype), layers=layers)
        chosen = [w for w in ways(args.ratios) if not args.ways or w.name in args.ways]
        runners = [(way, way.runner(model)) for way in chosen]
        for batch, tokens in itertools.product(args.batch, args.tokens):
            case = {"model": name, "dtype": dtype, "layers": layers, "batch": batch, "tokens": tokens}
            one = dense_bytes(model.config, tokens, batch, model.dtype)
            kept = affordable(chosen, one)
            missing = [way.name for way in chosen if way not in kept]
            if missing:
                found["left_out"].append({**case, "ways": missing, "dense_bytes": one})
            say(f"{name} {dtype}, batch {batch}, {tokens} tokens" + (f"; without {missing}" if missing else ""))
            for row in measure([(w, r) for w, r in runners if w in kept], tokens, batch, args.repeats) if kept else []:
                found["rows"].append({**case, **row})
                say(f"  {row['variant']:24} {1e3 * row['median_s']:9.2f} ms {row['used_bytes'] / 2**20:9.1f} MiB")
            write_json(args.out, found)
    say(f"written to {args.out}")


if __name__ == "__main__":
    main()
