"""Growable storage under LatentKV: a buffer of codes per cached tensor, a track of positions for all that share it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from .compat import mark_weak_dynamic

_LOCK = threading.RLock()
"""Held where rows and tracks are shared out: threads that continue one prefix, each in a cache of its own, must not get
the same spare rows. Reentrant, because the garbage collector may end other rows at any time."""


def capacity(rows: int) -> int:
    """Rows to allocate for ``rows`` used: 64 spare below 512, one eighth above (so appending is amortised O(1))."""
    return rows + (64 if rows < 512 else rows // 8)


def blank(storage: torch.dtype) -> float:
    """What rows of a preallocated buffer hold before a token is written. Plain rows: -0.0, which decodes like 0.0 and
    is told apart by its sign. Packed rows: zero bytes, which no written row has (``packing.TINY``)."""
    return -0.0 if storage.is_floating_point else 0


def unwritten(codes: torch.Tensor) -> torch.Tensor:
    """Which rows of codes [T, B, width] hold no token yet: [T, B] bool."""
    empty = codes == 0
    return (empty & torch.signbit(codes) if codes.is_floating_point() else empty).all(-1)


def zero_unwritten(value: torch.Tensor, codes: torch.Tensor, batch_dim: int, token_dim: int) -> torch.Tensor:
    """A decoded value with zeros where rows of codes [T, B, width] hold no token yet, as a dense buffer has there."""
    empty = unwritten(codes) if batch_dim < 0 else unwritten(codes).permute([0, 1] if token_dim < batch_dim else [1, 0])
    sizes = [n if i in (batch_dim, token_dim) else 1 for i, n in enumerate(value.shape)]
    return value.masked_fill(empty.reshape(sizes), 0.0)


def alias(tensor: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Rows [start, start + length) of a contiguous tensor, not as an autograd view: guards would walk to its base."""
    if start == 0 and length == tensor.shape[0]:
        return tensor
    stride = tensor.stride()
    offset = tensor.storage_offset() + start * stride[0]
    return tensor.new_empty(0).set_(tensor.untyped_storage(), offset, (length, *tensor.shape[1:]), stride)


def _grown(old: torch.Tensor, start: int, length: int, extra: int) -> torch.Tensor:
    """A copy of rows [start, start + length) with room for at least ``extra`` more."""
    new = old.new_empty((capacity(length + extra), *old.shape[1:]))
    new[:length].copy_(old[start : start + length])
    return new


@dataclass(frozen=True)
class _Derived:
    """The last track made of a track: by what, from which tensor argument in which state, from which rows."""

    key: tuple[Hashable, ...]
    argument: weakref.ref[torch.Tensor] | None
    version: int
    made: weakref.ref[Track]


class Track:
    """Positions [capacity, B] int32 (or what else is kept of each token, [capacity, B, m]), shared by the LatentKVs of
    all layers whose rows hold the same tokens.

    It counts once, is extended once, and is one tensor object to a compiled graph. The same operation on each layer's
    LatentKV (reordering a beam, joining batches) gives one new track again, because the last derived track is
    remembered. ``writes`` counts what may have written into it in place.
    """

    __slots__ = ("__weakref__", "_derived", "_views", "data", "owners", "used", "writes")

    def __init__(self, data: torch.Tensor, used: int) -> None:
        self.data, self.used, self.owners, self.writes = data, used, 0, 0
        self._views: dict[tuple[int, int], torch.Tensor] = {}
        self._derived: _Derived | None = None

    def view(self, start: int, length: int) -> torch.Tensor:
        """Positions of rows [start, start + length): the same object as long as it is among the last few asked for."""
        found = self._views.get((start, length))
        if found is not None:
            return found
        with _LOCK:
            found = alias(self.data, start, length)
            mark_weak_dynamic(found, 0)
            if len(self._views) >= 4:
                del self._views[next(iter(self._views))]
            self._views[start, length] = found
        return found

    def state(self) -> tuple[Hashable, ...]:
        """Equal to another one only if it is of the same track, not written into in between."""
        return (weakref.ref(self), self.writes)

    def copy(self) -> Track:
        return Track(self.data.clone(), self.used)

    def derived(
        self,
        fn: Callable[[torch.Tensor], torch.Tensor],
        start: int,
        length: int,
        key: tuple[Hashable, ...],
        argument: torch.Tensor | None = None,
    ) -> Track:
        """``fn`` of rows [start, start + length) as a track of its own. ``key`` and ``argument`` say what fn is."""
        with _LOCK:
            key = (key, start, length, self.writes)
            version = -1 if argument is None or argument.is_inference() else argument._version
            last = self._derived
            if last is not None and last.key == key and last.version == version:
                made = last.made()
                if made is not None and (None if last.argument is None else last.argument()) is argument:
                    return made
            made = Track(fn(self.view(start, length)), 0)
            made.used = made.data.shape[0]
            kept = None if argument is None else weakref.ref(argument)
            self._derived = _Derived(key, kept, version, weakref.ref(made))
            return made


class Rows:
    """Token-major storage shared by the LatentKVs that continue one another.

    codes [capacity, B, width] as the codec's format stores them; ``track``: its positions (None where the epilogue
    needs none). Rows up to ``used`` are taken by some view, so only a view that ends there may append in place.
    ``shared``: several views may show the same rows.
    """

    __slots__ = ("codes", "shared", "track", "used")

    def __init__(self, codes: torch.Tensor, track: Track | None, used: int) -> None:
        self.codes, self.track, self.used, self.shared = codes, track, used, False
        if track is not None:
            with _LOCK:
                track.owners += 1

    def __del__(self) -> None:
        if self.track is not None:
            with _LOCK:
                self.track.owners -= 1

    def grown(self, start: int, length: int, extra: int, track: Track | None) -> Rows:
        """A copy of rows [start, start + length) with room for at least ``extra`` more."""
        return Rows(_grown(self.codes, start, length, extra), track, length)

    def moved_to(self, track: Track) -> None:
        """Keep positions in another track from now on."""
        with _LOCK:
            if self.track is not None:
                self.track.owners -= 1
            self.track = track
            track.owners += 1


def alone(rows: Sequence[Rows]) -> None:
    """Before the positions that these rows share are written in place: they stop sharing them with any others."""
    track = rows[0].track
    if track is None:
        return
    with _LOCK:
        track.writes += 1
        if track.owners > len(rows):
            own = track.copy()
            for each in rows:
                each.moved_to(own)


def reserve(views: Sequence[tuple[Rows, int, int]], extra: int) -> list[tuple[Rows, int]]:
    """Room for ``extra`` more tokens behind each view (rows, start, length), which is now taken.

    The views share one track, or there is only one. In place only if all of them end where the used part of their
    storage ends and there is room; else grown copies, so that two continuations of one cache never meet.
    Returns the rows of each and where the view begins in them.
    """
    with _LOCK:
        _, start, length = views[0]
        end = start + length
        track = views[0][0].track
        fits = track is None or (end == track.used and end + extra <= track.data.shape[0])
        fits = fits and all(end == r.used and end + extra <= r.codes.shape[0] for r, _, _ in views)
        if not fits:
            track = None if track is None else Track(_grown(track.data, start, length, extra), length)
            views = [(r.grown(start, length, extra, track), 0, length) for r, _, _ in views]
            end = length
        if track is not None:
            track.used = end + extra
        for rows, _, _ in views:
            rows.shared |= fits
            rows.used = end + extra
        return [(rows, at) for rows, at, _ in views]
