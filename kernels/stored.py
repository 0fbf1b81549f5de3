"""One cached operand's tensors, as the op gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .attend import Operand


@dataclass(frozen=True)
class Stored:
    """rows [T, B, width], what is stored beside them [T, B, ...] or None, and the codec's tensors in the op's order."""

    rows: torch.Tensor
    side: torch.Tensor | None
    codec: tuple[torch.Tensor, ...]

    def parts(self, operand: Operand) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """decode [k, n], mean [n] (None where the operand has none), and the decoder's constants."""
        at = iter(self.codec)
        decode = next(at) if operand.decodes else None
        mean = next(at) if operand.has_mean else None
        return decode, mean, tuple(at)
