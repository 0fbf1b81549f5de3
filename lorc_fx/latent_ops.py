"""What eager operations do to a LatentKV: those that move tokens or batch rows act on its rows, the rest decodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .compat import is_fake, is_functional
from .errors import EagerWarning, ForeignCache
from .latent import LatentKV
from .rows import Rows, Track, blank

aten = torch.ops.aten


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """``LatentKV.__torch_dispatch__``."""
    latents = [a for a in tree_leaves((args, kwargs)) if isinstance(a, LatentKV)]
    if is_fake(latents[0].codes):
        return _propagate(func, args, kwargs)
    if is_functional(latents[0].codes):
        raise ForeignCache(
            "a LatentKV entered a region that another backend compiles; compile the model with "
            '`model.compile(backend="lorc")` and call generate(..., disable_compile=True)'
        )
    rule = _ROW_RULES.get(func)
    result = rule(func, args, kwargs) if rule is not None else NotImplemented
    return _decoded(func, args, kwargs) if result is NotImplemented else result


def _propagate(func: Any, args: Any, kwargs: Any) -> Any:
    """Shapes only (Dynamo is tracing): a LatentKV behaves as a dense fake tensor of its logical shape."""
    seen: dict[int, torch.Tensor] = {}

    def plain(x: Any) -> Any:
        if not isinstance(x, LatentKV):
            return x
        if id(x) not in seen:
            seen[id(x)] = x.codes.new_empty(x.shape, dtype=x.dtype)
        return seen[id(x)]

    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    back = {id(t): x for x in tree_leaves((args, kwargs)) if isinstance(x, LatentKV) for t in [seen[id(x)]]}
    return back.get(id(out), out)  # in-place ops return their (still latent) argument


_hinted: set[str] = set()


def _hint_once(key: str, text: str) -> None:
    if key not in _hinted and not (key == "read" and _hinted):
        _hinted.add(key)
        warnings.warn(text, EagerWarning, stacklevel=4)


def _decoded(func: Any, args: Any, kwargs: Any) -> Any:
    """Any other operation: decode, then run it on dense values; one that writes makes its argument dense in place."""
    written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
    written = [w for w in written if isinstance(w, LatentKV)]
    if written:
        _hint_once("write", f"eager code wrote dense values into a coded cache ({func}): it is dense from here on")
    else:
        _hint_once("read", f"eager code reads a coded cache ({func}): it is decoded at each such read, right but slow")
    dense: dict[int, torch.Tensor] = {id(w): w.uncompress_() for w in written}

    def decode(x: Any) -> Any:
        if not isinstance(x, LatentKV):
            return x
        return dense[id(x)] if id(x) in dense else x.dense()

    plain = tree_map(decode, (args, kwargs))
    out = func(*plain[0], **plain[1])
    return next((w for w in written if out is dense[id(w)]), out)


# -- operations that act on rows ------------------------------------------------------------------------------


def _mapped(
    latent: LatentKV, fn: Callable[[torch.Tensor], torch.Tensor], key: tuple[Hashable, ...], argument: Any = None
) -> LatentKV:
    """A LatentKV over new rows: ``fn`` is applied to codes [T, B, r] and positions [T, B] (once for all layers that
    share them: ``key`` and the tensor ``argument`` say what fn is)."""
    return LatentKV.born(latent.codec, fn(latent.codes), _track(latent, fn, key, argument))


def _track(latent: LatentKV, fn: Callable[..., torch.Tensor], key: tuple[Hashable, ...], argument: Any) -> Track | None:
    assert latent.rows is not None
    track = latent.rows.track
    return None if track is None else track.derived(fn, latent.start, latent.length, key, argument)


def _batched(
    latent: LatentKV, fn: Callable[[torch.Tensor, int], torch.Tensor], key: tuple[Hashable, ...], argument: Any = None
) -> LatentKV:
    """The same for an op on batch rows: ``fn(tensor, its batch dim)`` also acts on the tail."""
    made = _mapped(latent, lambda t: fn(t, 1), key, argument)
    if latent.tail is None:
        return made
    assert made.rows is not None
    return LatentKV.born(made.codec, made.codes, made.rows.track, fn(latent.tail, latent.codec.decoder.batch_dim))


def _row_dim(latent: LatentKV, dim: int) -> int | None:
    """The dim of the rows for a logical dim: 0 for tokens, 1 for batch, None for heads and features."""
    dim %= latent.dim()
    decoder = latent.codec.decoder
    return 0 if dim == decoder.token_dim else 1 if dim == decoder.batch_dim else None


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    tensors: Sequence[Any] = args[0]
    full = [t for t in tensors if t.numel() or isinstance(t, LatentKV)]
    first = full[0]
    if not isinstance(first, LatentKV):
        return NotImplemented
    dim = _row_dim(first, args[1] if len(args) > 1 else 0)
    coded = all(isinstance(t, LatentKV) and t.codec is first.codec and t.tail is None for t in full)
    if dim == 0 and not coded:
        return _with_tail(first, full[1:])
    if dim is None or not coded or (dim == 1 and _shared_positions(full)):
        return NotImplemented
    more = [(t.rows.track, t.start, t.length, t.positions) for t in full[1:]]
    spans = tuple((None if track is None else track.state(), start, length) for track, start, length, _ in more)
    joined = _track(first, lambda t: torch.cat([t, *(p for *_, p in more)], dim), ("cat", dim, *spans), None)
    return LatentKV.born(first.codec, torch.cat([t.codes for t in full], dim), joined)


def _with_tail(first: LatentKV, more: Sequence[torch.Tensor]) -> LatentKV:
    """Dense tokens after coded ones (an uncompiled model, or one past Dynamo's recompile limit): kept as they are."""
    _hint_once(
        "cat",
        "eager code appended dense tokens to a coded cache (an uncompiled model, or past Dynamo's recompile limit): "
        "what is coded stays coded, the new tokens are kept dense; raise torch._dynamo.config.recompile_limit",
    )
    token = first.codec.decoder.token_dim
    parts = [*([] if first.tail is None else [first.tail])]
    parts += [t.dense() if isinstance(t, LatentKV) else t for t in more]
    assert first.rows is not None
    return LatentKV.over(first.codec, first.rows, first.start, first.length, torch.cat(parts, token))


def _shared_positions(latents: Sequence[LatentKV]) -> bool:
    """Whether rows that are joined along the batch have different positions while their epilogue reads one for all."""
    first = latents[0]
    if first.positions is None or not first.codec.decoder.shared_positions:
        return False
    mine = first.positions[:, 0]
    return any(t.positions is None or not torch.equal(t.positions[:, 0], mine) for t in latents[1:])


def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    latent, dim, lo, hi, step = (list(args) + [0, None, None, 1][len(args) - 1 :])[:5]
    row = _row_dim(latent, dim)
    if row is None or step != 1:
        full = (lo is None or lo == 0) and (hi is None or hi >= latent.shape[dim]) and step == 1
        return latent if full else NotImplemented
    lo, hi, _ = slice(lo, hi).indices(latent.shape[dim])
    return latent.viewed_by(lambda base: _sliced(base, row, lo, max(hi - lo, 0)))


def _sliced(latent: LatentKV, row: int, lo: int, length: int) -> LatentKV:
    """Tokens (``row`` 0) or batch rows (1) [lo, lo + length) as a view: appending to it copies unless it ends as the
    whole does."""
    if row == 1:
        track = _track(latent, lambda t: t.narrow(1, lo, length), ("rows", lo, length), None)
        tail = None if latent.tail is None else latent.tail.narrow(latent.codec.decoder.batch_dim, lo, length)
        rows = Rows(latent.codes.narrow(1, lo, length), track, latent.length + 1)
        return LatentKV.over(latent.codec, rows, 0, latent.length, tail)
    coded = max(min(lo + length, latent.length) - lo, 0)
    assert latent.rows is not None
    tail = latent.tail
    if tail is not None:
        begin = max(lo - latent.length, 0)
        tail = tail.narrow(latent.codec.decoder.token_dim, begin, length - coded) if length > coded else None
    start = latent.start + min(lo, latent.length)
    return LatentKV.over(latent.codec, latent.rows, start, coded, tail)


def _index_select(func: Any, args: Any, kwargs: Any) -> Any:
    latent, dim, index = args
    row = _row_dim(latent, dim) if isinstance(latent, LatentKV) else None
    if row == 1:
        return _batched(latent, lambda t, d: t.index_select(d, index), ("select", 1), index)
    if row != 0 or latent.tail is not None:
        return NotImplemented
    return _mapped(latent, lambda t: t.index_select(0, index), ("select", 0), index)


def repeated(latent: LatentKV, times: int) -> LatentKV:
    """Each batch row ``times`` times in a row."""
    return _batched(latent, lambda t, d: t.repeat_interleave(times, d), ("repeat", times))


def _index(func: Any, args: Any, kwargs: Any) -> Any:
    latent, indices = args
    used = [(i, x) for i, x in enumerate(indices) if x is not None]
    if not isinstance(latent, LatentKV) or len(used) != 1 or used[0][1].dim() != 1:
        return NotImplemented
    row = _row_dim(latent, used[0][0])
    if row is None:
        return NotImplemented
    index = used[0][1]
    if row == 1:
        return _batched(latent, lambda t, d: t[(slice(None),) * d + (index,)], ("index", 1), index)
    return _mapped(latent, lambda t: t[index], ("index", 0), index) if latent.tail is None else NotImplemented


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].viewed_by(lambda x: LatentKV.over(x.codec, x.rows, x.start, x.length, x.tail))


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return _batched(args[0], lambda t, d: t.clone(), ("clone",))


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    latent = args[0]
    if kwargs.get("dtype") not in (None, latent.dtype):
        return NotImplemented
    device = kwargs.get("device")
    return _batched(latent, lambda t, d: t.to(device=device, copy=True), ("to", device))


def _roll(func: Any, args: Any, kwargs: Any) -> Any:
    latent, shifts = args[:2]
    dims: Sequence[int] = args[2] if len(args) > 2 else ()
    row = _row_dim(latent, dims[0]) if len(dims) == 1 else None
    if row is None or latent.tail is not None:
        return NotImplemented
    return _mapped(latent, lambda t: t.roll(shifts, (row,)), ("roll", row, str(shifts)))


def _zero_(func: Any, args: Any, kwargs: Any) -> Any:
    latent = args[0]
    latent.own_()
    latent.codes.fill_(blank(latent.codes.dtype))  # positions stay: no token is there, and other layers may share them
    if latent.tail is not None:
        latent.tail.zero_()
    return latent


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    into, source = args[:2]
    both = isinstance(into, LatentKV) and isinstance(source, LatentKV) and into.codec is source.codec
    if not both or into.shape != source.shape or into.tail is not None or source.tail is not None:
        return NotImplemented
    moved = into.positions is not None and not torch.equal(into.positions, source.positions)
    into.own_(positions=moved)
    into.codes.copy_(source.codes)
    if moved:
        into.positions.copy_(source.positions)
    return into


_ROW_RULES: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.roll.default: _roll,
    aten.zero_.default: _zero_,
    aten.copy_.default: _copy_,
}
