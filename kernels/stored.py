"""One cached operand's tensors, as the op gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .attend import Operand


def by_head(operand: Operand, source: torch.Tensor) -> torch.Tensor:
    """A codec's matrix or mean as the operand's heads see it: [k, n] -> [heads, k, D]; of a codec in groups [heads, k /
    groups, D], each head's own columns."""
    source = source if operand.columns is None else source[:, list(operand.columns)]
    return source.unflatten(1, (operand.heads, operand.head_dim)).transpose(0, 1)


def times(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """x [B, heads, M, a] times one matrix [heads, a, b] per head -> [B, heads, M, b]; a matrix is never copied for each
    row of the batch."""
    return torch.bmm(x.transpose(0, 1).flatten(1, 2), matrices).unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def strides(tensor: torch.Tensor) -> list[int]:
    """Steps along [B, H, S, T] of what is broadcast to that, 0 where a tensor has one for all."""
    own = [0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return [0] * (4 - len(own)) + own


@dataclass(frozen=True)
class Stored:
    """rows [T, B, width], what is stored beside them [T, B, ...] or None, and the codec's tensors in the op's order."""

    rows: torch.Tensor
    side: torch.Tensor | None
    codec: tuple[torch.Tensor, ...]

    def parts(self, operand: Operand) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """decode [k, n] (compact where the operand is in groups), mean [n] (None where the operand has none), and the
        decoder's constants."""
        at = iter(self.codec)
        decode = next(at) if operand.decodes else None
        mean = next(at) if operand.has_mean else None
        consts = tuple(at)
        return decode, mean, consts if operand.turn is None else consts[: -operand.turn.tensors]

    def at(self, tokens: torch.Tensor, batch: torch.Tensor, operand: Operand) -> Stored:
        """The same of these tokens and batch rows, by their numbers."""
        side, codec = self.side, self.codec
        if operand.turn is not None:
            table = codec[-1][..., tokens]  # [2 pairs, B or 1, T]
            codec = (*codec[:-1], table[:, batch].contiguous() if table.shape[1] > 1 else table)
        return Stored(self.rows[tokens][:, batch], None if side is None else side[tokens][:, batch], codec)
