"""LatentKV against the dense tensor that it stands for: same tokens, same batch rows, whatever is done to it."""

import pickle
import warnings

import pytest
import torch
from latent_cases import DIM, HEADS, LAYOUTS, ROW_OPS, append, codec_of, dims, latent_of, same
from torch import nn

from lorc_fx import latent_ops
from lorc_fx.errors import EagerWarning, ForeignCache
from lorc_fx.latent import LatentKV, cache_nbytes


@pytest.fixture(autouse=True)
def fresh_hints(monkeypatch):
    monkeypatch.setattr(latent_ops, "_hinted", set())


@pytest.fixture(params=LAYOUTS)
def codec(request):
    return codec_of(request.param)


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
    "repeat_interleave tokens": lambda x: x.repeat_interleave(3, dim=2),
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
    assert not latent.codes.any()


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


@pytest.mark.parametrize("view", ["tokens", "rows"])
def test_a_write_through_a_view_reaches_the_cache(view):
    """Slices of tokens and of batch rows are views, as of a dense tensor."""
    latent, every = latent_of(codec_of()), slice(None)
    at = {"tokens": (every, every, slice(0, 2)), "rows": slice(0, 1)}[view]
    before = latent.dense().clone()
    latent[at].zero_()
    after = latent.dense()
    assert not torch.equal(after[at], before[at])
    rest = {"tokens": (every, every, slice(2, None)), "rows": slice(1, None)}[view]
    assert torch.equal(after[rest], before[rest])


@pytest.mark.parametrize("copied", ["select", "heads", "feature"])
def test_what_needs_decoding_is_a_copy(copied):
    """As LatentKV's docstring says: a dense tensor of its own, with the right values; writing to it changes nothing."""
    latent, every = latent_of(codec_of()), slice(None)
    at = {"select": 0, "heads": (every, slice(0, 1)), "feature": (..., 0)}[copied]
    before = latent.dense().clone()
    with pytest.warns(EagerWarning, match="decoded"):
        part = latent[at]
    assert type(part) is torch.Tensor and torch.equal(part, before[at])
    part.zero_()
    same(latent, before)
    assert "copy does not reach the cache" in " ".join(LatentKV.__doc__.split())


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
