"""Columns by groups, in a graph: each group's features are decoded from its own columns alone, and of sums over tokens
each head takes its own.

    joint      c [T, B, k] @ S [k, n]                              2 k n FLOP a token
    grouped    c -> [G, T B, k / G] @ S -> [G, k / G, n / G]       2 k n / G
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from lorc_fx.codec import Codec

aten = torch.ops.aten


def vectors(call: Callable[..., Node], latents: Node, decode: Node, codec: Codec) -> Node:
    """``latents`` [T, B, k] times the compact ``decode`` [k / G, n] of a codec in groups: [T, B, n]."""
    groups, form = codec.groups, codec.format
    each, features, at = form.columns // groups, codec.width // groups, 0
    columns = []
    for count, _ in form.segments:
        piece = call(aten.slice.Tensor, latents, 2, at, at + count)
        columns.append(call(aten.reshape.default, piece, [-1, groups, count // groups]))
        at += count
    own = columns[0] if len(columns) == 1 else call(aten.cat.default, columns, 2)
    blocks = call(aten.reshape.default, call(aten.slice.Tensor, decode, 0, 0, each), [each, groups, features])
    made = call(aten.bmm.default, call(aten.transpose.int, own, 0, 1), call(aten.transpose.int, blocks, 0, 1))
    sizes = [call(aten.sym_size.int, latents, dim) for dim in (0, 1)]
    y = call(aten.reshape.default, call(aten.transpose.int, made, 0, 1), [*sizes, groups * features])
    if form.choices == 1:
        return y
    further = call(aten.slice.Tensor, latents, 2, at, at + form.choices - 1)
    gaps = call(aten.slice.Tensor, decode, 0, each, each + form.choices - 1)
    return call(aten.add.Tensor, y, call(aten.matmul.default, further, gaps))


def own_columns(call: Callable[..., Node], sums: Node, batch: Any, lines: int, codec: Codec) -> Node:
    """Sums of a token's columns [B, lines, k], lines by heads -> of the columns of each head's group, and of further
    means: [B, groups, lines / groups, k / groups ..]."""
    groups, form = codec.groups, codec.format
    parts, at = [], 0
    for count, _ in form.segments:
        piece = call(aten.slice.Tensor, sums, 2, at, at + count)
        piece = call(aten.reshape.default, piece, [batch, groups, lines // groups, groups, count // groups])
        parts.append(call(aten.permute.default, call(aten.diagonal.default, piece, 0, 1, 3), [0, 3, 1, 2]))
        at += count
    if form.choices > 1:
        further = call(aten.slice.Tensor, sums, 2, at, at + form.choices - 1)
        parts.append(call(aten.reshape.default, further, [batch, groups, lines // groups, form.choices - 1]))
    return parts[0] if len(parts) == 1 else call(aten.cat.default, parts, 3)
