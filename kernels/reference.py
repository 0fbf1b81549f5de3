"""Attention over stored rows in plain torch: the truth that every faster form is tested against.

Nothing here is fast: all tokens are decoded to fp64, and the scores are there as a whole.
"""

from __future__ import annotations

import torch

from lorc_fx.decoder import decode_dense
from lorc_fx.groups import expanded
from lorc_fx.packing import unpack

from .attend import Attend, Operand
from .stored import Stored


def attend(
    about: Attend, query: torch.Tensor, keys: Stored, values: Stored, extras: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The op's result [B, H, S, D_v] in fp64."""
    batch, heads, queries, _ = query.shape
    k, v = dense(about.keys, keys), dense(about.values, values)
    grouped = query.double().reshape(batch, about.keys.heads, -1, query.shape[3])
    scores = (grouped @ k.transpose(2, 3)).reshape(batch, heads, queries, -1)
    sink = extras[-1] if about.sink else None
    extras = extras[: len(about.extras)]
    scores = about.scores(scores, *(e.double() if e.is_floating_point() else e for e in extras))
    if sink is not None:
        scores = torch.cat([scores, sink.double().expand(batch, heads, queries, 1)], -1)
    weights = scores.softmax(-1)
    if about.blind:
        weights = weights.nan_to_num(0.0)
    weights = weights[..., : k.shape[2]].reshape(batch, about.values.heads, -1, k.shape[2])
    return (weights @ v).reshape(batch, heads, queries, -1)


def dense(operand: Operand, stored: Stored) -> torch.Tensor:
    """The operand as a dense cache would have it, [B, heads, T, head_dim] fp64."""
    form = operand.format
    latents = (stored.rows if form.plain else unpack(stored.rows, form.spec, form.choices, form.dtype)).double()
    decode, mean, consts = stored.parts(operand)
    decode = None if decode is None else expanded(decode, form.segments, operand.groups)
    if operand.absorbed:
        y = latents if decode is None else latents @ decode.double()
        y = (y if mean is None else y + mean.double()).transpose(0, 1)
    else:
        exact = [None if t is None else t.double() for t in (decode, mean)]
        wide = tuple(c.double() if c.is_floating_point() else c for c in consts)
        y = features(operand, decode_dense(operand.decoder, latents, stored.side, exact[0], exact[1], wide)).double()
    y = y if operand.columns is None else y[..., list(operand.columns)]
    return y.unflatten(2, (operand.heads, operand.head_dim)).transpose(1, 2)


def features(operand: Operand, value: torch.Tensor) -> torch.Tensor:
    """A dense cache value in the decoder's layout -> [B, T, features in order]."""
    decoder = operand.decoder
    return value.movedim((decoder.batch_dim, decoder.token_dim), (0, 1)).flatten(2)
