"""What a reader costs, as SymPy expressions; the planner of lowerings compares them.

Per cached token and layer, in FLOPs of one decoding step: S query tokens, H query heads, D head dim, n the cached
width, r the rank. A reader that decodes to memory also writes and reads the dense value; absorbing never does.
"""

from __future__ import annotations

from typing import Any

import sympy

S, H, D, n, r = sympy.symbols("S H D n r", positive=True)

DECODE_THEN_READ = 2 * r * n + 2 * S * H * D
"""Decode y_hat = c S (2 r n), then one product over D per query and head."""

READ_LATENT = 2 * S * H * r
"""One product over r per query and head; the D x r product per query does not grow with T."""

_saves = sympy.lambdify((S, H, D, n, r), DECODE_THEN_READ - READ_LATENT, modules="math")


def absorbs(queries: Any, heads: int, head_dim: int, width: int, rank: int) -> bool:
    """Whether reading the latent is cheaper than decoding first, for a static number of query tokens."""
    return isinstance(queries, int) and _saves(queries, heads, head_dim, width, rank) > 0
