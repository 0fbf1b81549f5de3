"""Texts to calibrate tiny models on."""

from __future__ import annotations

import warnings

import torch

from lorc_fx import calibrate
from lorc_fx.errors import QualityWarning


def text(rows=4, tokens=24, seed=3, vocabulary=60):
    """Rows that begin with the same token, as with a BOS."""
    ids = torch.randint(1, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def quiet(model, batches, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)
        return calibrate(model, batches, progress=False, **kwargs)


def projected(family, model, ids, mask=None):
    """(layer, kind) -> y [B, T, n] of the model's own projections, by hooks."""
    found, handles = {}, []
    for p in family.projections(model):

        def hook(module, args, y, p=p):
            found[p.layer, p.kind] = y[..., p.features].detach().double()

        handles.append(p.module.register_forward_hook(hook))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return found


def ordinary(y, real):
    """[B, T] bool, row by row: neither padding nor the first token nor nearer to it than a tenth of the variance."""
    found = torch.zeros_like(real)
    for b in range(len(y)):
        at = real[b].nonzero().flatten()
        row = y[b, at]
        variance = (row - row.mean(0)).square().sum(1).mean()
        far = (row - row[0]).square().sum(1) >= 0.1 * variance
        far[0] = False
        found[b, at] = far
    return found
