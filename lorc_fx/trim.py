"""Spare room given back: a cache that grows by a fraction of itself holds more rows than it shows."""

from __future__ import annotations

from typing import Any

from .latent import LatentKV, cache_nbytes, tensors_of
from .rows import Track


def trim_cache(cache: Any) -> int:
    """Let a cache hold no more than it shows (``cache_nbytes`` then counts the same bytes held and used); returns the
    bytes freed.

    ``cache`` as in ``cache_nbytes``. Rows are copied into storage of their own size; positions that layers share stay
    shared; a view (a cropped cache) becomes a copy, which writes into the whole no longer reach. What others still hold
    of the old storage stays as it was, and so does its memory. The next token allocates room again.
    """
    before = cache_nbytes(cache)
    tracks: dict[tuple[Track, int, int], Track] = {}
    for latent in tensors_of(cache):
        if isinstance(latent, LatentKV) and not _exact(latent):
            _move(latent, tracks)
    return before - cache_nbytes(cache)


def _exact(latent: LatentKV) -> bool:
    latent.follow()
    rows, length = latent.rows, latent.length
    assert rows is not None
    held = [rows.codes] if rows.track is None else [rows.codes, rows.track.data]
    return all(t.shape[0] == length and t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in held)


def _move(latent: LatentKV, tracks: dict[tuple[Track, int, int], Track]) -> None:
    """To rows of its own, as before a write into shared ones. ``tracks``: copies of positions made so far, by (track,
    start, length)."""
    old, start = latent.rows, latent.start
    assert old is not None
    latent.view_of, old.shared = None, True
    latent.own_()
    rows = latent.rows
    assert rows is not None
    if old.track is not None and rows.track is not None:
        rows.moved_to(tracks.setdefault((old.track, start, latent.length), rows.track))
