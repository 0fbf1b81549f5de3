"""Keys that are turned after their projection, as ``turn.cpp`` decodes them: which features are turned, and by what."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from . import native
from .stored import Stored

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


class _Turn(ctypes.Structure):
    _fields_ = [
        ("matrix", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("matrix_kind", "n")),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_kind", "row", "batch")),
        *((name, ctypes.c_void_p) for name in ("mean", "weight")),
        *((name, ctypes.c_float) for name in ("eps", "share")),
        *((name, ctypes.c_void_p) for name in ("sources", "dims")),
        *((name, ctypes.c_int64) for name in ("dim", "pairs", "heads")),
    ]


_PLANS: WeakKeyDictionary[Operand, tuple[torch.Tensor, torch.Tensor]] = WeakKeyDictionary()
"""Sources and dims of an operand's turn, as C++ reads them."""


def reads(operand: Operand) -> bool:
    """Whether ``turn.cpp`` decodes such rows, and there is a compiler for it."""
    if operand.turn is None or operand.columns is not None or not operand.decodes or native.library() is None:
        return False
    return operand.format.choices <= 2 and native.layout(operand.format, operand.groups) is not None


def given(operand: Operand, stored: Stored) -> tuple[_Turn, tuple[Any, ...]]:
    """For ``lorc_attend``, and what must be held while it runs. The caller has asked ``reads``."""
    turn, table = operand.turn, stored.codec[-1]
    decode, mean, _ = stored.parts(operand)
    assert turn is not None and decode is not None
    if operand not in _PLANS:
        _PLANS[operand] = torch.tensor(turn.sources), torch.tensor(turn.dims)
    sources, dims = _PLANS[operand]
    tokens, batch, _ = stored.rows.shape
    fits = table.shape[0] == 2 * turn.pairs and table.shape[1] in (1, batch) and table.shape[2] == tokens
    assert fits and table.stride(2) == 1, f"a table {tuple(table.shape)} for {tokens} tokens of {batch} rows"
    weight = None if turn.eps is None else stored.codec[-2]
    assert weight is None or (weight.dtype == torch.float32 and weight.is_contiguous())
    decode, shift = decode.contiguous(), None if mean is None else mean.float().contiguous()
    made = _Turn(
        decode.data_ptr(),
        native.KINDS[decode.dtype],
        decode.shape[1],
        table.data_ptr(),
        native.KINDS[table.dtype],
        table.stride(0),
        table.stride(1) if table.shape[1] > 1 else 0,
        None if shift is None else shift.data_ptr(),
        None if weight is None else weight.data_ptr(),
        turn.eps or 0.0,
        1 / operand.head_dim,
        sources.data_ptr(),
        dims.data_ptr(),
        len(turn.dims),
        turn.pairs,
        operand.heads,
    )
    return made, (sources, dims, table, weight, decode, shift)
