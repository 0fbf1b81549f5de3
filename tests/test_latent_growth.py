"""How a LatentKV grows: continuations of one prefix, spare capacity, bytes (random sequences: test_cache_machine)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_cases import RANK, append, codec_of, latent_of, same

from lorc_fx.latent import LatentKV, cache_nbytes, in_step
from lorc_fx.rows import Rows, capacity


@settings(max_examples=40)
@given(data=st.data())
def test_continuations_never_meet(data):
    """A tree of continuations and cuts of one prefix: each keeps what it had, whatever is appended to the others."""
    codec = codec_of()
    first = latent_of(codec, tokens=3)
    known = [(first, first.dense())]
    for i in range(data.draw(st.integers(1, 10))):
        latent, dense = data.draw(st.sampled_from(known))
        lo, hi = sorted(data.draw(st.tuples(st.integers(0, dense.shape[2]), st.integers(0, dense.shape[2]))))
        if data.draw(st.booleans()):
            latent, dense = latent[:, :, lo:hi], dense[:, :, lo:hi]
        new = latent_of(codec, data.draw(st.integers(1, 80)), 2, seed=i, start=dense.shape[2])
        known.append((append(latent, new), torch.cat([dense, new.dense()], 2)))
    for latent, dense in known:
        same(latent, dense)


def test_what_was_derived_before_a_write_is_not_taken_for_what_is_derived_after_it():
    codec = codec_of()
    latent, other = latent_of(codec), latent_of(codec, seed=8, start=50)
    kept = latent.clone()
    latent.copy_(other)
    same(latent.clone(), other.dense())
    same(kept, latent_of(codec).dense())


def test_layers_that_are_joined_in_step_share_positions():
    """Two requests that become one batch: each position is held once, as before."""
    codec = codec_of()
    (a, c), (b, d) = (
        (x, LatentKV.born(codec, x.codes + 1, x.rows.track)) for x in (latent_of(codec), latent_of(codec))
    )
    for dim in (0, 2):
        first, second = torch.cat([a, b], dim), torch.cat([c, d], dim)
        assert in_step(first, second)
        same(second, torch.cat([c.dense(), d.dense()], dim))


def test_appending_is_in_place_and_amortised(monkeypatch):
    copied = []
    grown = Rows.grown
    monkeypatch.setattr(Rows, "grown", lambda self, s, n, extra, t: copied.append(n) or grown(self, s, n, extra, t))
    codec = codec_of()
    latent, one = latent_of(codec, tokens=1), latent_of(codec, tokens=1)
    for length in range(2, 3001):
        latent = append(latent, one)
        assert latent.length == length
        assert latent.rows.codes.shape[0] <= length + max(64, length // 8)
    assert len(copied) < 30 and sum(copied) < 12 * 3000


@pytest.mark.parametrize("made", [lambda x: x.clone(), lambda x: torch.cat([x, x])])
def test_positions_written_between_two_copies(made):
    """The last thing made of a track is remembered, but not beyond a write into the track."""
    codec = codec_of()
    latent, other = latent_of(codec), latent_of(codec, seed=2, start=7)
    before, was = made(latent), made(latent.dense())
    latent.copy_(other)
    same(made(latent), made(other.dense()))
    same(before, was)


def test_layers_joined_alike_share_their_positions():
    codec = codec_of()
    keys, more = latent_of(codec), latent_of(codec, start=7)
    values = LatentKV.born(codec, keys.codes.clone(), keys.rows.track)
    a, b = torch.cat([keys, more], 2), torch.cat([values, more], 2)
    assert in_step(a, b)
    assert not in_step(a, torch.cat([values, keys], 2)) and in_step(a, b)


@pytest.mark.parametrize("rows", [0, 1, 63, 511, 512, 2049, 100_000])
def test_spare_capacity_is_bounded(rows):
    assert rows < capacity(rows) <= rows + max(64, rows // 8)


def test_bytes_held_and_used():
    codec = codec_of()
    latent = append(latent_of(codec, tokens=5, batch=2), latent_of(codec, tokens=1, batch=2))
    row = 2 * (RANK * 4 + 4)
    assert latent.used_nbytes() == cache_nbytes(latent, used=True) == 6 * row
    assert cache_nbytes(latent) == capacity(6) * row
    plain = torch.zeros(3, 5)

    class Layer:
        def __init__(self):
            self.keys, self.values, self.other = latent, latent[:, :, :2], "text"

    class Cache:
        def __init__(self):
            self.layers, self.extra, self.me = [Layer()], {"x": (plain, plain[1:])}, self

    assert cache_nbytes(Cache()) == capacity(6) * row + 60, "each storage counts once"
    assert cache_nbytes(Cache(), used=True) == 6 * row + 2 * row + 60 + 40
    assert cache_nbytes([None, 3, "x"]) == 0
