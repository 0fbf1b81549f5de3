"""What eager operations do to a LatentKV: those that move tokens or batch rows act on its rows, the rest decodes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .compat import is_fake, is_functional, written_arguments
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
    for latent in latents:
        latent.follow()
    if torch.is_inference_mode_enabled() and _is_view(func) and not latents[0].is_inference():
        with torch.inference_mode(False), torch.no_grad():  # as of a dense tensor: a view is what its base is
            return _run(func, args, kwargs)
    return _run(func, args, kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    rule = _ROW_RULES.get(func)
    result = rule(func, args, kwargs) if rule is not None else NotImplemented
    if result is NotImplemented and func._can_decompose():  # inference mode hands over ops that consist of others
        result = func.decompose(*args, **kwargs)
    return _decoded(func, args, kwargs) if result is NotImplemented else result


def _is_view(func: Any) -> bool:
    """Whether an op returns a view of an argument (and writes to none), and does not consist of others."""
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases) and not func._can_decompose()


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


def hint_once(key: str, text: str) -> None:
    """Warn once per process and ``key``, at the line outside of lorc_fx and torch that did it."""
    if key not in _hinted and not (key == "read" and _hinted):
        _hinted.add(key)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("lorc_fx", "torch"):
            frame, level = frame.f_back, level + 1
        warnings.warn(text, EagerWarning, stacklevel=level)


WRITTEN = "eager code wrote dense values into a coded cache ({}): it is dense from here on"


def _decoded(func: Any, args: Any, kwargs: Any) -> Any:
    """Any other operation: decode, then run it on dense values; one that writes makes its argument dense in place."""
    written = [w for w in tree_leaves(written_arguments(func, args, kwargs)) if isinstance(w, LatentKV)]
    if written:
        hint_once("write", WRITTEN.format(func))
    else:
        hint_once("read", f"eager code reads a coded cache ({func}): it is decoded at each such read, right but slow")
    dense: dict[int, torch.Tensor] = {id(w): w.uncompress_() for w in written}

    def decode(x: Any) -> Any:
        if not isinstance(x, LatentKV):
            return x
        return dense[id(x)] if id(x) in dense else x.dense()

    plain = tree_map(decode, (args, kwargs))
    back = {id(dense[id(w)]): w for w in written}
    return tree_map(lambda out: back.get(id(out), out), func(*plain[0], **plain[1]))


# -- operations that act on rows ------------------------------------------------------------------------------


def _mapped(
    latent: LatentKV, fn: Callable[[torch.Tensor], torch.Tensor], key: tuple[Hashable, ...], argument: Any = None
) -> LatentKV:
    """A LatentKV over new rows: ``fn`` is applied to codes [T, B, width] and positions [T, B] (once for all layers that
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


def repeated(latent: LatentKV, repeats: Any, dim: int | None) -> LatentKV | None:
    """``repeat_interleave`` along tokens or the batch; None where it must decode, or Dynamo is tracing."""
    if dim is None or not isinstance(repeats, int) or repeats < 0 or is_fake(latent.codes):
        return None
    row = _row_dim(latent, dim)
    if row is None or (row == 0 and latent.tail is not None):
        return None
    if row == 1:
        return _batched(latent, lambda t, d: t.repeat_interleave(repeats, d), ("repeat", 1, repeats))
    return _mapped(latent, lambda t: t.repeat_interleave(repeats, 0), ("repeat", 0, repeats))


def _repeat_interleave(func: Any, args: Any, kwargs: Any) -> Any:
    latent, repeats, dim = (*args, kwargs.get("dim"))[:3]
    made = repeated(latent, repeats, dim)
    return NotImplemented if made is None else made


def assign(latent: LatentKV, index: Any, value: Any) -> bool:
    """``latent[index] = value`` where that is no write to a view of rows; False where it is, or Dynamo is tracing."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(p is Ellipsis or isinstance(p, slice) for p in parts) and not _touches_features(latent, parts):
        return False
    if is_fake(latent.codes) or is_functional(latent.codes):
        return False
    latent.follow()
    hint_once("write", WRITTEN.format("index assignment"))
    latent.uncompress_()[index] = value.dense() if isinstance(value, LatentKV) else value
    return True


def _touches_features(latent: LatentKV, parts: Sequence[Any]) -> bool:
    """Whether slices ``parts`` take a part of heads or features, or skip rows."""
    missing = [slice(None)] * (latent.dim() - len(parts) + 1)
    whole = [q for p in parts for q in (missing if p is Ellipsis else [p])]
    cut = [(dim, s) for dim, s in enumerate(whole) if s != slice(None)]
    return any(_row_dim(latent, dim) is None or s.step not in (None, 1) for dim, s in cut)


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
        return _with_tail(first, full[1:]) if all(_continues(first, t) for t in full[1:]) else NotImplemented
    if dim is None or not coded or (dim == 1 and _shared_positions(full)):
        return NotImplemented
    more = [(t.rows.track, t.start, t.length, t.positions) for t in full[1:]]
    spans = tuple((None if track is None else track.state(), start, length) for track, start, length, _ in more)
    joined = _track(first, lambda t: torch.cat([t, *(p for *_, p in more)], dim), ("cat", dim, *spans), None)
    return LatentKV.born(first.codec, torch.cat([t.codes for t in full], dim), joined)


def _continues(first: LatentKV, more: torch.Tensor) -> bool:
    """Whether ``more`` may be further tokens of ``first``; else torch promotes what is joined, or refuses it."""
    token = first.codec.decoder.token_dim
    sizes = [(*t.shape[:token], *t.shape[token + 1 :]) for t in (first, more)]
    return more.dtype == first.dtype and more.device == first.device and sizes[0] == sizes[1]


def _with_tail(first: LatentKV, more: Sequence[torch.Tensor]) -> LatentKV:
    """Dense tokens after coded ones (an uncompiled model, or one past Dynamo's recompile limit): kept as they are."""
    hint_once(
        "cat",
        "eager code appended dense tokens to a coded cache (an uncompiled model, or past Dynamo's recompile limit): "
        "what is coded stays coded, the new tokens are kept dense; raise torch._dynamo.config.recompile_limit",
    )
    token = first.codec.decoder.token_dim
    parts = [*([] if first.tail is None else [first.tail])]
    parts += [t.dense() if isinstance(t, LatentKV) else t for t in more]
    assert first.rows is not None
    first.rows.shared = True  # what is joined is a copy: a write to either must not reach the other
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
    """Tokens (``row`` 0) or batch rows (1) [lo, lo + length) as a view. Appending to it copies: to batch rows always
    (by a ``used`` that no view ends at), to tokens unless they end as the whole does."""
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
        try:
            return _batched(latent, lambda t, d: t.index_select(d, index), ("select", 1), index)
        except RuntimeError as error:  # what torch raises for an index that is too large depends on the axis
            raise IndexError(f"{error} (batch rows of a cache: {latent.codes.shape[1]})") from None
    if row != 0 or latent.tail is not None:
        return NotImplemented
    return _mapped(latent, lambda t: t.index_select(0, index), ("select", 0), index)


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
    return args[0].__copy__()


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
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.zero_.default: _zero_,
    aten.copy_.default: _copy_,
}
