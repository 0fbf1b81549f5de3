"""Keys that are turned after their projection, as ``turn.cpp`` decodes them: which features are turned, and by what."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import native

if TYPE_CHECKING:
    from .attend import Operand


@dataclass(frozen=True)
class Turn:
    """An epilogue that turns pairs of a head's features by angles of the token's position, the same for all heads:

        k[t, i] = y[t, a] cos(t, j) - y[t, a'] sin(t, j)        k[t, i'] = y[t, a'] cos(t, j) + y[t, a] sin(t, j)

    dims: the features i, i' of a head's key, pair by pair, then those that are y as it is. sources: the columns a, a'
    of y that they are made of, head by head. pairs: how many there are. eps: where heads are normed before, w y /
    sqrt(mean y^2 + eps). (The graph makes the cosines and sines, [2 pairs, B or 1, T]: the last one of the codec's
    tensors; before it w [D] fp32, in the order of ``dims``, where there is a norm.)
    """

    dims: tuple[int, ...]
    sources: tuple[int, ...]
    pairs: int
    eps: float | None = None

    @property
    def tensors(self) -> int:
        """Of the codec's tensors, how many are its own: the last ones."""
        return 1 if self.eps is None else 2


class Given(ctypes.Structure):
    """A turn for ``attend.cpp``."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_kind", "row", "batch")),
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("eps", "share")),
        *((name, ctypes.c_void_p) for name in ("sources", "dims")),
        *((name, ctypes.c_int64) for name in ("dim", "pairs", "heads")),
    ]


def reads(operand: Operand) -> bool:
    """Whether ``turn.cpp`` decodes such rows, and there is a compiler for it."""
    if operand.turn is None or operand.columns is not None or not operand.decodes or native.library() is None:
        return False
    return operand.format.choices <= 2 and native.layout(operand.format, operand.groups) is not None


def given(operand: Operand, kept: list[Any]) -> Given:
    """What of an operand's turn is the same in each call. ``kept``: gets what it points to."""
    turn = operand.turn
    assert turn is not None
    sources, dims = torch.tensor(turn.sources), torch.tensor(turn.dims)
    kept += [sources, dims]
    return Given(
        eps=turn.eps or 0.0,
        share=1 / operand.head_dim,
        sources=sources.data_ptr(),
        dims=dims.data_ptr(),
        dim=len(turn.dims),
        pairs=turn.pairs,
        heads=operand.heads,
    )
