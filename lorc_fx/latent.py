"""LatentKV: a tensor with the logical shape of cached keys or values whose storage is latents.

Stock caches hold it without knowing. Compiled graphs read its rows directly; eager code that touches it acts on the
rows where an operation only moves tokens or batch rows, and otherwise decodes: dense and right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .codec import Codec
from .compat import is_fake, is_functional, mark_weak_dynamic
from .decoder import decode_dense
from .errors import EagerWarning, ForeignCache

aten = torch.ops.aten


def capacity(rows: int) -> int:
    """Rows to allocate for ``rows`` used: 64 spare below 512, one eighth above (so appending is amortised O(1))."""
    return rows + (64 if rows < 512 else rows // 8)


class Rows:
    """Token-major storage shared by the LatentKVs that continue one another.

    codes [capacity, B, r] model dtype; positions [capacity, B] int32 or None; rows up to ``used`` are taken by some
    view, so only a view that ends there may append in place.
    """

    __slots__ = ("codes", "positions", "used")

    def __init__(self, codes: torch.Tensor, positions: torch.Tensor | None, used: int) -> None:
        self.codes, self.positions, self.used = codes, positions, used

    def grown(self, start: int, length: int, extra: int) -> Rows:
        """A copy of rows [start, start + length) with room for at least ``extra`` more."""
        size = capacity(length + extra)

        def copy(old: torch.Tensor) -> torch.Tensor:
            new = old.new_empty((size, *old.shape[1:]))
            new[:length].copy_(old[start : start + length])
            return new

        return Rows(copy(self.codes), None if self.positions is None else copy(self.positions), length)


def _alias(tensor: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Rows [start, start + length) of a contiguous tensor, not as an autograd view: guards would walk to its base."""
    if start == 0 and length == tensor.shape[0]:
        return tensor
    stride = tensor.stride()
    offset = tensor.storage_offset() + start * stride[0]
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), offset, (length, *tensor.shape[1:]), stride)


class LatentMeta:
    """What Dynamo keeps of a LatentKV beside its inner tensors; guards compare the codec's signature only."""

    __slots__ = ("codec",)

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LatentMeta) and (
            self.codec is other.codec or self.codec.signature == other.codec.signature
        )

    def __hash__(self) -> int:
        return hash(self.codec.signature)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentMeta:
        return self


class LatentKV(torch.Tensor):
    """Cached keys or values of one site, coded.

    Logical shape: the dense cache value's (``codec.decoder.layout``, for instance [B, H, T, D]), in the model's dtype.
    ``codes`` [T, B, r] and ``positions`` [T, B] int32 (None where the epilogue needs none) are the rows it shows of
    ``rows``; ``codec`` is the codec that wrote them.
    """

    codec: Codec
    codes: torch.Tensor
    positions: torch.Tensor | None
    rows: Rows | None
    start: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[LatentKV],
        codec: Codec,
        codes: torch.Tensor,
        positions: torch.Tensor | None,
        rows: Rows | None = None,
        start: int = 0,
        size: Any = None,
        stride: Any = None,
    ) -> LatentKV:
        shape = codec.decoder.shape(codes.shape[1], codes.shape[0]) if size is None else size
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=stride, dtype=codec.decoder.dtype, device=codes.device, requires_grad=False
        )
        self.codec, self.codes, self.positions, self.rows, self.start = codec, codes, positions, rows, start
        return self

    # -- construction -----------------------------------------------------------------------------------------

    @classmethod
    def born(cls, codec: Codec, codes: torch.Tensor, positions: torch.Tensor | None) -> LatentKV:
        """A LatentKV that owns ``codes`` [T, B, r] and ``positions`` [T, B], with no spare room yet."""
        return cls.over(codec, Rows(codes, positions, codes.shape[0]), 0, codes.shape[0])

    @classmethod
    def over(cls, codec: Codec, rows: Rows, start: int, length: int) -> LatentKV:
        """A LatentKV over rows [start, start + length)."""
        codes = _alias(rows.codes, start, length)
        positions = None if rows.positions is None else _alias(rows.positions, start, length)
        self = cls(codec, codes, positions, rows, start)
        mark_weak_dynamic(self, codec.decoder.token_dim)
        mark_weak_dynamic(codes, 0)
        if positions is not None:
            mark_weak_dynamic(positions, 0)
        return self

    # -- growth -----------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self.codes.shape[0]

    def reserve(self, extra: int) -> Rows:
        """Storage whose rows from this view's end on are free for ``extra`` new tokens, and are now taken.

        In place only if this view ends where the used part ends and there is room; else a grown copy, so that two
        continuations of one cache never meet. The view begins at row ``start`` of the first, at row 0 of a copy.
        """
        rows, end = self.rows, self.start + self.length
        assert rows is not None
        if end != rows.used or end + extra > rows.codes.shape[0]:
            rows = rows.grown(self.start, self.length, extra)
            end = self.length
        rows.used = end + extra
        return rows

    # -- reading ----------------------------------------------------------------------------------------------

    def dense(self) -> torch.Tensor:
        """The decoded cache value, in the logical shape and the model's dtype."""
        c = self.codec
        return decode_dense(c.decoder, self.codes, self.positions, c.decode, c.mean, c.consts)

    def used_nbytes(self) -> int:
        """Bytes of the rows that this view shows."""
        parts = (self.codes, self.positions)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LatentKV(shape={tuple(self.shape)}, rank={self.codec.rank} of {self.codec.width}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentKV:
        positions = None if self.positions is None else self.positions.clone()
        return LatentKV.born(self.codec, self.codes.clone(), positions)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ForeignCache(
            "a LatentKV cannot be pickled: its codec belongs to the model in memory; save `latent.dense()` instead"
        )

    # -- the protocol of traceable wrapper subclasses ---------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], LatentMeta]:
        inner = ["codes"] if self.positions is None else ["codes", "positions"]
        return inner, LatentMeta(self.codec)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], meta: LatentMeta, size: Any, stride: Any) -> LatentKV:
        return LatentKV(meta.codec, inner["codes"], inner.get("positions"), size=size, stride=stride)

    @classmethod
    def __metadata_guard__(cls, kept: LatentMeta, other: LatentMeta) -> bool:
        return kept == other

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        latents = [a for a in _flat(args, kwargs) if isinstance(a, LatentKV)]
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


def _flat(args: Any, kwargs: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves((args, kwargs))


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
    back = {id(t): x for x in _flat(args, kwargs) if isinstance(x, LatentKV) for t in [seen[id(x)]]}
    return back.get(id(out), out)  # in-place ops return their (still latent) argument


_hinted: set[str] = set()


def _hint_once(key: str, text: str) -> None:
    if key not in _hinted:
        _hinted.add(key)
        warnings.warn(text, EagerWarning, stacklevel=4)


def _decoded(func: Any, args: Any, kwargs: Any) -> Any:
    """Any other operation: decode, then run it on dense values."""
    mutated = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
    if any(isinstance(m, LatentKV) for m in mutated):
        raise ForeignCache(
            f"eager code wrote dense values into a coded cache ({func}); run the model through "
            '`model.compile(backend="lorc")` from the first token on, or start from a fresh cache'
        )
    if func is aten.cat.default:
        _hint_once(
            "cat",
            "eager code appended dense tokens to a coded cache (uncompiled model, or past Dynamo's recompile limit): "
            "this cache is dense from here on; raise torch._dynamo.config.recompile_limit or compile the model",
        )
    else:
        _hint_once(
            "read", f"eager code read a coded cache ({func}): it is decoded on each such read, which is right but slow"
        )
    dense = tree_map(lambda x: x.dense() if isinstance(x, LatentKV) else x, (args, kwargs))
    return func(*dense[0], **dense[1])


# -- operations that act on rows ------------------------------------------------------------------------------


def _mapped(latent: LatentKV, fn: Callable[[torch.Tensor], torch.Tensor]) -> LatentKV:
    """A LatentKV over new rows: ``fn`` is applied to codes [T, B, r] and positions [T, B]."""
    return LatentKV.born(latent.codec, fn(latent.codes), None if latent.positions is None else fn(latent.positions))


def _row_dim(latent: LatentKV, dim: int) -> int | None:
    """The dim of the rows for a logical dim: 0 for tokens, 1 for batch, None for heads and features."""
    dim %= latent.dim()
    decoder = latent.codec.decoder
    return 0 if dim == decoder.token_dim else 1 if dim == decoder.batch_dim else None


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    tensors: Sequence[Any] = args[0]
    full = [t for t in tensors if t.numel() or isinstance(t, LatentKV)]
    first = full[0]
    if not all(isinstance(t, LatentKV) and t.codec is first.codec for t in full):
        return NotImplemented
    dim = _row_dim(first, args[1] if len(args) > 1 else 0)
    if dim is None:
        return NotImplemented
    positions = None if first.positions is None else torch.cat([t.positions for t in full], dim)
    return LatentKV.born(first.codec, torch.cat([t.codes for t in full], dim), positions)


def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    latent, dim, lo, hi, step = (list(args) + [0, None, None, 1][len(args) - 1 :])[:5]
    row = _row_dim(latent, dim)
    if row is None or step != 1:
        full = (lo is None or lo == 0) and (hi is None or hi >= latent.shape[dim]) and step == 1
        return latent if full else NotImplemented
    lo, hi, _ = slice(lo, hi).indices(latent.shape[dim])
    length = max(hi - lo, 0)
    if row == 0 and latent.rows is not None:
        return LatentKV.over(latent.codec, latent.rows, latent.start + lo, length)
    return _mapped(latent, lambda t: t.narrow(row, lo, length).contiguous())


def _index_select(func: Any, args: Any, kwargs: Any) -> Any:
    latent, dim, index = args
    row = _row_dim(latent, dim) if isinstance(latent, LatentKV) else None
    return NotImplemented if row is None else _mapped(latent, lambda t: t.index_select(row, index))


def _index(func: Any, args: Any, kwargs: Any) -> Any:
    latent, indices = args
    used = [(i, x) for i, x in enumerate(indices) if x is not None]
    if not isinstance(latent, LatentKV) or len(used) != 1 or used[0][1].dim() != 1:
        return NotImplemented
    row = _row_dim(latent, used[0][0])
    if row is None:
        return NotImplemented
    index = used[0][1]
    return _mapped(latent, (lambda t: t[index]) if row == 0 else (lambda t: t[:, index]))


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    return LatentKV.over(args[0].codec, args[0].rows, args[0].start, args[0].length)


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return _mapped(args[0], torch.clone)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    latent = args[0]
    if kwargs.get("dtype") not in (None, latent.dtype):
        return NotImplemented
    device = kwargs.get("device")
    return _mapped(latent, lambda t: t.to(device=device, copy=True))


def _roll(func: Any, args: Any, kwargs: Any) -> Any:
    latent, shifts = args[:2]
    dims: Sequence[int] = args[2] if len(args) > 2 else ()
    row = _row_dim(latent, dims[0]) if len(dims) == 1 else None
    return NotImplemented if row is None else _mapped(latent, lambda t: t.roll(shifts, (row,)))


def _zero_(func: Any, args: Any, kwargs: Any) -> Any:
    latent = args[0]
    latent.codes.zero_()
    if latent.positions is not None:
        latent.positions.zero_()
    return latent


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    into, source = args[:2]
    both = isinstance(into, LatentKV) and isinstance(source, LatentKV) and into.codec is source.codec
    if not both or into.shape != source.shape:
        return NotImplemented
    into.codes.copy_(source.codes)
    if into.positions is not None:
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


def cache_nbytes(cache: Any, used: bool = False) -> int:
    """Bytes held by a transformers cache, a tensor, or any nest of lists, tuples, dicts and objects with layers.

    Held: the distinct storages reachable (spare capacity included, codecs not). ``used=True``: the bytes of the rows
    shown, each tensor counted once.
    """
    seen: dict[tuple[Any, ...], int] = {}
    visited: set[int] = set()

    def add(tensor: torch.Tensor) -> None:
        if isinstance(tensor, LatentKV):
            for part in (tensor.codes, tensor.positions):
                if part is not None:
                    add(part)
            return
        storage = tensor.untyped_storage()
        if used:
            seen[(storage.data_ptr(), tensor.storage_offset(), tensor.shape)] = tensor.numel() * tensor.element_size()
        else:
            seen[(storage.data_ptr(),)] = storage.nbytes()

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            add(item)
        elif isinstance(item, dict):
            for value in item.values():
                walk(value)
        elif isinstance(item, (list, tuple)):
            for value in item:
                walk(value)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, torch.nn.Module)) and id(item) not in visited:
            visited.add(id(item))
            walk(vars(item))

    walk(cache)
    return sum(seen.values())
