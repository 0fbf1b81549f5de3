"""What a reader costs, as SymPy expressions; lowerings are compared by them.

One operand (keys or values) of one layer in one decode step. B rows of a batch, T cached tokens, S query tokens, H
query heads, D head dim, n the cached width, k the numbers that a row holds, w its bytes, e bytes of a number in
the model's dtype, g groups of heads that have columns of their own (1: every head reads all). Bytes are those that must
be moved at least once, FLOPs those of products and of an epilogue, numbers those that are unpacked from rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy

B, T, S, H, D, n, k, w, e, g = sympy.symbols("B T S H D n k w e g", positive=True)

READ_DENSE = 2 * S * H * D
"""FLOPs per cached token: one product over D per query and head."""

DECODE = 2 * k * n / g
"""FLOPs per cached token of y_hat = c S."""

READ_LATENT = 2 * S * H * k / g
"""FLOPs per cached token: one product over its columns per query and head; the D x k product per query does not grow
with T."""

EPILOGUE = 6 * n
"""FLOPs per cached token of a rotation: two products, a sum and their share of cosines; a norm is about as much."""

TURN = 3 * n
"""FLOPs per cached token of a rotation whose cosines are known: two products and a sum."""

PASSES = 4 * k + EPILOGUE
"""Numbers per cached token that ops read one by one where a token is decoded by ops: unpacking, taking the middle off,
step and scale for what is stored; then each FLOP of an epilogue, which no product is part of."""


@dataclass(frozen=True)
class Cost:
    """``bytes`` moved, ``flops`` and ``numbers`` unpacked, as expressions of the symbols above. ``apart``: memory and
    products one after the other, as by ops that each write their result; else at once. ``stored``: products are with
    the rows as they are stored."""

    bytes: sympy.Expr
    flops: sympy.Expr
    numbers: sympy.Expr = sympy.Integer(0)
    apart: bool = False
    stored: bool = False


MATRIX = k * n * e / g

LOWERINGS: dict[str, Cost] = {
    # the dense cache, read in place
    "dense": Cost(B * T * n * e, B * T * READ_DENSE),
    # the dense cache, each head written and read again for every query head of its group first: SDPA on a CPU
    "repeated": Cost(B * T * (n + 2 * H * D) * e, B * T * READ_DENSE),
    # what the dense cache would hold, at lower precision (basis "identity")
    "rows": Cost(B * T * w, B * T * READ_DENSE, B * T * n, stored=True),
    # absorbed: the query moves into latent space, or the sum of latents is projected up
    "latent": Cost(B * T * w + MATRIX, B * T * READ_LATENT + B * S * H * 2 * D * k / g, B * T * k, stored=True),
    # decoded and turned inside of one kernel, by cosines and sines of all positions that are there once for all layers
    "turned": Cost(B * T * (w + D * e) + MATRIX, B * T * (DECODE + TURN + READ_DENSE), B * T * k),
    # decoded tile by tile
    "tiles": Cost(B * T * w + MATRIX, B * T * (DECODE + EPILOGUE + READ_DENSE), B * T * PASSES),
    # decoded as a whole: the dense value is written, and read again
    "decoding": Cost(
        B * T * (w + 2 * n * e) + MATRIX, B * T * (DECODE + EPILOGUE + READ_DENSE), B * T * PASSES, apart=True
    ),
}
"""lowering -> its cost. The names are those of ``explain``."""


@dataclass(frozen=True)
class Device:
    """What a device does at best. bandwidth: bytes/s. flops: FLOP/s of a product of matrices; products: of those with
    stored rows, where they are slower. numbers: that come out of packed rows, per second; passed: that ops read and
    write, where they are fewer (inf where that never counts). call: seconds of an attention over a single stored token.
    fused: whether tiles are decoded inside of one kernel, and dense attention reads a head once for its group; on a CPU
    tiles are decoded by ops one after the other, and heads are repeated. source: measured here, or a datasheet."""

    name: str
    bandwidth: float
    flops: float
    source: str
    numbers: float = math.inf
    call: float = 0.0
    fused: bool = True
    products: float = math.inf
    passed: float = math.inf


TYPICAL = {
    "cpu": Device("cpu", 1.0, 4.0, "TYPICAL", numbers=0.2, fused=False),
}
"""What a device of a kind does in the time of reading a byte, about. Plans go by these and not by a measurement,
so that the same options give the same plan each time. (The CPU of bench/results/lowerings.json does 5.0 FLOPs and
0.73 numbers at best; readers of long caches take up to four times what that says.)"""

OTHERS = Device("accelerator", 1.0, 100.0, "TYPICAL")
"""GPUs in datasheets: 150 to 300 FLOPs a byte."""


def typical(kind: str) -> Device:
    """A device that reads one byte a second, by ``torch.device.type``: good for comparing lowerings."""
    return TYPICAL.get(kind, OTHERS)


SYMBOLS = (B, T, S, H, D, n, k, w, e, g)
_NUMBERS = {
    name: sympy.lambdify(SYMBOLS, (c.bytes, c.flops, c.numbers), modules="math") for name, c in LOWERINGS.items()
}


def counted(lowering: str, **sizes: float) -> tuple[float, float, float]:
    """Bytes, FLOPs and unpacked numbers of a lowering for ``sizes`` by the symbols' names (all of them; ``g`` is 1
    where it is left out). Raises KeyError for a lowering that there is not."""
    sizes = {"g": 1, **sizes}
    bytes_, flops, numbers = _NUMBERS[lowering](*(sizes[str(s)] for s in SYMBOLS))
    return bytes_, flops, numbers


def seconds(lowering: str, device: Device, **sizes: float) -> float:
    """The least time of a lowering on ``device``: whatever of memory, arithmetic and unpacking takes longest
    (Williams et al., Roofline, 2009), or their sum where they are ``apart``; and an operand's share of a call."""
    if device.fused:  # generated kernels read every column of a row for every head
        sizes = {**sizes, "g": 1}
    apart, call = LOWERINGS[lowering].apart or (lowering == "tiles" and not device.fused), device.call / 2
    if lowering == "dense":
        call = 0.0
        if not device.fused and sizes["H"] * sizes["D"] > sizes["n"]:
            lowering = "repeated"
    moved, flops, numbers = counted(lowering, **sizes)
    rate = min(device.flops, device.products) if LOWERINGS[lowering].stored else device.flops
    unpacked = min(device.numbers, device.passed) if apart else device.numbers
    parts = (moved / device.bandwidth, flops / rate, numbers / unpacked)
    return call + (sum(parts) if apart else max(parts))


_saves = sympy.lambdify((S, H, D, n, k, g), DECODE + READ_DENSE - READ_LATENT, modules="math")


def absorbs(queries: Any, heads: int, head_dim: int, width: int, rank: int, groups: int = 1) -> bool:
    """Whether reading the latent takes fewer FLOPs than decoding first, for a static number of query tokens."""
    return isinstance(queries, int) and _saves(queries, heads, head_dim, width, rank, groups) > 0
