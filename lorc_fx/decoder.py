"""From decoded vectors back to what the dense cache would hold: the site's epilogue as a small FX graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule


@dataclass(frozen=True, eq=False)
class Decoder:
    """The epilogue of a site, for any number of tokens.

    ``module(y, positions, *consts)`` takes y [B, T, n] and, where ``needs_positions``, positions [B, T] int32, and
    returns the dense cache value, whose dims ``layout`` names: ``"B"``, ``"T"`` or the int size of a feature dim.
    ``words`` says in English what lies between projection and cache. ``shared_positions``: the epilogue reads one
    position for all batch rows (that of row 0).
    """

    module: GraphModule
    width: int
    layout: tuple[str | int, ...]
    dtype: torch.dtype
    needs_positions: bool
    words: str
    shared_positions: bool = False
    digest: str = field(default="")

    def __post_init__(self) -> None:
        if not self.digest:
            text = "|".join([self.module.code, str(self.width), str(self.layout), str(self.dtype)])
            object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest()[:16])

    @property
    def batch_dim(self) -> int:
        return self.layout.index("B") if "B" in self.layout else -1

    @property
    def token_dim(self) -> int:
        return self.layout.index("T")

    def shape(self, batch: Any, tokens: Any) -> list[Any]:
        """The dense shape for ``batch`` rows and ``tokens`` tokens."""
        return [batch if d == "B" else tokens if d == "T" else d for d in self.layout]

    def placed(self, rows: torch.Tensor) -> torch.Tensor:
        """A value per row [T, B] in the layout, with sizes of one for the feature dims."""
        at = [1 if d == "B" else 0 for d in self.layout if d in ("B", "T")]
        moved = rows.permute(at) if len(at) == 2 else rows[:, 0]
        return moved.reshape([rows.shape[1] if d == "B" else rows.shape[0] if d == "T" else 1 for d in self.layout])

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
    """latents [T, B, k], positions [T, B] int32 -> the dense cache value in the decoder's layout."""
    y = decode_vectors(latents, decode, mean)
    return decoder.module(y, None if positions is None else positions.transpose(0, 1), *consts)
