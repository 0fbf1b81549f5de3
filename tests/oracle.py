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
