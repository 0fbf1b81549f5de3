"""The function that a model with compressed keys and values computes.

``oracle``: after each key and value projection, ``y -> b + (y - b) U U^T`` with U the leading left singular vectors of
the fp64 weight (of groups of its rows apart, where there are any); it shares nothing with lorc_fx but the ranks.
``coded_oracle``: what is rounded, too; from a codec's
matrices and format and the quantiser's constants.
"""

from __future__ import annotations

from typing import Any

import torch
from families import Family
from transformers import DynamicCache

from helpers import assert_close, latents


def oracle(
    family: Family, model: Any, ranks: list[tuple[int, int]], groups: list[tuple[int, int]] | None = None
) -> Any:
    """``model`` with a hook after each projection, at the ranks (keys, values) of each layer, which are those of all
    ``groups`` together."""
    for p in family.projections(model):
        count = 1 if groups is None else groups[p.layer][p.kind == "value"]
        rank, parts = ranks[p.layer][p.kind == "value"] // count, p.weight.double().unflatten(0, (count, -1))
        leading = [torch.linalg.svd(part)[0][:, :rank] for part in parts]
        project = torch.block_diag(*(u @ u.T for u in leading))
        p.module.register_forward_hook(_projected(p.features, p.bias.double(), project))
    return model


def _projected(features: torch.Tensor, bias: torch.Tensor, project: torch.Tensor) -> Any:
    def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        changed = y.clone()
        changed[..., features] = (bias + (y[..., features].double() - bias) @ project).to(y.dtype)
        return changed

    return hook


def ranks_of(cache: Any) -> list[tuple[int, int]]:
    return [(k.codec.rank, v.codec.rank) for k, v in latents(cache)]


def groups_of(cache: Any) -> list[tuple[int, int]]:
    return [(k.codec.groups, v.codec.groups) for k, v in latents(cache)]


def coded_oracle(family: Family, model: Any, pairs: Any) -> Any:
    """``model`` with each projection read through its codec, written down a second time: nearest mean, columns, levels.

    ``pairs``: the LatentKVs of each layer, for their codecs' matrices and formats.
    """
    for p in family.projections(model):
        codec = pairs[p.layer][p.kind == "value"].codec
        if codec.unprojected:  # ``coded_cache`` does these
            continue
        p.module.register_forward_hook(_coded(p.features, p.weight.double(), p.bias.double(), codec))
    return model


def coded_cache(model: Any, pairs: Any) -> DynamicCache:
    """A dense cache that rounds what comes in where the codec of a site is unprojected, so that all is read as
    rounded."""

    class Rounds(DynamicCache):
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            found = [_as_kept(x, pairs[layer_idx][i].codec) for i, x in enumerate((keys, values))]
            return super().update(*found, layer_idx, *args, **kwargs)

    return Rounds(config=model.config)


def _as_kept(value: torch.Tensor, codec: Any) -> torch.Tensor:
    """[B, H, S, D] through an unprojected codec: all features of a token share a scale and a number of bits."""
    if not codec.unprojected or codec.format.plain:
        return value
    (columns, bits), turn = codec.format.segments[0], codec.consts[0].double()
    assert_close("turning and back", turn @ turn.T, torch.eye(len(turn), dtype=torch.float64), 1e-6)
    flat = (value.transpose(1, 2).double() @ turn).flatten(2)
    rounded = _rounded(flat, torch.full((columns,), bits), torch.ones(columns, dtype=torch.float64))
    return (rounded.unflatten(2, (value.shape[1], -1)) @ turn.T).transpose(1, 2).to(value.dtype)


def _coded(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, codec: Any) -> Any:
    form, r = codec.format, codec.format.columns
    mean = torch.zeros_like(bias) if codec.mean is None else codec.mean.double()
    decode = torch.eye(len(bias), dtype=torch.float64) if codec.decode is None else _whole(codec, codec.decode)
    synthesis, gaps = decode[:r], decode[r:]
    means = torch.cat([mean[None], mean + gaps])

    def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        exact = y[..., features].double()
        index = (exact[..., None, :] - means).square().sum(-1).argmin(-1)
        centred = exact - means[index]
        # P, or of P^T W: it is no pseudo-inverse of S where the basis is that of a metric
        project = synthesis.T
        if codec.from_y:
            project = _whole(codec, codec.encode)[:r].T
        elif codec.decode is not None:
            project = (codec.encode[:r].double() @ torch.linalg.pinv(weight)).T
        columns = centred @ project
        bits = torch.tensor([b for n, b in form.segments for _ in range(n)])
        spread = torch.ones(r, dtype=torch.float64) if codec.spread is None else codec.spread.double()
        columns[..., bits > 0] = _rounded(columns[..., bits > 0], bits[bits > 0], spread[bits > 0])
        changed = y.clone()
        changed[..., features] = (means[index] + columns @ synthesis).to(y.dtype)
        return changed

    return hook


def _whole(codec: Any, compact: torch.Tensor) -> torch.Tensor:
    """A codec's S, or P^T, [k, n] in fp64: of one in groups, each column of a segment is of the group that has this
    place in it and has zeros elsewhere."""
    decode, groups = compact.double(), codec.groups
    if groups == 1:
        return decode
    each, rows, at = decode.shape[1] // groups, [], 0
    for columns, _ in codec.format.segments:
        for group in range(groups):
            own = slice(group * each, (group + 1) * each)
            for row in decode[at : at + columns // groups]:
                rows.append(torch.zeros_like(row))
                rows[-1][own] = row[own]
        at += columns // groups
    return torch.cat([torch.stack(rows), decode[at:]])


def _rounded(values: torch.Tensor, bits: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Column by column the nearest of 2^bits odd multiples of half a step, at the token's scale (fp16) of least squared
    error among the clips. ``bits``, ``spread``: of each column."""
    from lorc_fx.packing import CLIPS, STEPS, TINY

    if not len(bits):
        return values
    steps = torch.tensor([STEPS[int(b)] for b in bits], dtype=torch.float64)
    largest = (values.abs() / (steps * 2.0 ** (bits - 1))).amax(-1, keepdim=True)
    best, least = None, None
    for clip in CLIPS:
        scale = (largest * clip).clamp(TINY, 65504).half().double()
        found = torch.empty_like(values)
        for i, b in enumerate(bits.tolist()):
            levels = (torch.arange(-(2 ** (b - 1)), 2 ** (b - 1)) + 0.5) * scale * steps[i]
            nearest = (values[..., i, None] - levels).abs().argmin(-1, keepdim=True)
            found[..., i] = levels.gather(-1, nearest).squeeze(-1)
        error = ((found - values) * spread).square().sum(-1, keepdim=True)
        if best is None:
            best, least = found, error
        else:
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best
