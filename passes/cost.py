"""What a reader costs, as SymPy expressions; lowerings are compared by them.

One operand (keys or values) of one layer in one decode step. B rows of a batch, T cached tokens, S query tokens, H
query heads, D head dim, n the cached width, k the numbers that a row holds, w its bytes, e bytes of a number in the
model's dtype. Bytes are those that must be moved at least once, FLOPs those of products, of unpacking (one a number)
and of an epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

B, T, S, H, D, n, k, w, e = sympy.symbols("B T S H D n k w e", positive=True)

READ_DENSE = 2 * S * H * D
"""FLOPs per cached token: one product over D per query and head."""

DECODE = 2 * k * n
"""FLOPs per cached token of y_hat = c S."""

READ_LATENT = 2 * S * H * k
"""FLOPs per cached token: one product over k per query and head; the D x k product per query does not grow with T."""

EPILOGUE = 6 * n
"""FLOPs per cached token of a rotation: two products, a sum and their share of cosines; a norm is about as much."""


@dataclass(frozen=True)
class Cost:
    """``bytes`` moved and ``flops``, as expressions of the symbols above."""

    bytes: sympy.Expr
    flops: sympy.Expr


MATRIX = k * n * e

LOWERINGS: dict[str, Cost] = {
    # the dense cache, read in place
    "dense": Cost(B * T * n * e, B * T * READ_DENSE),
    # what the dense cache would hold, at lower precision (basis "identity")
    "rows": Cost(B * T * w, B * T * (READ_DENSE + n)),
    # absorbed: the query moves into latent space, or the sum of latents is projected up
    "latent": Cost(B * T * w + MATRIX, B * T * (READ_LATENT + k) + B * S * H * 2 * D * k),
    # decoded tile by tile
    "tiles": Cost(B * T * w + MATRIX, B * T * (DECODE + EPILOGUE + k + READ_DENSE)),
    # decoded as a whole: the dense value is written, and read again
    "decoding": Cost(B * T * (w + 2 * n * e) + MATRIX, B * T * (DECODE + EPILOGUE + k + READ_DENSE)),
}
"""lowering -> its cost. The names are those of ``explain``."""


@dataclass(frozen=True)
class Device:
    """What a device does at best: ``bandwidth`` in bytes/s and ``flops`` in FLOP/s of the products that readers make.
    ``source``: measured here, or a datasheet."""

    name: str
    bandwidth: float
    flops: float
    source: str


TYPICAL = {"cpu": 5.0}
"""FLOPs of products that a device of a kind does in the time of reading a byte, about; others 100. Plans go by these
and not by a measurement, so that the same options give the same plan each time. (GPUs in datasheets: 150 to 300.)"""


def typical(kind: str) -> Device:
    """A device that reads one byte a second, by ``torch.device.type``: good for comparing lowerings."""
    return Device(kind, 1.0, TYPICAL.get(kind, 100.0), "TYPICAL")


SYMBOLS = (B, T, S, H, D, n, k, w, e)
_NUMBERS = {name: sympy.lambdify(SYMBOLS, (c.bytes, c.flops), modules="math") for name, c in LOWERINGS.items()}


def counted(lowering: str, **sizes: float) -> tuple[float, float]:
    """Bytes and FLOPs of a lowering for ``sizes`` by the symbols' names (all of them). Raises KeyError for a lowering
    that there is not."""
    bytes_, flops = _NUMBERS[lowering](*(sizes[str(s)] for s in SYMBOLS))
    return bytes_, flops


def seconds(lowering: str, device: Device, **sizes: float) -> float:
    """The least time of a lowering on ``device``: whatever of memory and arithmetic takes longer (Williams et al.,
    Roofline, 2009)."""
    moved, flops = counted(lowering, **sizes)
    return max(moved / device.bandwidth, flops / device.flops)


_saves = sympy.lambdify((S, H, D, n, k), DECODE + READ_DENSE - READ_LATENT, modules="math")


def absorbs(queries: Any, heads: int, head_dim: int, width: int, rank: int) -> bool:
    """Whether reading the latent takes fewer FLOPs than decoding first, for a static number of query tokens."""
    return isinstance(queries, int) and _saves(queries, heads, head_dim, width, rank) > 0
