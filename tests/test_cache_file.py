"""Caches on disk: what is loaded goes on as what was saved, bit by bit, here and in another process."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from latent_cases import append, codec_of, latent_of
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, T5Config, T5ForConditionalGeneration

import lorc_fx
from helpers import cache_name, compiled, latents, new_cache, options, prompt
from lorc_fx.errors import BadCacheFile, EagerWarning, ForeignCache
from lorc_fx.latent import LatentKV, cache_nbytes, in_step

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore::lorc_fx.errors.LorcWarning")]


@torch.no_grad()
def steps(model, cache, ids):
    """Logits of one token after the other."""
    out = [
        model(ids[:, i : i + 1].clone(), **{cache_name(model): cache, "use_cache": True}).logits
        for i in range(ids.shape[1])
    ]
    return torch.cat(out, 1)


@torch.no_grad()
def begun(model, cache, tokens=9, decoded=2):
    """The cache after a prompt and some steps, two rows."""
    ids = prompt(2, tokens + decoded)[0]
    model(ids[:, :tokens], **{cache_name(model): cache, "use_cache": True})
    steps(model, cache, ids[:, tokens:])
    return cache


CACHES = [
    ("llama-gqa", "dynamic", 1.0, "model"),
    ("llama-gqa", "static", 0.5, "auto"),
    ("gemma3", "dynamic", 0.5, "auto"),
    ("gemma3", "static", 0.5, "model"),
    ("gpt2", "dynamic", 0.5, "model"),
    ("mistral-window", "static", 0.6, "int8"),
]


@pytest.mark.parametrize(("name", "kind", "ratio", "precision"), CACHES)
def test_it_goes_on_bit_by_bit_and_compiles_nothing(name, kind, ratio, precision, tmp_path, many_shapes):
    model = compiled(FAMILIES[name].build(layers=FAMILIES[name].fewest), ratio=ratio, precision=precision)
    cache = begun(model, new_cache(model, kind))
    lorc_fx.save_cache(cache, tmp_path / "a.cache")
    more = prompt(2, 3, seed=5)[0]
    want = steps(model, cache, more)
    compiles = counters["stats"]["unique_graphs"]
    loaded = lorc_fx.load_cache(tmp_path / "a.cache", model)
    assert type(loaded) is type(cache) and [type(x) for x in loaded.layers] == [type(x) for x in cache.layers]
    assert torch.equal(steps(model, loaded, more), want)
    assert counters["stats"]["unique_graphs"] == compiles
    for got, kept in zip(latents(loaded), latents(cache), strict=True):
        assert all(torch.equal(a.dense(), b.dense()) for a, b in zip(got, kept, strict=True))
    state = [{k: v for k, v in vars(x).items() if isinstance(v, (int, bool))} for x in loaded.layers]
    assert state == [{k: v for k, v in vars(x).items() if isinstance(v, (int, bool))} for x in cache.layers]


def test_positions_stay_one_tensor_and_the_file_is_small(tmp_path):
    model = compiled(FAMILIES["llama-gqa"].build(layers=2), ratio=0.5)
    cache = begun(model, new_cache(model), 200)
    lorc_fx.save_cache(cache, tmp_path / "a.cache")
    loaded = lorc_fx.load_cache(tmp_path / "a.cache", model)
    used = cache_nbytes(cache, used=True)
    assert cache_nbytes(loaded, used=True) == used
    assert cache_nbytes(loaded) < cache_nbytes(cache), "no spare room"
    assert used <= (tmp_path / "a.cache").stat().st_size <= used + 4096
    (a, _), (b, _) = latents(loaded)
    assert in_step(a, b) and a.positions is b.positions


def test_rows_that_a_static_cache_has_not_filled_are_left_out(tmp_path):
    model = compiled(FAMILIES["gpt2"].build(layers=1), ratio=0.5)
    cache = begun(model, new_cache(model, "static", 250))
    lorc_fx.save_cache(cache, tmp_path / "a.cache")
    assert (tmp_path / "a.cache").stat().st_size < cache_nbytes(cache, used=True) / 4


def test_dense_layers_tails_and_legacy_nests(tmp_path):
    codec, path = codec_of(), tmp_path / "a.cache"
    model = torch.nn.Linear(2, 2)
    lorc_fx.store.STORE.add(((), True), list(model.parameters()), codec)
    first = append(latent_of(codec), latent_of(codec, 2, seed=4))
    tailed = torch.cat([latent_of(codec, seed=2), torch.ones(2, 2, 3, 3)], 2)
    dense = torch.randn(2, 2, 4, 3)
    nest = ((first, tailed), [dense, {"x": dense[0], 3: None}], 1.5)
    lorc_fx.save_cache(nest, path)
    (a, b), (c, more), number = lorc_fx.load_cache(path, model)
    assert torch.equal(a.dense(), first.dense()) and torch.equal(b.dense(), tailed.dense())
    assert b.length == 5 and b.tail.shape[2] == 3
    assert type(c) is torch.Tensor and torch.equal(c, dense) and torch.equal(more["x"], dense[0])
    assert more[3] is None and number == 1.5
    cache = DynamicCache()
    cache.update(first, first, 0)
    cache.update(dense, dense, 1)
    lorc_fx.save_cache(cache, path)
    loaded = lorc_fx.load_cache(path, model)
    assert isinstance(loaded.layers[0].keys, LatentKV) and torch.equal(loaded.layers[1].values, dense)
    loaded.update(dense[:, :, :1], dense[:, :, :1], 2)
    assert len(loaded) == 3


def test_encoder_and_decoder(tmp_path, many_shapes):
    shape = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    model = compiled(T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).eval(), ratio=0.5)
    ids, _ = prompt(2, 7)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with torch.no_grad():
        encoded = model.get_encoder()(ids)

        def step(cache, tokens):
            return model(encoder_outputs=encoded, decoder_input_ids=tokens, **{cache_name(model): cache}).logits

        step(cache, ids[:, :3])
        step(cache, ids[:, 3:4])
        assert all(isinstance(t, LatentKV) for c in (cache.self_attention_cache, cache.cross_attention_cache)
                   for t in (c.layers[0].keys, c.layers[0].values))  # fmt: skip
        lorc_fx.save_cache(cache, tmp_path / "a.cache")
        loaded = lorc_fx.load_cache(tmp_path / "a.cache", model)
        assert loaded.is_updated == {0: True}
        assert torch.equal(step(loaded, ids[:, 4:5]), step(cache, ids[:, 4:5]))


def test_into_a_cache_that_is_given(tmp_path):
    model = compiled(FAMILIES["gemma3"].build(layers=2), ratio=0.5)
    cache, path, more = begun(model, new_cache(model)), tmp_path / "a.cache", prompt(2, 2, seed=5)[0]
    lorc_fx.save_cache(cache, path)
    want = steps(model, copy.deepcopy(cache), more)

    class Mine(DynamicCache):
        pass

    given = new_cache(model)
    layers = list(given.layers)
    assert lorc_fx.load_cache(path, model, given) is given and given.layers[0] is layers[0]
    assert torch.equal(steps(model, given, more), want)
    assert torch.equal(steps(model, lorc_fx.load_cache(path, model, DynamicCache()), more), want)
    for wrong in (
        Mine(config=model.config),
        new_cache(model, "static"),
        DynamicCache(config=FAMILIES["gpt2"].build().config),
    ):
        with pytest.raises(BadCacheFile, match="given"):
            lorc_fx.load_cache(path, model, wrong)
    mine = begun(model, Mine(config=model.config))
    lorc_fx.save_cache(mine, path)
    with pytest.raises(BadCacheFile, match="Mine"):
        lorc_fx.load_cache(path, model)
    assert type(lorc_fx.load_cache(path, model, Mine(config=model.config))) is Mine
    static = begun(model, new_cache(model, "static", 32))
    lorc_fx.save_cache(static, path)
    with pytest.raises(BadCacheFile, match="max_cache_len"):
        lorc_fx.load_cache(path, model, StaticCache(config=model.config, max_cache_len=64))


def test_other_weights_and_options_are_refused(tmp_path):
    build, path = FAMILIES["llama-gqa"].build, tmp_path / "a.cache"
    model = compiled(build(layers=1), ratio=0.5)
    lorc_fx.save_cache(begun(model, new_cache(model)), path)
    with pytest.raises(ForeignCache, match="no codecs: compile it"):
        lorc_fx.load_cache(path, build(layers=1))
    for other in (compiled(build(layers=1, seed=1), ratio=0.5), compiled(build(layers=1), ratio=0.6)):
        with pytest.raises(ForeignCache, match="2 codecs, of which 2 are not the model's"):
            lorc_fx.load_cache(path, other)
    same = compiled(build(layers=1), ratio=0.5)
    lorc_fx.load_cache(path, same)
    with torch.no_grad():
        same.model.layers[0].self_attn.v_proj.weight[0, 0] += 1e-3
    with pytest.raises(ForeignCache, match="of which 1 are not"):
        lorc_fx.load_cache(path, same)


def test_a_cache_of_weights_that_were_written_since_is_not_of_these(tmp_path):
    """At full rank a codec's matrix is the weight itself, so its content alone would say that nothing has changed."""
    model = compiled(FAMILIES["llama-gqa"].build(layers=1), ratio=1.0)
    cache, path = begun(model, new_cache(model)), tmp_path / "a.cache"
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    lorc_fx.save_cache(cache, path)
    with pytest.raises(ForeignCache, match="of which 1 are not"):
        lorc_fx.load_cache(path, model)


def test_weights_put_back_and_codecs_made_again(tmp_path, many_shapes):
    """The digest is of the content: a codec that is made again is the one that wrote the cache."""
    model = compiled(FAMILIES["llama-gqa"].build(layers=1), ratio=0.5)
    cache, path, more = begun(model, new_cache(model)), tmp_path / "a.cache", prompt(2, 2, seed=5)[0]
    lorc_fx.save_cache(cache, path)
    want = steps(model, copy.deepcopy(cache), more)
    lorc_fx.reset(model)
    loaded = lorc_fx.load_cache(path, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        for goes_on in (cache, loaded):
            assert torch.equal(steps(model, goes_on, more), want)
            latents(goes_on)


BROKEN = {
    "missing": (lambda p: p.unlink(), "cannot be read"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "cannot be read"),
    "no cache": (lambda p: save_file({"x": torch.ones(1)}, p), "no cache of version"),
    "another version": (lambda p: save_file({"x": torch.ones(1)}, p, {"lorc_fx_cache": "9"}), "'9'"),
    "text": (lambda p: p.write_text("hello, this is a text"), "cannot be read"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files(how, tmp_path):
    path, (spoil, reason) = tmp_path / "a.cache", BROKEN[how]
    lorc_fx.save_cache([torch.ones(20)], path)
    spoil(path)
    with pytest.raises(BadCacheFile, match=reason):
        lorc_fx.load_cache(path, torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "tree", ["[", '{"tensor": "tensor7"}', '{"object": "Path", "state": {}}', '{"latent": 3}', '{"x": 1}']
)
def test_headers_that_make_no_sense(tree, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "a", {"lorc_fx_cache": "1", "tree": tree, "latents": "[]"})
    with pytest.raises(BadCacheFile):
        lorc_fx.load_cache(tmp_path / "a", torch.nn.Linear(1, 1))


def test_what_is_no_cache_is_not_written(tmp_path):
    with pytest.raises(BadCacheFile, match="holds a Linear"):
        lorc_fx.save_cache([torch.nn.Linear(1, 1)], tmp_path / "a")
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys, torch
sys.path[:0] = [{tests!r}]
from pathlib import Path
import lorc_fx
from conftest import torch as _
from families import FAMILIES
from helpers import compiled
from test_cache_file import begun, new_cache, prompt, steps
from torch._dynamo.utils import counters
here = Path({here!r})
model = FAMILIES[{name!r}].build(layers=FAMILIES[{name!r}].fewest)
compiled(model, plan=str(here / "plan.json"))
cache = lorc_fx.load_cache(here / "a.cache", model)
torch.save([steps(model, cache, prompt(2, 3, seed=5)[0]), counters["stats"]["unique_graphs"]], here / "out.pt")
"""


@pytest.mark.parametrize(
    ("name", "kind"), [("gemma3", "dynamic"), pytest.param("gemma3", "static", marks=pytest.mark.slow)]
)
def test_in_another_process(name, kind, tmp_path):
    """Prompts of the first process were never run in the second: its codecs come of the saved plan."""
    model = FAMILIES[name].build(layers=FAMILIES[name].fewest)
    known = lorc_fx.calibrate(model, [prompt(2, 40)[0]])
    given = options(calibration=known, ratio=0.4)
    plan = lorc_fx.make_plan(model, prompt(2, 9)[0], options=given, **{cache_name(model): new_cache(model, kind)})
    plan.save(tmp_path / "plan.json")
    compiled(model, plan=str(tmp_path / "plan.json"))
    cache = begun(model, new_cache(model, kind))
    lorc_fx.save_cache(cache, tmp_path / "a.cache")
    assert any(t.dtype == torch.uint8 for t in load_file(tmp_path / "a.cache").values())
    torch._dynamo.reset()
    counters.clear()
    want = steps(model, cache, prompt(2, 3, seed=5)[0])
    graphs = counters["stats"]["unique_graphs"]
    script = SCRIPT.format(tests=str(Path(__file__).parent), here=str(tmp_path), name=name)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, cwd=tmp_path)  # not our sources' folder
    got, compiles = torch.load(tmp_path / "out.pt")
    assert torch.equal(got, want)
    assert compiles <= graphs + 1, "the trace that made the codecs, and no more than the saved cache costs"
