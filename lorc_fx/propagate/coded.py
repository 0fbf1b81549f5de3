"""Where errors begin: sites, whose value the compressed model writes to its cache and reads again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lorc_fx import bounds
from lorc_fx.bounds.codecs import CodecError
from lorc_fx.codec import Codec, as_it_reads
from lorc_fx.gather import by_token
from lorc_fx.packing import pack
from lorc_fx.passes.axes import Axes
from lorc_fx.passes.sites import Site

from .known import Known, known, size
from .tags import linear_of


@dataclass(frozen=True)
class Coding:
    """A site with its codec and the effective ``weight`` [n, d] and ``bias`` [n] of its projection."""

    site: Site
    codec: Codec
    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, site: Site, codec: Codec, weight: torch.Tensor, bias: torch.Tensor | None) -> Coding:
        """On the CPU, wherever the model is."""
        if codec.encode.device.type != "cpu":
            own: dict[str, Any] = {n: t.cpu() for n, t in codec.tensors().items() if not n.startswith("const")}
            codec = replace(codec, consts=tuple(t.cpu() for t in codec.consts), **own)
        return cls(site, codec, weight.cpu(), None if bias is None else bias.cpu())


def flat(value: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A value with its tokens in rows: [N, features]."""
    return by_token(value, axes).flatten(0, 1)


def unflat(rows: torch.Tensor, like: torch.Tensor, axes: Axes) -> torch.Tensor:
    """The inverse: rows [N, features] in the layout of ``like``."""
    assert axes.token is not None
    if axes.batch is None or axes.batch == axes.token:
        rest = [n for i, n in enumerate(like.shape) if i != axes.token]
        return rows.reshape(like.shape[axes.token], *rest).movedim(0, axes.token)
    rest = [n for i, n in enumerate(like.shape) if i not in (axes.batch, axes.token)]
    whole = rows.reshape(like.shape[axes.batch], like.shape[axes.token], *rest)
    return whole.movedim((0, 1), (axes.batch, axes.token))


def projected(c: Coding, x: Known, y: Known, rounds: bool = False) -> tuple[Known, CodecError]:
    """y as it is read back, from x; in the layout of ``y``, the uncoded value. ``rounds``: as a machine computes
    it."""
    rows, heads = c.site.rows, _heads(c.site)
    radius = None if x.exact else flat_norm(x, rows.x_axes)
    tokens = flat(x.value, rows.x_axes)
    weights = c.codec, c.weight, c.bias
    unsure = bounds.code_rounding(*weights, tokens, radius) if rounds else None
    error = bounds.codec_error(*weights, tokens, radius, heads, unsure)
    if rounds:
        error = bounds.computed(error, *weights, tokens, radius, y_size(y, rows.y_axes, rows.features))
    each = error.each
    if rows.features is not None:  # the others pass as they are, and nothing reads them
        zero = torch.zeros_like(y.value) if y.each is None else y.each
        each = flat(zero, rows.y_axes).index_copy(-1, torch.tensor(rows.features), each)
        return known(y.value, unflat(each, y.value, rows.y_axes)), error
    return _by_head(y.value, each, error, rows.y_axes), error


def y_size(y: Known, axes: Axes, features: tuple[int, ...] | None) -> torch.Tensor:
    """|y| at most, feature by feature: [N, n]"""
    reach = flat(size(y), axes)
    return reach if features is None else reach[..., list(features)]


def _by_head(value: torch.Tensor, each: torch.Tensor, error: CodecError, axes: Axes) -> Known:
    """In the layout of the value. Norms of heads are of its last axis where that is one head's features, or all;
    where it is a part of a head (pairs of features, to be rotated), those of whole heads go with it as a tag."""
    norms, n = error.heads, each.shape[-1]
    heads = norms.shape[-1]
    entries, sizes = unflat(each, value, axes), list(value.shape)
    spread = unflat(norms[..., None].expand(*norms.shape, n // heads).flatten(-2), value, axes)
    if sizes[-1] == n // heads:
        return known(value, entries, spread[..., :1])
    if sizes[-1] == n:
        return known(value, entries, unflat(error.whole.expand(-1, n), value, axes)[..., :1])
    parts = 2
    while parts < value.dim() and torch.Size(sizes[-parts:]).numel() < n // heads:
        parts += 1
    if torch.Size(sizes[-parts:]).numel() != n // heads:
        return known(value, entries)
    whole = known(value.flatten(-parts), entries.flatten(-parts), spread.flatten(-parts)[..., :1])
    return known(value, entries, tags=linear_of(whole, lambda t: t.unflatten(-1, sizes[-parts:]), ("parts", parts)))


def _heads(site: Site) -> int:
    return site.decoder.width // site.head if site.head > 1 and not site.decoder.width % site.head else 1


def flat_norm(x: Known, axes: Axes) -> torch.Tensor:
    """|dx| of each token, [N, 1]."""
    assert x.each is not None
    norm = flat(x.each, axes).norm(dim=-1, keepdim=True)
    if x.norm is not None and x.axis == -1 and x.norm.numel() == len(norm):
        norm = torch.minimum(norm, flat(x.norm, axes))
    return norm


def read_back(codec: Codec, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """y' [N, n] of tokens x [N, d] fp64: projected, stored and read, products in fp64."""
    form = codec.format
    encode, shift = codec.folded(weight, bias)
    latent = x @ encode.T + shift
    if not form.plain:
        latent = codec.latents(pack(latent.float(), codec.offsets, codec.spread, form.spec, form.choices, form.dtype))
    latent = latent.to(form.dtype).double()
    matrix = codec.matrix
    y = latent if matrix is None else latent @ matrix.double()
    return y if codec.mean is None else y + codec.mean.double()


def projected_value(c: Coding, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the compressed model reads where it would have ``y``."""
    rows = c.site.rows
    made = read_back(c.codec, c.weight, c.bias, flat(x, rows.x_axes))
    if rows.features is not None:
        made = flat(y, rows.y_axes).index_copy(-1, torch.tensor(rows.features), made)
    return unflat(made, y, rows.y_axes)


def unprojected(c: Coding, value: Known) -> tuple[Known, CodecError]:
    """A cached value that is stored as it is, in the layout of ``value``."""
    axes = cache_axes(c.site)
    radius = None if value.exact else flat_norm(value, axes)
    error = bounds.unprojected_error(c.codec, flat(value.value, axes), radius, _heads(c.site))
    made = _by_head(value.value, error.each, error, axes)
    if value.each is None:
        return made, error
    assert made.each is not None and made.norm is not None
    norm = made.norm + value.along(-1) if made.axis == -1 else None
    return known(value.value, made.each + value.each, norm), error


def unprojected_value(c: Coding, value: torch.Tensor) -> torch.Tensor:
    """What the compressed model reads back of ``value``."""
    axes = cache_axes(c.site)
    return unflat(as_it_reads(c.codec, flat(value, axes)), value, axes)


def cache_axes(site: Site) -> Axes:
    """Batch and token axes of the cached value."""
    layout = site.decoder.layout
    return Axes(layout.index("B") if "B" in layout else None, layout.index("T"))
