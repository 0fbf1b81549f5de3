"""From decoded vectors back to what the dense cache would hold: the site's epilogue as a small FX graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule


@dataclass(frozen=True)
class Side:
    """What is kept of each token beside its codes: ``width`` features of ``dtype``, or (None) one position."""

    width: int | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes per token."""
        return (self.width or 1) * self.dtype.itemsize

    @property
    def features(self) -> list[int]:
        """Its sizes behind tokens and batch."""
        return [] if self.width is None else [self.width]


POSITION = Side(None, torch.int32)


@dataclass(frozen=True, eq=False)
class Decoder:
    """The epilogue of a site, for any number of tokens.

    ``module(y, positions, *consts)`` takes y [B, T, n] and, where there is a ``side``, positions [B, T, *side.features]
    of its dtype (int32 [B, T], as a rule), and returns the dense cache value, whose dims ``layout`` names: ``"B"``,
    ``"T"`` or the int size of a feature dim. ``words`` says in English what lies between projection and cache.
    ``shared_positions``: the epilogue reads one position for all batch rows (that of row 0).
    """

    module: GraphModule
    width: int
    layout: tuple[str | int, ...]
    dtype: torch.dtype
    side: Side | None
    words: str
    shared_positions: bool = False
    digest: str = field(default="")

    def __post_init__(self) -> None:
        if not self.digest:
            text = "|".join([self.module.code, str(self.width), str(self.layout), str(self.dtype), str(self.side)])
            object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest()[:16])

    @property
    def needs_positions(self) -> bool:
        return self.side is not None

    @cached_property
    def batch_dim(self) -> int:
        return self.layout.index("B") if "B" in self.layout else -1

    @cached_property
    def token_dim(self) -> int:
        return self.layout.index("T")

    def shape(self, batch: Any, tokens: Any) -> list[Any]:
        """The dense shape for ``batch`` rows and ``tokens`` tokens."""
        return [batch if d == "B" else tokens if d == "T" else d for d in self.layout]

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        return self


def decode_vectors(latents: torch.Tensor, decode: torch.Tensor | None, mean: torch.Tensor | None) -> torch.Tensor:
    """latents [T, B, k] -> y_hat [B, T, n]: c S + mu."""
    y = latents if decode is None else latents @ decode
    y = y.transpose(0, 1)
    return y if mean is None else y + mean


def decode_dense(
    decoder: Decoder,
    latents: torch.Tensor,
    positions: torch.Tensor | None,
    decode: torch.Tensor | None,
    mean: torch.Tensor | None,
    consts: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """latents [T, B, k], positions [T, B] (or [T, B, side]) -> the dense cache value in the decoder's layout."""
    y = decode_vectors(latents, decode, mean)
    return decoder.module(y, None if positions is None else positions.transpose(0, 1), *consts)
