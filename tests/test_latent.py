"""LatentKV against the dense tensor that it stands for: same tokens, same batch rows, whatever is done to it."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorc_fx import latent_ops
from lorc_fx.codec import Codec
from lorc_fx.decoder import Decoder
from lorc_fx.errors import EagerWarning, ForeignCache
from lorc_fx.latent import LatentKV, Rows, cache_nbytes, capacity
from lorc_fx.runtime import _window

HEADS, DIM, RANK = 2, 3, 4
LAYOUTS = {
    "BHTD": ("B", HEADS, "T", DIM),
    "BTHD": ("B", "T", HEADS, DIM),
    "BTn": ("B", "T", HEADS * DIM),
    "TBn": ("T", "B", HEADS * DIM),
}


class Epilogue(nn.Module):
    """Adds the token's position (so that a lost one shows) and brings y into the layout."""

    def __init__(self, layout, positions):
        super().__init__()
        self.layout, self.positions = layout, positions

    def forward(self, y, positions):
        if self.positions:
            y = y + positions.unsqueeze(-1)
        if self.layout == "TBn":
            return y.transpose(0, 1)
        y = y if self.layout == "BTn" else y.unflatten(2, (HEADS, DIM))
        return y.transpose(1, 2) if self.layout == "BHTD" else y


def codec_of(layout="BHTD", positions=True, seed=0, dtype=torch.float32):
    traced = torch.fx.symbolic_trace(Epilogue(layout, positions))
    decoder = Decoder(traced, HEADS * DIM, LAYOUTS[layout], dtype, positions, "adds positions")
    g = torch.Generator().manual_seed(seed)
    encode, decode = torch.randn(RANK, 5, generator=g), torch.randn(RANK, HEADS * DIM, generator=g)
    return Codec(decoder, encode.to(dtype), decode.to(dtype), torch.randn(HEADS * DIM, generator=g).to(dtype), ())


def latent_of(codec, tokens=5, batch=2, seed=1, start=0):
    codes = torch.randn(tokens, batch, RANK, generator=torch.Generator().manual_seed(seed)).to(codec.dtype)
    positions = (torch.arange(start, start + tokens, dtype=torch.int32) * 10)[:, None].repeat(1, batch)
    return LatentKV.born(codec, codes, positions if codec.decoder.needs_positions else None)


def append(latent, new):
    """What a compiled decode step does: write rows behind the view, in place where that is allowed."""
    rows, start = _window(latent, new.length)
    at = start + latent.length
    rows.codes[at : at + new.length] = new.codes
    if rows.positions is not None:
        rows.positions[at : at + new.length] = new.positions
    return LatentKV.over(latent.codec, rows, start, latent.length + new.length)


def same(latent, dense):
    assert isinstance(latent, LatentKV), f"decoded: {type(latent)}"
    assert latent.shape == dense.shape and latent.dtype == dense.dtype
    assert torch.equal(latent.dense(), dense)


@pytest.fixture(autouse=True)
def fresh_hints(monkeypatch):
    monkeypatch.setattr(latent_ops, "_hinted", set())


@pytest.fixture(params=LAYOUTS)
def codec(request):
    return codec_of(request.param)


def dims(latent):
    return latent.codec.decoder.token_dim, latent.codec.decoder.batch_dim


#: name -> fn(value, token dim, batch dim) that moves tokens or batch rows only, so that the result stays coded
ROW_OPS = {
    "first tokens": lambda x, t, b: x.narrow(t, 0, 3),
    "last tokens": lambda x, t, b: x[(slice(None),) * t + (slice(-2, None),)],
    "no tokens": lambda x, t, b: torch.ops.aten.slice.Tensor(x, t, 2, 2),
    "all tokens": lambda x, t, b: torch.ops.aten.slice.Tensor(x, t, 0, 1 << 62),
    "one row": lambda x, t, b: torch.ops.aten.slice.Tensor(x, b, 1, 2),
    "reorder rows": lambda x, t, b: x.index_select(b, torch.tensor([1, 0, 1])),
    "reorder tokens": lambda x, t, b: x.index_select(t, torch.tensor([4, 0, 0])),
    "index rows": lambda x, t, b: x[(slice(None),) * b + (torch.tensor([1, 1]),)],
    "mask tokens": lambda x, t, b: x[(slice(None),) * t + (torch.tensor([True, False, True, True, False]),)],
    "twice in batch": lambda x, t, b: torch.cat([x, x], b),
    "twice in tokens": lambda x, t, b: torch.cat([x, x], t),
    "negative dim": lambda x, t, b: torch.cat([x, x], t - x.dim()),
    "roll": lambda x, t, b: x.roll(2, t),
    "clone": lambda x, t, b: x.clone(),
    "detach": lambda x, t, b: x.detach(),
    "copy to the device": lambda x, t, b: x.to("cpu", copy=True),
    "same dtype": lambda x, t, b: x.to(x.dtype),
    "repeat_interleave rows": lambda x, t, b: x.repeat_interleave(3, dim=b),
    "deepcopy": lambda x, t, b: copy.deepcopy(x),
}


@pytest.mark.parametrize("name", ROW_OPS)
def test_row_operations_stay_coded(name, codec):
    latent = latent_of(codec)
    t, b = dims(latent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ROW_OPS[name](latent, t, b)
    same(found, ROW_OPS[name](latent.dense(), t, b))


#: name -> fn that touches features or mixes: decoded, and right
DENSE_OPS = {
    "one head": lambda x: x[:, :1],
    "select": lambda x: x[0],
    "scale": lambda x: x * 2,
    "product": lambda x: x @ x.transpose(-1, -2),
    "other dtype": lambda x: x.double(),
    "every other token": lambda x: x[:, :, ::2],
    "reshape": lambda x: x.reshape(-1),
    "cat features": lambda x: torch.cat([x, x], -1),
    "roll features": lambda x: x.roll(1, -1),
    "transpose": lambda x: x.transpose(1, 2),
    "sdpa": lambda x: nn.functional.scaled_dot_product_attention(torch.ones(2, HEADS, 1, DIM), x, x),
}


@pytest.mark.parametrize("name", DENSE_OPS)
def test_everything_else_is_decoded_and_said_once(name):
    latent = latent_of(codec_of())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = DENSE_OPS[name](latent)
        DENSE_OPS[name](latent)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, DENSE_OPS[name](latent.dense()))
    assert [w.category for w in caught] == [EagerWarning]


def test_dense_tokens_after_coded_ones():
    """An uncompiled model appends: what is coded stays coded, the rest is kept as it came, and it is said once."""
    codec = codec_of()
    latent, other = latent_of(codec), latent_of(codec_of(seed=7), tokens=2)
    ones = torch.ones(2, HEADS, 3, DIM)
    with pytest.warns(EagerWarning, match="stays coded") as caught:
        mixed = torch.cat([torch.cat([latent, other], 2), ones], 2)
    assert len(caught) == 1
    dense = torch.cat([latent.dense(), other.dense(), ones], 2)
    same(mixed, dense)
    assert mixed.length == 5 and mixed.codes.shape[0] == 5
    assert cache_nbytes(mixed, used=True) == latent.used_nbytes() + dense[:, :, 5:].numel() * 4
    for lo, hi in ((0, 4), (0, 5), (3, 7), (5, 9), (6, 10), (0, 10), (4, 4)):
        same(mixed[:, :, lo:hi], dense[:, :, lo:hi])
    for name in ("reorder rows", "one row", "clone", "detach", "deepcopy", "index rows", "same dtype"):
        same(ROW_OPS[name](mixed, 2, 0), ROW_OPS[name](dense, 2, 0))
    for name in ("reorder tokens", "roll", "twice in tokens", "twice in batch"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EagerWarning)
            found = ROW_OPS[name](mixed, 2, 0)
        found = found.dense() if isinstance(found, LatentKV) else found
        assert torch.equal(found, ROW_OPS[name](dense, 2, 0)), name


def test_in_place_on_rows():
    codec = codec_of()
    latent, other = latent_of(codec), latent_of(codec, seed=8, start=50)
    latent.copy_(other)
    same(latent, other.dense())
    assert latent.zero_() is latent
    assert not latent.codes.any() and not latent.positions.any()


WRITES = {
    "copy_": lambda x: x.copy_(torch.ones(x.shape)),
    "add_": lambda x: x.add_(1),
    "fill_": lambda x: x.fill_(0.5),
    "index_copy_": lambda x: x.index_copy_(2, torch.tensor([1, 3]), torch.ones(2, HEADS, 2, DIM)),
}


@pytest.mark.parametrize("name", WRITES)
def test_dense_values_written_in_place_make_it_dense_and_right(name):
    latent = latent_of(codec_of())
    dense = latent.dense().clone()
    with pytest.warns(EagerWarning, match="dense from here on"):
        assert WRITES[name](latent) is latent
    same(latent, WRITES[name](dense))


@pytest.mark.parametrize("view", ["tokens", "rows", "select", "heads"])
def test_a_write_through_a_view_is_never_lost(view):
    """As on a dense tensor, or refused: a write that goes nowhere would be silent and wrong."""
    latent, every = latent_of(codec_of()), slice(None)
    at = {"tokens": (every, every, slice(0, 2)), "rows": slice(0, 1), "select": 0, "heads": (every, slice(0, 1))}[view]
    before = latent.dense().clone()
    try:
        latent[at].zero_()
    except ForeignCache:
        return
    assert not torch.equal(latent.dense()[at], before[at])


STEPS = ("append", "slice", "batch", "reorder", "tokens", "cat", "clone", "roll", "deepcopy", "mask", "detach")


@settings(deadline=None, max_examples=60)
@given(layout=st.sampled_from(sorted(LAYOUTS)), data=st.data())
def test_random_sequences(layout, data):
    codec = codec_of(layout)
    latent = latent_of(codec)
    dense = latent.dense()
    t, b = dims(latent)
    for step in data.draw(st.lists(st.sampled_from(STEPS), max_size=8)):
        tokens, batch = dense.shape[t], dense.shape[b]
        some = st.lists(st.integers(0, max(tokens - 1, 0)), min_size=1, max_size=4)
        if step in ("tokens", "roll") and not tokens:
            continue
        if step in ("append", "cat"):
            new = latent_of(codec, data.draw(st.integers(1, 3)), batch, data.draw(st.integers(0, 99)), tokens)
            dense = torch.cat([dense, new.dense()], t)
            latent = append(latent, new) if step == "append" else torch.cat([latent, new], t)
        elif step == "slice":
            lo, hi = sorted(data.draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens))))
            latent, dense = (torch.ops.aten.slice.Tensor(x, t, lo, hi) for x in (latent, dense))
        elif step == "batch":
            latent, dense = (torch.cat([x, x], b) if batch < 5 else x.narrow(b, 1, 2) for x in (latent, dense))
        elif step == "reorder":
            index = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))
            latent, dense = latent.index_select(b, index), dense.index_select(b, index)
        elif step == "tokens":
            index = torch.tensor(data.draw(some))
            latent, dense = latent.index_select(t, index), dense.index_select(t, index)
        elif step == "mask":
            keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool)
            at = (slice(None),) * t + (keep,)
            latent, dense = latent[at], dense[at]
        elif step == "roll":
            shift = data.draw(st.integers(-3, 3))
            latent, dense = latent.roll(shift, t), dense.roll(shift, t)
        else:
            latent = {"clone": torch.clone, "deepcopy": copy.deepcopy, "detach": torch.Tensor.detach}[step](latent)
        same(latent, dense)


@settings(deadline=None, max_examples=40)
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


def test_appending_is_in_place_and_amortised(monkeypatch):
    copied = []
    grown = Rows.grown
    monkeypatch.setattr(Rows, "grown", lambda self, s, n, extra: copied.append(n) or grown(self, s, n, extra))
    codec = codec_of()
    latent, one = latent_of(codec, tokens=1), latent_of(codec, tokens=1)
    for length in range(2, 3001):
        latent = append(latent, one)
        assert latent.length == length
        assert latent.rows.codes.shape[0] <= length + max(64, length // 8)
    assert len(copied) < 30 and sum(copied) < 12 * 3000


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


def test_repr_and_pickle():
    latent = latent_of(codec_of())
    assert "shape=(2, 2, 5, 3)" in repr(latent) and "rank=4 of 6" in repr(latent)
    with pytest.raises(ForeignCache, match="pickled"):
        pickle.dumps(latent)


def test_dynamo_sees_the_logical_shape(clean):
    """Another backend that runs graphs as they are meets the LatentKV eagerly; shapes are propagated on fakes."""
    shapes = []

    def keep(gm, examples):
        shapes.extend(tuple(n.meta["example_value"].shape) for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    keep.reads_latents = True
    latent = latent_of(codec_of())
    call = torch.compile(lambda x: (torch.cat([x, x], 2), x * 2), backend=keep, fullgraph=True, dynamic=False)
    with pytest.warns(EagerWarning, match="decoded"):
        joined, scaled = call(latent)
    same(joined, torch.cat([latent.dense()] * 2, 2))
    assert torch.equal(scaled, latent.dense() * 2)
    assert shapes == [(2, HEADS, 10, DIM), (2, HEADS, 5, DIM)]


def test_one_trace_serves_all_lengths_and_codecs_of_one_signature(clean):
    traces = []

    def keep(gm, examples):
        traces.append(gm)
        return gm.forward

    keep.reads_latents = True
    call = torch.compile(lambda x: torch.cat([x, x], 2), backend=keep)
    for seed, tokens in enumerate((5, 6, 9, 70)):
        latent = latent_of(codec_of(seed=seed), tokens)
        latent.codec.decoder.__dict__["digest"] = "one"
        same(call(latent), torch.cat([latent.dense()] * 2, 2))
    assert len(traces) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_backend_leaves_it_to_python(clean, backend):
    latent = latent_of(codec_of())
    call = torch.compile(lambda x: (torch.cat([x, x], 2), x * 2), backend=backend)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EagerWarning)
            joined, scaled = call(latent)
        same(joined, torch.cat([latent.dense()] * 2, 2))
        assert torch.equal(scaled, latent.dense() * 2)


def test_inference_mode():
    codec = codec_of()
    with torch.inference_mode():
        inside = append(latent_of(codec), latent_of(codec, 2, seed=3))
        want = torch.cat([latent_of(codec).dense(), latent_of(codec, 2, seed=3).dense()], 2)
        same(inside[:, :, 1:], want[:, :, 1:])
    same(inside.index_select(0, torch.tensor([1, 1])), want.index_select(0, torch.tensor([1, 1])))
    with torch.inference_mode():
        same(append(latent_of(codec), latent_of(codec, 2, seed=3)), want)
