"""LoRC as published (arXiv 2410.03111), written the straightforward way: what ``backend="lorc"`` is compared with.

Key and value projections become a product of two thin matrices, a stock transformers cache stores what the first gives,
and each step decodes all cached keys and values to memory, rotates the keys, and runs the model's own attention.
For decoders like Llama's (``k_proj``, ``v_proj``, ``k_norm`` where there is one, rotary positions), without padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from lorc_fx.schedulers import progressive_ranks


class Thin(torch.nn.Module):
    """y = W x + b from a latent: ``down`` [r, d] makes it, ``up`` [n, r] decodes it; truncated SVD of W [n, d]."""

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
        self.down = (values[:rank, None] * right[:rank]).to(linear.weight.dtype)
        self.up = left[:, :rank].to(linear.weight.dtype).contiguous()
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, d] -> latents [B, 1, S, r], as a cache wants them."""
        return torch.nn.functional.linear(x, self.down)[:, None]

    def decode(self, latent: torch.Tensor, width: int) -> torch.Tensor:
        """[B, 1, T, r] -> heads [B, H, T, width]."""
        return torch.nn.functional.linear(latent[:, 0], self.up, self.bias).unflatten(-1, (-1, width)).transpose(1, 2)


class Angles:
    """Cosines and sines [1, T, D] of all positions, for the layers of one kind; the table doubles when it is short."""

    def __init__(self, rotary: Any, kind: tuple[str, ...]) -> None:
        self.rotary, self.kind = rotary, kind
        self.table: tuple[torch.Tensor, ...] = ()

    def __call__(self, begin: int, end: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.table or self.table[0].shape[1] < end:
            self.table = self.rotary(like, torch.arange(2 * end, device=like.device)[None], *self.kind)
        return tuple(t[:, begin:end] for t in self.table)


def rotated(x: torch.Tensor, angles: Sequence[torch.Tensor]) -> torch.Tensor:
    """Heads [B, H, T, D] turned by cosines and sines [1 or B, T, D]."""
    cos, sin = (a[:, None] for a in angles)
    return x * cos + rotate_half(x) * sin


class Attention:
    """The forward of one attention module, by latents."""

    def __init__(self, module: Any, rank: int, angles: Angles) -> None:
        self.module, self.angles = module, angles
        self.keys, self.values = Thin(module.k_proj, rank), Thin(module.v_proj, rank)

    def __call__(
        self, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any, cache: Any = None, **more: Any
    ) -> tuple[torch.Tensor, Any]:
        own = self.module
        cache = more.pop("past_key_values", cache)  # its name before transformers 5.20 or so
        queries = own.q_proj(hidden_states).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
        latents, end = (self.keys(hidden_states), self.values(hidden_states)), hidden_states.shape[1]
        if cache is not None:
            latents = cache.update(*latents, own.layer_idx)
            end = cache.get_seq_length(own.layer_idx)
        keys, values = (p.decode(c, own.head_dim) for p, c in zip((self.keys, self.values), latents, strict=True))
        if hasattr(own, "k_norm"):
            queries, keys = own.q_norm(queries), own.k_norm(keys)
        keys = rotated(keys, self.angles(end - keys.shape[2], end, hidden_states))  # a window keeps the last ones
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(own.config._attn_implementation, eager_attention_forward)
        queries = rotated(queries, position_embeddings)
        more = {"dropout": 0.0, "scaling": own.scaling, "sliding_window": getattr(own, "sliding_window", None)} | more
        out, weights = attend(own, queries, keys, values, attention_mask, **more)
        return own.o_proj(out.flatten(2)), weights


def ranks(attentions: Sequence[Any], ratio: float) -> list[int]:
    """The published schedule's rank of each layer (keys and values alike), at most ``ratio`` of the dense bytes.

    All columns are the most a layer gets; the least is as large as the bytes allow, then the most falls.
    """
    weights = [[p.weight.detach().float() for p in (a.k_proj, a.v_proj)] for a in attentions]
    keys, values = ([float(torch.linalg.cond(pair[i])) for pair in weights] for i in range(2))
    width = len(weights[0][0])
    for low, high in [(low, width) for low in range(width, 0, -1)] + [(1, high) for high in range(width, 0, -1)]:
        found = progressive_ranks(keys, values, d_min=low, d_max=high)
        if sum(found) <= ratio * width * len(found):
            return found
    raise ValueError(f"ratio {ratio} leaves less than one column of {width} to each of {len(weights)} layers")


@contextlib.contextmanager
def straightforward(model: Any, ratio: float) -> Iterator[list[int]]:
    """In this block ``model`` caches latents, of the ranks given, in whatever dynamic cache it is called with."""
    layers, rotary = model.model.layers, model.model.rotary_emb
    kinds = [(a.layer_type,) if hasattr(rotary, "layer_types") else () for a in (layer.self_attn for layer in layers)]
    angles = {kind: Angles(rotary, kind) for kind in kinds}
    chosen = ranks([layer.self_attn for layer in layers], ratio)
    try:
        for layer, rank, kind in zip(layers, chosen, kinds, strict=True):
            layer.self_attn.forward = Attention(layer.self_attn, rank, angles[kind])
        yield chosen
    finally:
        for layer in layers:
            vars(layer.self_attn).pop("forward", None)
