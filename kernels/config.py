"""What a kernel is generated for, and what is generated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .attend import Operand
from .numbered import Constant

LATE = ("rows", "T", "split")
"""Arguments that change from call to call: no kernel is compiled anew for their values."""


@dataclass(frozen=True)
class Config:
    """What a tuner may choose.

    tokens: of a block. columns: of a chunk of a row. splits: of all tokens, 0: by their number and the device. warps,
    stages: as Triton takes them. skips: whether blocks that a mask hides are not read (then no loads are pipelined).
    """

    tokens: int = 64
    columns: int = 64
    splits: int = 0
    warps: int = 4
    stages: int = 2
    skips: bool = True


@dataclass(frozen=True)
class Tile:
    """The same on a CPU: ``tokens`` at a time."""

    tokens: int


@dataclass(frozen=True)
class Met:
    """An extra as it comes: which of batch, heads, queries and tokens it differs along, and its kind (``bool``,
    ``float``, ``int``)."""

    batch: bool
    head: bool
    query: bool
    token: bool
    kind: str


@dataclass(frozen=True)
class Given:
    """What a kernel is made for beside the ``Attend``. heads, queries: H_q and S. product: Triton's dtype of
    products, and of what they take (``float32``, ``bfloat16``, ``float16``)."""

    heads: int
    queries: int
    product: str
    keys: tuple[Constant, ...]
    values: tuple[Constant, ...]
    extras: tuple[Met, ...]

    def __hash__(self) -> int:
        return self._hash  # looked up by several tables in each call

    @cached_property
    def _hash(self) -> int:
        return hash((self.heads, self.queries, self.product, self.keys, self.values, self.extras))


@dataclass(frozen=True, eq=False)
class Kernel:
    """Generated source (a module with ``attend`` and ``combine``) and what its launch must know: ``groups`` programs
    per batch row and split, ``rows`` M of queries in each, ``width`` numbers of a weighted sum."""

    source: str
    groups: int
    rows: int
    width: int
    tables: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


def latent(operand: Operand) -> bool:
    """Whether products are taken with latents: the launcher multiplies queries and sums by the codec's matrix."""
    return operand.absorbed and operand.decodes
