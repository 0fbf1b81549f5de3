"""Writes that come in other ways than ``cache.add_()`` or ``weight.add_()``: into caches, whatever place of an op they
are in; into weights, past torch's count of versions; and into one of two values that share rows."""

import copy
import gc

import pytest
import tiny
import torch
from latent_cases import DIM, HEADS, codec_of, latent_of, packed_codec_of, same
from torch import nn

import lorc_fx
from helpers import assert_close, cache_name, error, new_cache, options
from lorc_fx.latent import LatentKV, cache_nbytes
from lorc_fx.store import STORE

pytestmark = pytest.mark.usefixtures("quiet")

LOSSY = {"ratio": 0.5, "precision": "int8"}


# -- into caches -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("lorc_tests::raise_", mutates_args={"cache"})
def raise_(x: torch.Tensor, cache: torch.Tensor) -> None:
    cache += x


@raise_.register_fake
def _(x, cache):
    return None


WRITES = {
    "method": lambda x, cache: cache.add_(x),
    "second": lambda x, cache: torch.ops.lorc_tests.raise_(x, cache),
    "by name": lambda x, cache: torch.ops.lorc_tests.raise_(x, cache=cache),
    "list": lambda x, cache: torch._foreach_add_([cache], [x]),
    "out": lambda x, cache: torch.add(cache, x, out=cache),
}


class Write(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x, cache):
        self.write(x, cache)
        return x * 2


@pytest.mark.parametrize("untouched", [False, True], ids=["compiled", "untouched"])
@pytest.mark.parametrize("name", WRITES)
def test_a_compiled_graph_writes_into_a_cache(name, untouched):
    cache, model = latent_of(codec_of()), Write(WRITES[name])
    want = cache.dense() + 1
    x = torch.ones_like(want)
    if untouched:  # a graph that needs gradients goes to the inner compiler as it is
        model.other = nn.Linear(1, 1)
        model.forward = lambda x, cache: (WRITES[name](x, cache), model.other(x[..., :1]))
    model.compile(backend="lorc", options=options())
    with torch.set_grad_enabled(untouched):
        model(x, cache)
    assert_close("cache", cache.dense(), want)


EAGER = {
    "out": lambda x, cache: torch.add(x, 1, out=cache),
    "list": lambda x, cache: torch._foreach_copy_([cache], [x + 1]),
    "second": lambda x, cache: torch.ops.lorc_tests.raise_(x + 1 - cache.dense(), cache),
}


@pytest.mark.parametrize("name", EAGER)
def test_eager_code_writes_into_a_cache(name):
    cache = latent_of(codec_of())
    x = torch.randn(cache.shape)
    EAGER[name](x, cache)
    assert_close("cache", cache.dense(), x + 1)


def test_what_an_op_writes_into_is_what_it_returns():
    cache = latent_of(codec_of())
    assert torch.add(torch.ones(cache.shape), 1, out=cache) is cache


# -- what shares rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["zero", "rows"])
def test_a_cache_with_dense_tokens_behind_it_is_a_copy(write):
    first = latent_of(codec_of())
    before = first.dense().clone()
    joined = torch.cat([first, torch.ones(2, HEADS, 1, DIM)], 2)
    assert isinstance(joined, LatentKV)
    if write == "zero":
        joined.zero_()
    else:
        joined[:, :, :5] = latent_of(first.codec, seed=9)
    same(first, before)


@pytest.mark.parametrize("shape", [(2, HEADS + 1, 1, DIM), (3, HEADS, 1, DIM), (2, HEADS, 1, DIM - 1)], ids=str)
def test_tokens_of_another_shape_are_refused_as_of_a_dense_tensor(shape):
    with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"):
        torch.cat([latent_of(codec_of()), torch.ones(shape)], 2)


def test_tokens_of_another_dtype_are_promoted_as_those_of_a_dense_tensor():
    cache, more = latent_of(codec_of()), torch.ones(2, HEADS, 1, DIM, dtype=torch.float64)
    made, want = torch.cat([cache, more], 2), torch.cat([cache.dense(), more], 2)
    assert made.dtype == want.dtype and torch.equal(made, want)


def test_a_view_of_what_became_dense_is_copied_and_counted_as_it_is_now():
    cache = latent_of(packed_codec_of())
    view = cache[:, :, :3]
    cache[0, 0, 0, 0] = 5.0
    assert torch.equal(copy.deepcopy(view).dense(), cache.dense()[:, :, :3])
    assert view.used_nbytes() >= view.dense().nbytes


@pytest.mark.parametrize(
    "cut", [lambda x: x[:1], lambda x: x[1:3], lambda x: x[:1, :, :2]], ids=["first", "some", "both"]
)
def test_batch_rows_that_nobody_shows_are_given_back(cut):
    whole = latent_of(codec_of(), tokens=5, batch=4)
    view = cut(whole)
    want = view.dense().clone()
    del whole
    gc.collect()
    assert lorc_fx.trim_cache(view) > 0
    assert cache_nbytes(view) == cache_nbytes(view, used=True)
    same(view, want)
    assert lorc_fx.trim_cache(view) == 0


# -- into weights ----------------------------------------------------------------------------------------------------


def ids_of(tokens=12, seed=0):
    return torch.randint(0, 28, (1, tokens), generator=torch.Generator().manual_seed(seed))


def projections(model):
    return [p.weight for x in model.model.layers for p in (x.self_attn.k_proj, x.self_attn.v_proj)]


@torch.no_grad()
def test_weights_that_are_written_past_the_count_of_versions_are_seen_by_the_next_prompt():
    """As peft merges adapters: ``weight.data += delta``."""
    model, plain = tiny.llama(), tiny.llama()
    model.compile(backend="lorc", options=options(**LOSSY))
    for change in (0.0, 0.4, -0.4):
        for each in (model, plain):
            for i, weight in enumerate(projections(each)):
                weight.data += change * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        got, want = (m(ids_of(), use_cache=True).logits for m in (model, plain))
        assert error(got, want) < 0.05, change
    assert len(STORE.codecs(model.parameters())) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("layout", ["plain", "transposed", "gaps", "expanded", "scalar", "empty"])
def test_a_state_is_the_same_as_long_as_nothing_is_written(dtype, layout):
    from lorc_fx.store import WeightState

    base = (torch.arange(64 * 48).reshape(64, 48) % 5).to(dtype)
    weight = {
        "plain": base, "transposed": base.T, "gaps": base[:, :17], "expanded": base[:, :1].expand(64, 9),
        "scalar": base[1, 1], "empty": base[:0],
    }[layout]  # fmt: skip
    state = WeightState.of(weight)
    assert state.still(weight) and state.same(weight)
    base.data.copy_((torch.arange(64 * 48).reshape(64, 48) % 5 + 1).clamp_max(9).to(dtype))
    if dtype != torch.bool and layout != "empty":
        assert state.still(weight) and not state.same(weight)


def test_a_sample_is_of_more_than_one_column():
    from lorc_fx.store import WeightState

    weight = torch.zeros(2048, 256)
    state = WeightState.of(weight)
    weight.data[:, 7] = 1.0
    assert not state.same(weight)


class OfBuffers(nn.Module):
    """A linear layer whose weight is a buffer, as those of quantised layers."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


@torch.no_grad()
def test_models_of_buffers_have_codecs_too(tmp_path):
    model = tiny.llama()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, OfBuffers(getattr(layer.self_attn, name)))
    model.compile(backend="lorc", options=options(**LOSSY) | {"calibration": "first-prompt"})
    cache = new_cache(model)
    model(ids_of(300), use_cache=True, **{cache_name(model): cache})
    assert len(lorc_fx.fidelity(model)) == 4
    lorc_fx.save_cache(cache, tmp_path / "cache.safetensors")
    again = lorc_fx.load_cache(tmp_path / "cache.safetensors", model)
    assert torch.equal(again.layers[0].keys.dense(), cache.layers[0].keys.dense())
    lorc_fx.reset(model)
    assert lorc_fx.fidelity(model) == () and not STORE.codecs(model.buffers())
