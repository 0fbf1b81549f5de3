"""Sums of stored columns over tokens as one op, ``lorc::sums``: what attention's weights make of values that are read
as latents, A c, for graphs whose keys are decoded. On a CPU ``rows.cpp`` reads the rows as they are, each group of
heads its own columns alone.

Unpacking first means a matrix product whose inner size is the number of cached tokens, which is another one at each
step: libraries that compile a product for its sizes (oneDNN, in 16 bits) then compile one for every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorc_fx.groups import split
from lorc_fx.packing import MODEL, Format, form_of

from . import native, pack
from .attend import LIBRARY

DEVICES = pack.DEVICES
"""Types of devices on which graphs have the op."""

FEW = 16
"""Weights of a token and a group, at most, for which graphs have the op: more are a large product."""


def sums(rows: torch.Tensor, weights: torch.Tensor, form: Format) -> torch.Tensor:
    """rows [T, B, form.nbytes], weights [B, G, M, T] -> [B, G, M, r / G + choices - 1] in the weights' dtype: of each
    of G groups its own columns, then what tokens have of further means, times the weights, summed over tokens in
    fp32."""
    groups = weights.shape[1]
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    about = native.layout(form, groups) if rows.device.type == "cpu" and native.library() is not None else None
    if about is None:
        latent = pack.unpack(rows, form).float()
        own = split(latent[..., : form.columns], form.spec, groups)
        further = latent[..., None, form.columns :].expand(*own.shape[:-1], -1)
        each = torch.cat([own, further], -1).permute(1, 2, 0, 3)  # [B, G, T, ..]
        return (weights.float() @ each).to(weights.dtype)
    held, scales, second = native.sums(rows, about, weights.float().contiguous())
    columns = native.gathered(held, about)
    exact = sum(s.columns for s in form.segments if s.bits == MODEL) // groups
    pieces = [columns[..., :exact]]
    if form.scaled:
        step, half = native.constants(form, groups)
        pieces.append((columns[..., exact:] - scales[..., None] * half) * step)
    pieces += [second[..., None]] if form.choices > 1 else []
    return torch.cat(pieces, -1).to(weights.dtype)


def _op(
    rows: torch.Tensor,
    weights: torch.Tensor,
    columns: Sequence[int],
    bits: Sequence[int],
    choices: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return sums(rows, weights, form_of(columns, bits, choices, dtype))


def _fake(rows, weights, columns, bits, choices, dtype):  # type: ignore[no-untyped-def]
    batch, groups, lines, _ = weights.shape
    return weights.new_empty((batch, groups, lines, sum(columns) // groups + choices - 1))


LIBRARY.define("sums(Tensor rows, Tensor weights, int[] columns, int[] bits, int choices, ScalarType dtype) -> Tensor")
LIBRARY.impl("sums", _op, "CompositeExplicitAutograd")
torch.library.register_fake("lorc::sums", _fake, lib=LIBRARY)
