"""LatentKV: a tensor with the logical shape of cached keys or values whose storage is latents.

Stock caches hold it without knowing. Compiled graphs read its rows directly; eager code that touches it acts on the
rows where an operation only moves tokens or batch rows, and otherwise decodes: dense and right.
"""

from __future__ import annotations

from typing import Any

import torch

from .codec import Codec
from .compat import mark_weak_dynamic, skip_frame, traced_by_another_backend
from .decoder import decode_dense
from .errors import ForeignCache


def capacity(rows: int) -> int:
    """Rows to allocate for ``rows`` used: 64 spare below 512, one eighth above (so appending is amortised O(1))."""
    return rows + (64 if rows < 512 else rows // 8)


UNWRITTEN = -0.0
"""What rows of a preallocated buffer hold before a token is written: decodes like 0.0, told apart by its sign."""


def unwritten(codes: torch.Tensor) -> torch.Tensor:
    """Which rows of codes [T, B, r] hold no token yet: [T, B] bool."""
    return ((codes == 0) & torch.signbit(codes)).all(-1)


class Rows:
    """Token-major storage shared by the LatentKVs that continue one another.

    codes [capacity, B, r] model dtype; positions [capacity, B] int32 or None; rows up to ``used`` are taken by some
    view, so only a view that ends there may append in place. ``shared``: several views may show the same rows.
    """

    __slots__ = ("codes", "positions", "shared", "used")

    def __init__(self, codes: torch.Tensor, positions: torch.Tensor | None, used: int) -> None:
        self.codes, self.positions, self.used, self.shared = codes, positions, used, False

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


_INNER = {
    (False, False): ["codes"],
    (True, False): ["codes", "positions"],
    (False, True): ["codes", "tail"],
    (True, True): ["codes", "positions", "tail"],
}


class LatentMeta:
    """What Dynamo keeps of a LatentKV beside its inner tensors; guards compare the codec's signature only."""

    __slots__ = ("codec", "tailed")

    def __init__(self, codec: Codec, tailed: bool) -> None:
        self.codec, self.tailed = codec, tailed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LatentMeta) or self.tailed != other.tailed:
            return False
        return self.codec is other.codec or self.codec.signature == other.codec.signature

    def __hash__(self) -> int:
        return hash(self.codec.signature)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentMeta:
        return self


class LatentKV(torch.Tensor):
    """Cached keys or values of one site, coded.

    Logical shape: the dense cache value's (``codec.decoder.layout``, for instance [B, H, T, D]), in the model's dtype.
    ``codes`` [T, B, r] and ``positions`` [T, B] int32 (None where the epilogue needs none) are the rows it shows of
    ``rows``; ``codec`` is the codec that wrote them. ``tail`` (None in compiled code) holds tokens that eager code
    appended after them, dense: they were never projected by the codec, and what is coded stays coded.

    Slices of tokens or batch rows are views, as of a dense tensor. What needs decoding (single elements, heads,
    features) is a decoded copy: writing into that copy does not reach the cache.
    """

    codec: Codec
    codes: torch.Tensor
    positions: torch.Tensor | None
    rows: Rows | None
    start: int
    tail: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[LatentKV],
        codec: Codec,
        codes: torch.Tensor,
        positions: torch.Tensor | None,
        rows: Rows | None = None,
        start: int = 0,
        tail: torch.Tensor | None = None,
        size: Any = None,
        stride: Any = None,
    ) -> LatentKV:
        if size is None:
            extra = 0 if tail is None else tail.shape[codec.decoder.token_dim]
            size = codec.decoder.shape(codes.shape[1], codes.shape[0] + extra)
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, strides=stride, dtype=codec.decoder.dtype, device=codes.device, requires_grad=False
        )
        self.codec, self.codes, self.positions, self.rows, self.start = codec, codes, positions, rows, start
        self.tail = tail
        return self

    # -- construction -----------------------------------------------------------------------------------------

    @classmethod
    def born(
        cls, codec: Codec, codes: torch.Tensor, positions: torch.Tensor | None, tail: torch.Tensor | None = None
    ) -> LatentKV:
        """A LatentKV that owns ``codes`` [T, B, r] and ``positions`` [T, B], with no spare room yet."""
        return cls.over(codec, Rows(codes, positions, codes.shape[0]), 0, codes.shape[0], tail)

    @classmethod
    def over(cls, codec: Codec, rows: Rows, start: int, length: int, tail: torch.Tensor | None = None) -> LatentKV:
        """A LatentKV over rows [start, start + length), then ``tail``."""
        codes = _alias(rows.codes, start, length)
        positions = None if rows.positions is None else _alias(rows.positions, start, length)
        self = cls(codec, codes, positions, rows, start, tail)
        mark_weak_dynamic(self, codec.decoder.token_dim)
        mark_weak_dynamic(codes, 0)
        if positions is not None:
            mark_weak_dynamic(positions, 0)
        return self

    def tokens(self, start: int, length: int) -> LatentKV:
        """Coded tokens [start, start + length) of this view (itself where that is all)."""
        if start == 0 and length == self.length:
            return self
        assert self.rows is not None
        return LatentKV.over(self.codec, self.rows, self.start + start, length)

    # -- growth -----------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Coded tokens."""
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
        else:
            rows.shared = True
        rows.used = end + extra
        return rows

    def extended(self, extra: int) -> LatentKV:
        """This view and room for ``extra`` more tokens, which a graph fills."""
        before, rows = self.rows, self.reserve(extra)
        return LatentKV.over(self.codec, rows, self.start if rows is before else 0, self.length + extra)

    # -- reading ----------------------------------------------------------------------------------------------

    def dense(self) -> torch.Tensor:
        """The decoded cache value, in the logical shape and the model's dtype."""
        c = self.codec
        if self.tail is not None and not self.length:
            return self.tail
        coded = decode_dense(c.decoder, self.codes, self.positions, c.decode, c.mean, c.consts).contiguous()
        empty = unwritten(self.codes)
        if bool(empty.any()):  # a dense buffer holds zeros there, whatever the mean
            places = c.decoder.placed(empty)
            coded = torch.where(places, torch.zeros((), dtype=coded.dtype, device=coded.device), coded)
        return coded if self.tail is None else torch.cat([coded, self.tail], c.decoder.token_dim)

    def own_(self) -> None:
        """Stop sharing rows with other views (of a prefix that both continue), before a write in place."""
        if self.rows is not None and self.rows.shared:
            positions = None if self.positions is None else self.positions.clone()
            self.rows, self.start = Rows(self.codes.clone(), positions, self.length), 0
            self.codes, self.positions = self.rows.codes, positions

    def uncompress_(self) -> torch.Tensor:
        """Become dense in place (all tokens in ``tail``), for eager code that writes; returns the tail."""
        tail = self.dense()
        rows = Rows(self.codes[:0], None if self.positions is None else self.positions[:0], 0)
        self.codes, self.positions, self.rows, self.start, self.tail = rows.codes, rows.positions, rows, 0, tail
        return tail

    def used_nbytes(self) -> int:
        """Bytes of the rows that this view shows."""
        return sum(t.numel() * t.element_size() for t in self.parts())

    def parts(self) -> list[torch.Tensor]:
        """The tensors that hold it: codes, positions, tail, as far as it has them."""
        return [t for t in (self.codes, self.positions, self.tail) if t is not None]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LatentKV(shape={tuple(self.shape)}, rank={self.codec.rank} of {self.codec.width}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentKV:
        positions = None if self.positions is None else self.positions.clone()
        tail = None if self.tail is None else self.tail.clone()
        return LatentKV.born(self.codec, self.codes.clone(), positions, tail)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ForeignCache(
            "a LatentKV cannot be pickled: its codec belongs to the model in memory; save `latent.dense()` instead"
        )

    # -- the protocol of traceable wrapper subclasses ---------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], LatentMeta]:
        return _INNER[self.positions is not None, self.tail is not None], LatentMeta(self.codec, self.tail is not None)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], meta: LatentMeta, size: Any, stride: Any) -> LatentKV:
        other = traced_by_another_backend()
        if other is not None:  # it would not know what to do with latents: this frame runs in Python
            skip_frame(f"a LatentKV does not enter a region compiled by {other!r}")
        positions, tail = inner.get("positions"), inner.get("tail")
        return LatentKV(meta.codec, inner["codes"], positions, tail=tail, size=size, stride=stride)

    @classmethod
    def __metadata_guard__(cls, kept: LatentMeta, other: LatentMeta) -> bool:
        return kept == other

    @classmethod
    @torch._dynamo.disable  # a frame of ours is never a region to compile
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from .latent_ops import dispatch

        return dispatch(func, args, kwargs or {})


def cache_nbytes(cache: Any, used: bool = False) -> int:
    """Bytes held by a transformers cache, a tensor, or any nest of lists, tuples, dicts and objects with layers.

    Held: the distinct storages reachable (spare capacity included, codecs not). ``used=True``: the bytes of the rows
    shown, each tensor counted once.
    """
    seen: dict[tuple[Any, ...], int] = {}
    visited: set[int] = set()

    def add(tensor: torch.Tensor) -> None:
        if isinstance(tensor, LatentKV):
            for part in tensor.parts():
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
