"""LatentKV: a tensor with the logical shape of cached keys or values whose storage is latents.

Stock caches hold it without knowing. Compiled graphs read its rows directly; eager code that touches it acts on the
rows where an operation only moves tokens or batch rows, and otherwise decodes: dense and right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .codec import Codec
from .compat import is_fake, mark_weak_dynamic, skip_frame, traced_by_another_backend
from .decoder import decode_dense
from .rows import Rows, Track, alias, alone, reserve, unwritten, zero_unwritten

_INNER = {
    (False, False): ["codes"],
    (True, False): ["codes", "positions"],
    (False, True): ["codes", "tail"],
    (True, True): ["codes", "positions", "tail"],
}


class LatentMeta:
    """What Dynamo keeps of a LatentKV beside its inner tensors; guards compare the codec's signature only."""

    __slots__ = ("codec", "signature", "tailed")

    def __init__(self, codec: Codec, tailed: bool) -> None:
        self.codec, self.signature, self.tailed = codec, codec.signature, tailed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LatentMeta) or self.tailed != other.tailed:
            return False
        return self.signature is other.signature or self.signature == other.signature

    def __hash__(self) -> int:
        return hash(self.signature)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentMeta:
        return LatentMeta(_weak(self.codec), self.tailed)  # for a guard, and those outlive ``torch._dynamo.reset``


def _weak(codec: Codec) -> Codec:
    """The codec for whoever must not keep it: torch's own caches keep fake tensors and guards for good."""
    return codec if isinstance(codec, weakref.ProxyType) else weakref.proxy(codec)


class LatentKV(torch.Tensor):
    """Cached keys or values of one site, coded.

    Logical shape: the dense cache value's (``codec.decoder.layout``, for instance [B, H, T, D]), in the model's dtype.
    ``codes`` [T, B, width] (rows in the codec's format) and ``positions`` [T, B] int32 (None where the epilogue needs
    none; other values of each token, cosines say, [T, B, m] where it needs these: ``codec.decoder.side``) are the rows
    it shows of ``rows``; positions are one tensor for all layers that hold the same tokens.
    ``codec`` wrote the codes. ``tail`` (None in compiled code) holds tokens that eager code appended after them, dense:
    they were never projected by the codec, and what is coded stays coded.

    Slices of tokens or batch rows are views, as of a dense tensor. What needs decoding (single elements, heads,
    features) is a decoded copy: writing into that copy does not reach the cache.
    """

    codec: Codec
    codes: torch.Tensor
    rows: Rows | None
    start: int
    tail: torch.Tensor | None
    view_of: tuple[LatentKV, Callable[[LatentKV], LatentKV]] | None
    moves: int
    seen: int
    _positions: torch.Tensor | None

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
        self.codec, self.codes, self._positions, self.rows, self.start = codec, codes, positions, rows, start
        self.tail, self.view_of = tail, None
        self.moves = self.seen = 0
        return self

    @property
    def positions(self) -> torch.Tensor | None:
        """[T, B] int32 (or [T, B, m], see the class): the same tensor object in all LatentKVs that are in step. Asked
        of the rows each time, because a write to another view may have made them stop sharing."""
        if self.rows is not None and self.rows.track is not None:
            self._positions = self.rows.track.view(self.start, self.length)
        return self._positions

    # -- construction -----------------------------------------------------------------------------------------

    @classmethod
    def born(
        cls, codec: Codec, codes: torch.Tensor, positions: Track | torch.Tensor | None, tail: torch.Tensor | None = None
    ) -> LatentKV:
        """A LatentKV that owns ``codes`` [T, B, width], with ``positions`` [T, B] (or a track of them that others
        share), and no spare room yet."""
        track = Track(positions, codes.shape[0]) if isinstance(positions, torch.Tensor) else positions
        return cls.over(codec, Rows(codes, track, codes.shape[0]), 0, codes.shape[0], tail)

    @classmethod
    def over(cls, codec: Codec, rows: Rows, start: int, length: int, tail: torch.Tensor | None = None) -> LatentKV:
        """A LatentKV over rows [start, start + length), then ``tail``."""
        codes = alias(rows.codes, start, length)
        positions = None if rows.track is None else rows.track.view(start, length)
        self = cls(codec, codes, positions, rows, start, tail)
        mark_weak_dynamic(self, codec.decoder.token_dim)
        mark_weak_dynamic(codes, 0)
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

    # -- reading ----------------------------------------------------------------------------------------------

    def dense(self) -> torch.Tensor:
        """The decoded cache value, in the logical shape and the model's dtype."""
        self.follow()
        c = self.codec
        if self.tail is not None and not self.length:
            return self.tail
        home = c.encode.device  # an offloaded cache is elsewhere
        codes = self.codes.to(home)
        positions = None if self.positions is None else self.positions.to(home)
        coded = decode_dense(c.decoder, c.latents(codes), positions, c.matrix, c.mean, c.consts).contiguous()
        if bool(unwritten(codes).any()):  # a dense buffer holds zeros there, whatever the mean
            coded = zero_unwritten(coded, codes, c.decoder.batch_dim, c.decoder.token_dim)
        coded = coded.to(self.codes.device)
        return coded if self.tail is None else torch.cat([coded, self.tail], c.decoder.token_dim)

    def own_(self, positions: bool = False) -> None:
        """Before a write in place (to ``positions`` too): stop sharing rows with other continuations of one prefix, and
        positions with other layers. A view takes what it is a view of along."""
        rows = self.rows
        assert rows is not None
        if self.view_of is not None:
            self.view_of[0].own_(positions)
            self.follow(always=True)
        elif rows.shared:
            track = None if self.positions is None else Track(self.positions.clone(), self.length)
            self._move(Rows(self.codes.clone(), track, self.length), self.tail)
        elif positions:
            alone([rows])

    def viewed_by(self, again: Callable[[LatentKV], LatentKV]) -> LatentKV:
        """A view of this LatentKV, made by ``again``: what is written into it in place is written here, and the other
        way round."""
        made = again(self)
        if made is not self:
            made.view_of, made.seen = (self, again), self.moves
        return made

    def follow(self, always: bool = False) -> None:
        """A view whose base has moved (a write made it leave shared rows, or become dense) moves there too."""
        if self.view_of is None:
            return
        base, again = self.view_of
        base.follow()
        if always or base.moves != self.seen:
            fresh, self.seen = again(base), base.moves
            assert fresh.rows is not None
            self.codes, self.rows, self.start, self.tail = fresh.codes, fresh.rows, fresh.start, fresh.tail
            self.moves += 1

    def _move(self, rows: Rows, tail: torch.Tensor | None) -> None:
        self.codes, self.rows, self.start, self.tail = rows.codes, rows, 0, tail
        self.moves += 1

    def uncompress_(self) -> torch.Tensor:
        """Become dense in place (all tokens in ``tail``), for eager code that writes; returns the tail. A view takes
        what it is a view of along, so that the write is one to both."""
        if self.view_of is not None:
            self.view_of[0].uncompress_()
            self.follow()
            return self.dense()
        if self.tail is None or self.length:
            tail = self.dense()
            self._move(Rows(self.codes[:0], None if self.positions is None else Track(self.positions[:0], 0), 0), tail)
        assert self.tail is not None
        return self.tail

    def used_nbytes(self) -> int:
        """Bytes of the rows that this view shows."""
        return sum(t.numel() * t.element_size() for t in self.parts())

    def parts(self) -> list[torch.Tensor]:
        """The tensors that hold it: codes, positions, tail, as far as it has them."""
        self.follow()
        return [t for t in (self.codes, self.positions, self.tail) if t is not None]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LatentKV(shape={tuple(self.shape)}, rank={self.codec.rank} of {self.codec.width}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[Any, Any]) -> LatentKV:
        self.follow()
        assert self.rows is not None
        track = self.rows.track
        if track is not None:  # one copy for all layers that share it
            key = ("track", id(track), self.start, self.length)
            if key not in memo:
                memo[key] = Track(track.view(self.start, self.length).clone(), self.length)
            track = memo[key]
        tail = None if self.tail is None else self.tail.clone()
        return LatentKV.born(self.codec, self.codes.clone(), track, tail)

    def _is_view(self) -> bool:
        """Never to Dynamo, which would rebuild a cropped cache from its base, with strides that it has not: what it
        shows is in its own rows, and writes find their way by ``view_of``."""
        return False

    def __copy__(self) -> LatentKV:
        return self.viewed_by(lambda x: LatentKV.over(x.codec, x.rows, x.start, x.length, x.tail))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled (``torch.save``, a queue between processes) it is the decoded dense tensor: right anywhere, also with
        ``weights_only=True`` and without lorc_fx. Its codec belongs to a model in memory and its decoder is a graph,
        which must not come out of a pickle; ``save_cache`` keeps the rows."""
        from .latent_ops import hint_once

        hint_once(
            "pickle", "a pickled LatentKV is written decoded, as a dense tensor; lorc_fx.save_cache keeps it coded"
        )
        return self.dense().__reduce_ex__(protocol)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Rows [a:b] are written where they are; single elements, heads and features are no views, so it becomes dense
        before they are written."""
        from .latent_ops import assign

        if not assign(self, index, value):
            super().__setitem__(index, value)

    def repeat_interleave(self, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Any:
        """As of a dense tensor. (The function ``torch.repeat_interleave`` is expanded before it gets here: decoded.)"""
        from .latent_ops import repeated

        made = repeated(self, repeats, dim)
        return super().repeat_interleave(repeats, dim, output_size=output_size) if made is None else made

    # -- the protocol of traceable wrapper subclasses ---------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], LatentMeta]:
        self.follow()
        rows, tailed = self.rows, self.tail is not None  # at each call, for guards: not by way of ``positions``
        placed = self._positions if rows is None else rows.track
        return _INNER[placed is not None, tailed], LatentMeta(self.codec, tailed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], meta: LatentMeta, size: Any, stride: Any) -> LatentKV:
        other = traced_by_another_backend()
        if other is not None:  # it would not know what to do with latents: this frame runs in Python
            skip_frame(f"a LatentKV does not enter a region compiled by {other!r}")
        positions, tail = inner.get("positions"), inner.get("tail")
        codec = _weak(meta.codec) if is_fake(inner["codes"]) else meta.codec
        return LatentKV(codec, inner["codes"], positions, tail=tail, size=size, stride=stride)

    @classmethod
    def __metadata_guard__(cls, kept: LatentMeta, other: LatentMeta) -> bool:
        return kept == other

    @classmethod
    @torch._dynamo.disable  # a frame of ours is never a region to compile
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from .latent_ops import dispatch

        return dispatch(func, args, kwargs or {})


def extend(latents: Sequence[LatentKV], extra: int) -> list[LatentKV]:
    """Each view with room for ``extra`` more tokens. They show the same rows of one track (or it is one view)."""
    made = []
    views = [(x.rows, x.start, x.length) for x in latents]
    for latent, (rows, start) in zip(latents, reserve(views, extra), strict=True):  # type: ignore[arg-type]
        made.append(LatentKV.over(latent.codec, rows, start, latent.length + extra))
    return made


def in_step(a: LatentKV, b: LatentKV) -> bool:
    """Whether two LatentKVs show the same rows of one track of positions."""
    x, y = a.rows, b.rows
    same = x is not None and y is not None and x.track is not None and x.track is y.track
    return same and a.start == b.start and a.codes.shape[0] == b.codes.shape[0]


def cache_nbytes(cache: Any, used: bool = False) -> int:
    """Bytes held by a transformers cache, a tensor, or any nest of lists, tuples, dicts and objects with layers.

    Held: the distinct storages reachable (spare capacity included, codecs not). ``used=True``: the bytes of the rows
    shown, each tensor counted once.
    """
    seen: dict[tuple[Any, ...], int] = {}
    for item in tensors_of(cache):
        for tensor in item.parts() if isinstance(item, LatentKV) else [item]:
            storage = tensor.untyped_storage()
            if used:
                key = (storage.data_ptr(), tensor.storage_offset(), tensor.shape)
                seen[key] = tensor.numel() * tensor.element_size()
            else:
                seen[(storage.data_ptr(),)] = storage.nbytes()
    return sum(seen.values())


def tensors_of(cache: Any) -> Iterator[torch.Tensor]:
    """The tensors of a transformers cache, or of any nest of lists, tuples, dicts and objects with attributes."""
    visited: set[int] = set()
    queue = [cache]
    while queue:
        item = queue.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, (list, tuple)):
            queue += item
        elif hasattr(item, "__dict__") and not isinstance(item, (type, torch.nn.Module)) and id(item) not in visited:
            visited.add(id(item))
            queue.append(vars(item))
