"""New rows of a coded cache: the factorised projection (or the value itself, turned), packed, in the rows' layout; and
what is kept of each token beside them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from lorc_fx.codec import Codec
from lorc_fx.groups import projected
from lorc_fx.kernels import encode
from lorc_fx.kernels import pack as by_op
from lorc_fx.packing import pack

from .axes import Axes, shape
from .facts import static_size
from .sides import width
from .sites import Site

if TYPE_CHECKING:
    from .rewrite import Rewriter

aten = torch.ops.aten
_encode, _pack = torch.ops.lorc.encode, torch.ops.lorc.pack

_NOTHING = (None, None)


def encoded(r: Rewriter, index: int, site: Site) -> Node:
    """New rows: x [.., d] -> codes [S, B, width] by the factorised projection, packed in the codec's format."""
    codec, owner = r.codecs[site], ("site", index)
    if site.unprojected:
        return _stored(r, site, codec, owner)
    if codec.from_y:
        return _from_y(r, site, codec, owner)
    x, form = r.env_value(site.rows.x), codec.format
    own = {n: None if t is None else r.codec_tensor(owner, n, t) for n, t in _encoding(codec).items()}
    if not form.plain and _by_op(site.rows.x):
        codes = r.call(_encode.default, x, *own.values(), *form.parts)
        return _token_major(r, codes, site.rows.x_axes, *_extent(r, site), [form.width])
    if codec.encode.dtype != form.dtype:
        x = r.call(aten.to.dtype, x, codec.encode.dtype)
    codes = r.call(aten.linear.default, x, own["encode"], *([] if own["shift"] is None else [own["shift"]]))
    if not form.plain:
        codes = _packed(r, site, codes, (own["offsets"], own["spread"]))
    return _token_major(r, codes, site.rows.x_axes, *_extent(r, site), [form.width])


def _from_y(r: Rewriter, site: Site, codec: Codec, owner: tuple[str, int]) -> Node:
    """New rows of y [.., n] as the model computes it."""
    y = r.copied(site.node) if site.rows.y is site.node else r.env_value(site.rows.y)
    flat, at = _flat(r, y, site.rows.y, site.rows.y_axes, [-1])
    if site.rows.features is not None:
        flat = r.call(aten.index_select.default, flat, -1, r.constant(torch.tensor(site.rows.features)))
    own = [None if t is None else r.codec_tensor(owner, n, t) for n, t in _encoding(codec).items()]
    encode, shift, offsets, spread = own
    codes = _packed(r, site, flat, (offsets, spread), (encode, shift), codec.groups)
    return _token_major(r, codes, at, *_extent(r, site), [codec.format.width])


def _packed(
    r: Rewriter,
    site: Site,
    latent: Node,
    around: Sequence[Node | None] = _NOTHING,
    by: Sequence[Node | None] = _NOTHING,
    groups: int = 1,
) -> Node:
    """Latents [.., k], or y [.., n] and the matrix and shift that they are made ``by`` (``groups.projected``), as rows
    of bytes, ``around`` offsets at a spread: one op where the device has it, else those of ``pack``."""
    form = r.codecs[site].format
    if site.node.meta["val"].device.type in by_op.DEVICES:
        tensors = ([t] for t in (latent, *around, *by))
        return r.call(operator.getitem, r.call(_pack.default, *tensors, by_op.spelled(form, groups)), 0)
    if by[0] is not None:
        latent = r.call(projected, latent, *by, form.spec, groups)
    return r.call(pack, latent, *around, form.spec, form.choices, form.dtype)


def _encoding(codec: Codec) -> dict[str, torch.Tensor | None]:
    """The codec's tensors that write rows, in the order in which the op takes them."""
    return {"encode": codec.encode, "shift": codec.shift, "offsets": codec.offsets, "spread": codec.spread}


def _by_op(x: Node) -> bool:
    """Whether new rows of x [.., d] are made by one op: few of them, on a device where that is wanted."""
    value = x.meta["val"]
    sizes = [static_size(size) for size in value.shape[:-1]]
    few = None not in sizes and math.prod(sizes) <= encode.FEW
    return few and value.device.type in encode.WIRED


def _stored(r: Rewriter, site: Site, codec: Codec, owner: tuple[str, int]) -> Node:
    """New rows as the dense cache would have them, heads turned, packed in the codec's format: [S, B, width]."""
    form = codec.format
    flat, at = _flat(r, r.copied(site.node), site.node, site.rows.epilogue.output_axes, [form.columns])
    if codec.consts and not form.plain:
        turn = r.call(aten.t.default, r.codec_tensor(owner, "const0", codec.consts[0]))
        flat = _packed(r, site, flat, by=(turn, None), groups=form.columns // site.head)
    elif not form.plain:
        flat = _packed(r, site, flat)
    return _token_major(r, flat, at, *_extent(r, site), [form.width])


def _flat(r: Rewriter, value: Node, old: Node, axes: Axes, rest: list[int]) -> tuple[Node, Axes]:
    """A per-token value with batch and tokens first and its features (``rest``: how many) flat behind."""
    leading = [i for i in dict.fromkeys((axes.batch, axes.token)) if i is not None]
    order = leading + [i for i in range(len(shape(old))) if i not in leading]
    moved = r.call(aten.permute.default, value, order)
    at = Axes(None if axes.batch is None else 0, len(leading) - 1)
    return r.call(aten.reshape.default, moved, [*(r.size(old, i) for i in leading), *rest]), at


def kept_beside(r: Rewriter, site: Site) -> Node | None:
    """What is kept of new rows beside codes, [S, B] or [S, B, width]: positions, where the epilogue needs them."""
    side = site.decoder.side
    if side is None:
        return None
    pieces = []
    for node, axes in site.rows.sides:
        value = r.call(aten.to.dtype, r.env_value(node), side.dtype)
        if side.width is None:
            return _token_major(r, value, axes, *_extent(r, site), [], given=False)
        flat, at = _flat(r, value, node, axes, [width(node, axes)])
        pieces.append(_token_major(r, flat, at, *_extent(r, site), [width(node, axes)], given=False))
    return pieces[0] if len(pieces) == 1 else r.call(aten.cat.default, pieces, 2)


def _extent(r: Rewriter, site: Site) -> tuple[Any, Any]:
    """Batch and new tokens of a site's rows, as ints or as nodes that compute them."""
    axes = site.rows.epilogue.output_axes
    return 1 if axes.batch is None else r.size(site.node, axes.batch), r.size(site.node, axes.token)


def _token_major(
    r: Rewriter, value: Node, axes: Any, batch: Any, tokens: Any, rest: list[int], given: bool = True
) -> Node:
    """A per-token value in the layout ``axes`` -> contiguous [S, B, *rest]. ``given``: it has all batch rows
    (positions are often there once for all)."""
    if axes.batch is None or axes.batch == axes.token or axes.batch < axes.token:
        rows = 1 if axes.batch is None else batch if given else -1
        flat = r.call(aten.reshape.default, value, [rows, tokens, *rest])
        if rows is not batch and batch != 1:
            flat = r.call(aten.expand.default, flat, [batch, tokens, *rest])
        major = r.call(aten.transpose.int, flat, 0, 1)
    else:
        major = r.call(aten.reshape.default, value, [tokens, batch if given else -1, *rest])
        if not given:
            major = r.call(aten.expand.default, major, [tokens, batch, *rest])
    return r.call(aten.clone.default, major, memory_format=torch.contiguous_format)
