"""Each way to read a pair of caches, timed apart from any model, beside what the cost model predicts.

    python -m bench.lowerings [--out bench/results/lowerings.json] [--threads 2] [--tokens 512 2048 8192 32768]

One layer, one query token; all ways of a case take turns, medians. Keys are rotary where they are decoded. A pair of
ways is ranked right where the prediction has the same order as the measurement; pairs that are within 10 % of one
another are ties and not counted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import symbolic_trace

from bench.run import RESULTS, machine
from lorc_fx.console import write_json
from lorc_fx.decode_command import interleaved
from lorc_fx.decoder import POSITION, Decoder, decode_dense
from lorc_fx.device import measured
from lorc_fx.kernels import tiled
from lorc_fx.kernels.attend import Attend, Operand
from lorc_fx.kernels.stored import Stored
from lorc_fx.packing import Format, Segment, pack, unpack
from lorc_fx.passes import angles, cost, turns

#: name -> query heads, cached heads, head dim
SHAPES = {"gpt2": (16, 16, 64), "llama": (16, 4, 64), "llama-3-8b": (32, 8, 128)}
TOKENS = (512, 2048, 8192, 32768)
BATCHES = (1, 8)
#: numbers of a dense cache above which a case is left out (fp32: 1 GiB)
MOST = 1 << 28
TIE = 1.1


@dataclass(frozen=True)
class Way:
    """``key`` and ``value``: how each is read (names of ``cost.LOWERINGS``); ``by_heads``: each head in columns of its
    own."""

    name: str
    key: str
    value: str
    by_heads: bool = False

    def groups(self, heads: int) -> int:
        return heads if self.by_heads else 1


WAYS = (
    Way("dense", "dense", "dense"),
    Way("int8", "rows", "rows"),
    Way("int8, values half", "rows", "latent"),
    Way("half, absorbed", "latent", "latent"),
    Way("half, by heads", "latent", "latent", by_heads=True),
    Way("half, keys turned", "turned", "latent"),
    Way("half, by heads, keys turned", "turned", "latent", by_heads=True),
    Way("half, keys in tiles", "tiles", "latent"),
    Way("half, keys decoded", "decoding", "latent"),
)


def rotary(heads: int, dim: int) -> Decoder:
    class Epilogue(torch.nn.Module):
        def forward(self, y: Any, positions: Any) -> Any:
            y = y.unflatten(2, (heads, dim)).transpose(1, 2)
            frequency = 1e4 ** (-torch.arange(0, dim // 2, dtype=torch.float32) * 2 / dim)
            angle = (positions[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
            turned = torch.cat([-y[..., dim // 2 :], y[..., : dim // 2]], -1)
            return y * angle.cos() + turned * angle.sin()

    layout, digest = ("B", heads, "T", dim), f"r{heads}.{dim}"
    return Decoder(symbolic_trace(Epilogue()), heads * dim, layout, torch.float32, POSITION, "rotary", digest=digest)


def plain(heads: int, dim: int) -> Decoder:
    class Epilogue(torch.nn.Module):
        def forward(self, y: Any, positions: Any) -> Any:
            return y.unflatten(2, (heads, dim)).transpose(1, 2)

    module = symbolic_trace(Epilogue())
    return Decoder(module, heads * dim, ("B", heads, "T", dim), torch.float32, None, "none", digest=f"p{heads}.{dim}")


def operand(how: str, tokens: int, batch: int, heads: int, dim: int, groups: int = 1) -> tuple[Operand, Stored]:
    """One cached operand of int8 columns: all n of them as they are, or half as many in a joint basis, or in one for
    each of ``groups`` of heads."""
    n = heads * dim
    whole = how == "rows"
    form = Format((Segment(n if whole else n // 2, 8),), 1, torch.float32)
    rows = pack(torch.randn(tokens, batch, form.columns), None, None, form.spec, 1, torch.float32)
    decoded = how in ("turned", "tiles", "decoding")
    side = torch.arange(tokens, dtype=torch.int32)[:, None].expand(tokens, batch).contiguous() if decoded else None
    codec = () if whole else (torch.randn(form.columns // groups, n) / math.sqrt(n),)
    made = rotary(heads, dim) if decoded else plain(heads, dim)
    about = Operand(form, form.columns, made, heads, dim, None, not decoded, not whole, False, groups=groups)
    if how != "turned" or side is None:
        return about, Stored(rows, side, codec)
    found = turns.find(made, (), heads, dim)
    assert found is not None
    y = angles.probe(found.turn, made).expand(batch, tokens, n)  # its table is there once for all layers of a model
    table = made.module(y, side.T)[:, 0, :, angles.results(found.turn)].movedim(2, 0).contiguous()
    return replace(about, turn=found.turn), Stored(rows, side, (*codec, table))


def runs(tokens: int, batch: int, shape: tuple[int, int, int]) -> list[Callable[[], torch.Tensor]]:
    """A call of each of ``WAYS``."""
    query_heads, heads, dim = shape
    query = torch.randn(batch, query_heads, 1, dim)
    keys, values = (torch.randn(batch, heads, tokens, dim) for _ in range(2))
    scale = dim**-0.5
    scores = symbolic_trace(lambda scores: scores * scale)
    found: list[Callable[[], torch.Tensor]] = [
        lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=query_heads != heads)
    ]
    for way in WAYS[1:]:
        groups = way.groups(heads)
        (k, k_stored), (v, v_stored) = (operand(how, tokens, batch, heads, dim, groups) for how in (way.key, way.value))
        about = Attend(k, v, scores, ())
        if way.key == "decoding":
            found.append(_decoding(query, k, k_stored, v, v_stored, scale))
        else:
            found.append(lambda a=about, s=k_stored, t=v_stored: tiled.attend(a, query, s, t, ()))
    return found


def _decoding(query: Any, k: Operand, keys: Stored, v: Operand, values: Stored, scale: float) -> Callable[[], Any]:
    """Keys decoded as a whole, then as the dense cache; values absorbed, by torch ops."""

    def run() -> torch.Tensor:
        batch, heads, queries, _ = query.shape
        form = k.format
        latents = unpack(keys.rows, form.spec, form.choices, form.dtype)
        dense = decode_dense(k.decoder, latents, keys.side, keys.codec[0], None, ())
        grouped = query.reshape(batch, k.heads, -1, k.head_dim)
        weights = ((grouped @ dense.transpose(2, 3)) * scale).softmax(-1).reshape(batch, heads * queries, -1)
        summed = weights @ unpack(values.rows, v.format.spec, 1, v.format.dtype).transpose(0, 1)
        matrix = values.codec[0].unflatten(1, (v.heads, -1)).transpose(0, 1)
        return (summed.reshape(batch, v.heads, -1, summed.shape[-1]) @ matrix).reshape(batch, heads, queries, -1)

    return run


def predicted(way: Way, device: cost.Device, tokens: int, batch: int, shape: tuple[int, int, int]) -> float:
    """Seconds by the cost model."""
    query_heads, heads, dim = shape
    n = heads * dim
    total = 0.0
    for how in (way.key, way.value):
        k = n if how in ("rows", "dense") else n // 2
        sizes = {"B": batch, "T": tokens, "S": 1, "H": query_heads, "D": dim, "n": n, "k": k, "w": k + 2, "e": 4}
        sizes["g"] = way.groups(heads)
        total += cost.seconds(how, device, **sizes)
    return total


def measure(tokens: int, batch: int, shape: tuple[int, int, int], repeats: int) -> list[float]:
    """Median seconds of each of ``WAYS``."""
    calls = runs(tokens, batch, shape)
    for call in calls:
        call()
    return [statistics.median(t) for t in interleaved([partial(seconds, call) for call in calls], repeats)]


def seconds(call: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ranked(took: list[float], wanted: list[float]) -> tuple[int, int]:
    """Pairs in the right order, and pairs that are no ties."""
    right = pairs = 0
    for i, j in itertools.combinations(range(len(took)), 2):
        if max(took[i], took[j]) < TIE * min(took[i], took[j]):
            continue
        pairs += 1
        right += (took[i] < took[j]) == (wanted[i] < wanted[j])
    return right, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to read caches, measured and predicted.")
    parser.add_argument("--out", type=Path, default=RESULTS / "lowerings.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = measured(torch.device("cpu"))
    result: dict[str, Any] = {"machine": machine(), "command": "python -m bench.lowerings", "device": vars(device)}
    rows, right, pairs = [], 0, 0
    for (name, shape), batch, tokens in itertools.product(SHAPES.items(), BATCHES, args.tokens):
        if 2 * batch * tokens * shape[1] * shape[2] > MOST:
            continue
        took = measure(tokens, batch, shape, args.repeats)
        wanted = [predicted(way, device, tokens, batch, shape) for way in WAYS]
        good, all_ = ranked(took, wanted)
        right, pairs = right + good, pairs + all_
        ways = [
            {"name": w.name, "ms": 1e3 * t, "predicted_ms": 1e3 * p} for w, t, p in zip(WAYS, took, wanted, strict=True)
        ]
        rows.append(
            {"shape": name, "batch": batch, "tokens": tokens, "ways": ways, "ranked_right": good, "pairs": all_}
        )
        text = ", ".join(f"{w['name']} {w['ms']:.2f} ({w['predicted_ms']:.2f})" for w in ways)
        print(f"{name} B {batch} T {tokens}: {text}; {good}/{all_}", flush=True)
        write_json(args.out, {**result, "rows": rows, "ranked_right": right, "pairs": pairs})
    print(f"{right} of {pairs} pairs ranked right ({right / pairs:.1%})")


if __name__ == "__main__":
    main()
