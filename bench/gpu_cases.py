"""What ``bench.gpu`` times of attention itself: ways to store a pair of caches, dense attention, configs of kernels.

Rows are those of a few hundred tokens, packed once and then repeated: what is in them does not change the time.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from bench.attention_cases import BF16, Case, Given, build, moved
from lorc_fx.kernels import launch
from lorc_fx.kernels.config import Config
from lorc_fx.kernels.stored import Stored


@dataclass(frozen=True)
class Shape:
    """Query heads, cached heads, head dim; ``small``: tokens that are packed and then repeated."""

    heads: int
    cached: int
    dim: int
    small: int


LLAMA = Shape(32, 8, 128, 512)
"""Llama 3 8B."""
TINY = Shape(4, 2, 32, 32)
"""For machines without a GPU."""


@dataclass(frozen=True)
class Side:
    """Keys or values: ``part`` of all columns at ``bits`` (0: the model's dtype); ``joint``: in a basis over all heads,
    else the columns are what the dense cache holds. ``rotary``: decoded and turned in the kernel."""

    bits: int
    part: float = 1.0
    joint: bool = False
    rotary: bool = False

    def case(self, shape: Shape, tokens: int, dtype: torch.dtype) -> Case:
        segments = ((round(shape.cached * shape.dim * self.part), self.bits),)
        return Case(
            tokens=tokens,
            heads=shape.heads,
            cached=shape.cached,
            dim=shape.dim,
            batch=1,
            dtype=dtype,
            keys=segments,
            values=segments,
            matrix=self.joint,
            rotary="half" if self.rotary else None,
        )


INT8, INT4, HALF = Side(8), Side(4), Side(8, 0.5, joint=True)
WAYS: dict[str, tuple[Side, Side]] = {
    "int8": (INT8, INT8),
    "4 bits": (INT4, INT4),
    "model's dtype": (Side(0), Side(0)),
    "int8 keys, joint values": (INT8, HALF),
    "joint": (HALF, HALF),
    "joint, rotary in tiles": (replace(HALF, rotary=True), HALF),
}
"""name -> how keys and values are stored. int8 is half of a 16-bit cache, 4 bits are a quarter, both without the turn
of heads that the codec also does to queries and results."""

QUICK = ("int8", "joint, rotary in tiles")
"""Ways for machines without a GPU."""

CONFIGS = (
    *(Config(tokens=t, columns=c, warps=w) for t, c, w in itertools.product((64, 32), (64, 128), (8, 4))),
    *(Config(tokens=128, columns=c, warps=8) for c in (64, 128)),
    *(Config(tokens=t, columns=64, warps=w, stages=3) for t, w in ((64, 8), (32, 4), (128, 8))),
)
"""What is tried beside the default. Not 128 tokens with 4 warps, which take longest to compile. No masks are there, so
``skips`` says nothing."""


@cache
def reader(way: str, shape: Shape, dtype: torch.dtype = BF16) -> Given:
    """The arguments of ``attend`` for ``shape.small`` tokens of one batch row, on the CPU."""
    keys, values = (build(side.case(shape, shape.small, dtype)) for side in WAYS[way])
    about = replace(keys[0], values=values[0].values)
    return about, keys[1], keys[2], values[3], ()


def grown(given: Given, tokens: int, batch: int, device: torch.device) -> Given:
    """The same reader over ``tokens`` of ``batch`` rows on ``device``: its own tokens again and again."""
    about, query, keys, values, extras = moved(given, device)

    def more(stored: Stored) -> Stored:
        times = -(-tokens // stored.rows.shape[0])
        rows = stored.rows.repeat(times, batch, 1)[:tokens]
        side = None if stored.side is None else stored.side.repeat(times, batch)[:tokens]
        return Stored(rows, side, stored.codec)

    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn(batch, *query.shape[1:], device=device, generator=generator).to(query.dtype)
    return about, query, more(keys), more(values), extras


def row_bytes(given: Given) -> int:
    """Bytes of a token of one batch row, in rows and beside them: what must be read at least."""
    total = 0
    for stored in given[2:4]:
        for tensor in (stored.rows, stored.side):
            total += 0 if tensor is None else tensor[0, 0].numel() * tensor.element_size()
    return total


def candidates(way: str, shape: Shape, dtype: torch.dtype = BF16) -> dict[str, Config]:
    """Configs by name; the first is what the library takes."""
    given = reader(way, shape, dtype)
    first = launch.default(given[0], launch.given_of(*given))
    return {"default": first} | {words(c): c for c in CONFIGS if c != first}


def words(config: Config) -> str:
    """A config in one line."""
    c = config
    return f"tokens {c.tokens}, columns {c.columns}, warps {c.warps}, stages {c.stages}, splits {c.splits or 'auto'}"


def warm(job: str, device: torch.device) -> dict[str, Any]:
    """Compiles one config of ``WAY:I:BATCH`` on the Llama shape: what a batch is a multiple of is compiled in."""
    way, i, batch = job.rsplit(":", 2)
    config = list(candidates(way, LLAMA).values())[int(i)]
    given = grown(reader(way, LLAMA), LLAMA.small, int(batch), device)
    launch.attend(*given, config)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {}


MOST_REPEATED = 1 << 16
"""Cached tokens of all batch rows up to which torch's own products are timed."""


# -- dense ------------------------------------------------------------------------------------------------------------


def dense_calls(
    shape: Shape, tokens: int, batch: int, device: torch.device, dtype: torch.dtype = BF16
) -> dict[str, Callable[[], torch.Tensor]]:
    """SDPA of one query token over a dense cache, by each of torch's backends that takes it: with ``enable_gqa``, and
    with the query heads of a cached head as its queries (no backend then repeats keys). Where caches are large
    torch's own products are left out, which repeat them in memory; a backend that refuses is left out too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(batch, shape.heads, 1, shape.dim, device=device).to(dtype)
    keys, values = (torch.randn(batch, shape.cached, tokens, shape.dim, device=device, dtype=dtype) for _ in range(2))
    grouped = query.view(batch, shape.cached, -1, shape.dim)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if tokens * batch <= MOST_REPEATED:
        backends["math"] = SDPBackend.MATH
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for (name, backend), folded in itertools.product(backends.items(), (False, True)):

        def call(backend: Any = backend, folded: bool = folded) -> torch.Tensor:
            with sdpa_kernel(backend):
                q = grouped if folded else query
                return F.scaled_dot_product_attention(q, keys, values, enable_gqa=not folded)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend refuses
                call()
        except RuntimeError:  # a backend that this device, dtype or torch does not have
            continue
        found[f"{name}, heads as queries" if folded else name] = call
    return found
