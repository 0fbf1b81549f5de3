"""The function that a model with compressed keys and values computes; shares nothing with lorc_fx but the ranks.

After each key and value projection, ``y -> b + (y - b) U U^T`` with U the leading left singular vectors of the fp64
weight.
"""

from __future__ import annotations

from typing import Any

import torch
from families import Family

from helpers import latents


def oracle(family: Family, model: Any, ranks: list[tuple[int, int]]) -> Any:
    """``model`` with a hook after each projection, at the ranks (keys, values) of each layer."""
    for p in family.projections(model):
        rank = ranks[p.layer][p.kind == "value"]
        u = torch.linalg.svd(p.weight.double())[0][:, :rank]
        p.module.register_forward_hook(_projected(p.features, p.bias.double(), u @ u.T))
    return model


def _projected(features: torch.Tensor, bias: torch.Tensor, project: torch.Tensor) -> Any:
    def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        changed = y.clone()
        changed[..., features] = (bias + (y[..., features].double() - bias) @ project).to(y.dtype)
        return changed

    return hook


def ranks_of(cache: Any) -> list[tuple[int, int]]:
    return [(k.codec.rank, v.codec.rank) for k, v in latents(cache)]


def coded_oracle(family: Family, model: Any, pairs: Any, ids: torch.Tensor) -> Any:
    """``model`` with each projection read through its codec, written down a second time: nearest mean, columns, levels.

    ``pairs``: the LatentKVs of each layer, for their codecs' matrices and formats.
    """
    for p in family.projections(model):
        codec = pairs[p.layer][p.kind == "value"].codec
        p.module.register_forward_hook(_coded(p.features, p.weight.double(), p.bias.double(), codec))
    return model


def _coded(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, codec: Any) -> Any:
    form, r = codec.format, codec.format.columns
    mean = torch.zeros_like(bias) if codec.mean is None else codec.mean.double()
    decode = torch.eye(len(bias), dtype=torch.float64) if codec.decode is None else codec.decode.double()
    synthesis, gaps = decode[:r], decode[r:]
    means = torch.cat([mean[None], mean + gaps])

    def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        exact = y[..., features].double()
        index = (exact[..., None, :] - means).square().sum(-1).argmin(-1)
        centred = exact - means[index]
        project = torch.linalg.pinv(synthesis) if codec.decode is not None else synthesis.T
        columns = centred @ project
        at, parts = 0, []
        for count, bits in form.segments:
            part = columns[..., at : at + count]
            at += count
            parts.append(part if bits == 0 else _rounded(part, bits))
        changed = y.clone()
        changed[..., features] = (means[index] + torch.cat(parts, -1) @ synthesis).to(y.dtype)
        return changed

    return hook


def _rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest of 2^bits odd multiples of half a step, the step (fp16) of least squared error among the clips."""
    from lorc_fx.packing import CLIPS, TINY

    half = 2 ** (bits - 1)
    best, least = None, None
    for clip in CLIPS[bits]:
        step = (values.abs().amax(-1, keepdim=True) * clip / half).clamp(TINY, 65504).half().double()
        levels = torch.stack([(i + 0.5) * step.squeeze(-1) for i in range(-half, half)], -1)
        nearest = (values[..., None] - levels[..., None, :]).abs().argmin(-1)
        found = levels.gather(-1, nearest)
        error = (found - values).square().sum(-1, keepdim=True)
        if best is None:
            best, least = found, error
        else:
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best
