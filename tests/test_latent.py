"""LatentKV against the dense tensor that it stands for: same tokens, same batch rows, whatever is done to it."""

import copy
import pickle
import warnings

import pytest
import torch
from latent_cases import DIM, HEADS, LAYOUTS, ROW_OPS, append, codec_of, dims, latent_of, same
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lorc_fx.errors import EagerWarning
from lorc_fx.latent import LatentKV, cache_nbytes

pytestmark = pytest.mark.usefixtures("fresh_hints")


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
    "repeat_interleave, the function": lambda x: torch.repeat_interleave(x, 3, 0),
    "repeat_interleave heads": lambda x: x.repeat_interleave(2, dim=1),
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
    assert caught[0].filename == __file__, "it points at the line that reads"


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


EVERY = slice(None)
AT = {
    "tokens": (EVERY, EVERY, slice(1, 3)),
    "last tokens": (..., slice(-2, None), EVERY),
    "rows": slice(1, 2),
    "both": (slice(0, 1), EVERY, slice(1, 4)),
    "all": ...,
    "token": (EVERY, EVERY, 2),
    "row": 1,
    "heads": (EVERY, slice(0, 1)),
    "feature": (..., 0),
    "every other": (EVERY, EVERY, slice(None, None, 2)),
    "index": (EVERY, EVERY, torch.tensor([0, 2])),
    "mask": torch.tensor([True, False]),
}


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("shared", [False, True])
def test_assignment(at, shared):
    """What is assigned is there, also in views made before; another continuation of the prefix keeps what it had."""
    latent = latent_of(codec_of())
    fork = append(latent, latent_of(latent.codec, 2, seed=3)) if shared else None
    before = None if fork is None else fork.dense()
    views = [latent[:, :, :3], latent[1:], latent[1:][:, :, 2:], latent.detach()]
    want = latent.dense().clone()
    value = torch.randn(want[AT[at]].shape)
    latent[AT[at]] = value
    want[AT[at]] = value
    same(latent, want)
    for view, part in zip(views, (want[:, :, :3], want[1:], want[1:][:, :, 2:], want), strict=True):
        same(view, part)
        assert torch.equal(view * 1, part)
    if fork is not None:
        same(fork, before)


@pytest.mark.parametrize("at", ["tokens", "last tokens", "rows", "both", "all"])
def test_dense_values_written_into_a_view_reach_the_cache(at):
    latent, other = latent_of(codec_of()), latent_of(codec_of())
    want = latent.dense().clone()
    view, again = latent[AT[at]], latent[AT[at]]
    view.add_(1)
    want[AT[at]] += 1
    same(latent, want)
    same(again, want[AT[at]])
    again.mul_(2)
    want[AT[at]] *= 2
    same(latent, want)
    same(view, want[AT[at]])
    same(other, latent_of(codec_of()).dense())


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


def test_repr():
    latent = latent_of(codec_of())
    assert "shape=(2, 2, 5, 3)" in repr(latent) and "rank=4 of 6" in repr(latent)


def saved(value, tmp_path, **more):
    torch.save(value, tmp_path / "x.pt")
    return torch.load(tmp_path / "x.pt", **more)


PICKLES = {
    "pickle": lambda value, path: pickle.loads(pickle.dumps(value)),
    "weights_only": lambda value, path: saved(value, path, weights_only=True),
    "mmap": lambda value, path: saved(value, path, mmap=True),
}


@pytest.mark.parametrize("how", PICKLES)
def test_pickled_it_is_the_decoded_tensor(how, tmp_path):
    """In nests too, where many are decoded one after the other: each gets storage of its own."""
    codec = codec_of()
    many = [latent_of(codec, seed=i) for i in range(20)]
    with pytest.warns(EagerWarning, match="save_cache keeps it coded") as caught:
        found = PICKLES[how]({"all": many, "again": many[0], "part": many[1][:, :, 1:3]}, tmp_path)
    assert len(caught) == 1
    assert all(type(t) is torch.Tensor for t in (*found["all"], found["part"]))
    assert all(torch.equal(t, x.dense()) for t, x in zip(found["all"], many, strict=True))
    assert found["again"] is found["all"][0] and torch.equal(found["part"], many[1].dense()[:, :, 1:3])


def test_pickled_caches(tmp_path):
    latent = latent_of(codec_of())
    cache = DynamicCache([(latent, latent[:, :, :4])])
    with torch.serialization.safe_globals([DynamicCache, DynamicLayer]):
        found = saved(cache, tmp_path, weights_only=True)
    assert torch.equal(found.layers[0].keys, latent.dense())
    assert torch.equal(found.layers[0].values, latent.dense()[:, :, :4])


def test_a_shallow_copy_shows_the_same_rows():
    latent = latent_of(codec_of())
    copied = copy.copy(latent)
    same(copied, latent.dense())
    copied.zero_()
    same(latent, torch.zeros(latent.shape))


@pytest.mark.parametrize("name", ROW_OPS)
@pytest.mark.parametrize("tailed", [False, True])
def test_inference_mode_over_what_was_made_outside(name, tailed):
    """There torch hands over composite operations whole, and views of ordinary tensors are ordinary tensors."""
    latent = latent_of(codec_of(positions=True))
    if tailed:
        latent = torch.cat([latent[:, :, :3], latent.dense()[:, :, 3:]], 2)
    dense = latent.dense()
    with torch.inference_mode():
        found, want = (ROW_OPS[name](x, 2, 0) for x in (latent, dense))
    if not tailed:
        assert isinstance(found, LatentKV) and found.is_inference() == want.is_inference()
    assert torch.equal(found.dense() if isinstance(found, LatentKV) else found, want)
    assert torch.equal(found[:, :, :1].clone(), want[:, :, :1].clone())


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
