"""Caches kept as they are (basis "identity"): rows hold what the dense cache would, at lower precision, read without
decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from oracle import coded_cache, coded_oracle

import lorc_fx
from helpers import (
    assert_close,
    assert_tokens,
    cache_name,
    compiled,
    generate,
    latents,
    new_cache,
    piecewise,
    prompt,
    some,
)
from lorc_fx import errors
from lorc_fx.allocate import distortion
from lorc_fx.codec import Basis, as_it_reads, flat_basis, identity_codec, turning
from lorc_fx.options import Options
from lorc_fx.packing import Segment
from lorc_fx.passes.unprojected import as_it_is
from lorc_fx.report import examined

TOKENS, NEW = 9, 3
BOTH = {"basis": "identity", "calibration": "none", "scheduler": "uniform"}
INT8 = {**BOTH, "precision": "int8", "ratio": 0.3}
KEYS = {**BOTH, "basis": ("identity", "joint"), "precision": "auto", "ratio": 0.45}
FEW = ("llama-gqa", "qwen3", "gemma3", "gpt2", "gpt-neox", "falcon-mqa", "mistral-window")

BOTH_KINDS = some(
    [(name, kind) for name in FEW for kind in ("dynamic", "static")],
    [*((name, "dynamic") for name in FEW), ("llama-gqa", "static"), ("gpt2", "static")],
)


def run(model: Any, pad: int = 3, kind: str = "dynamic") -> Any:
    ids, mask = prompt(2, TOKENS, pad)
    return generate(model, ids, mask, new_cache(model, kind, TOKENS + NEW), new=NEW)


def coded(cache: Any) -> list[Any]:
    return [x for pair in latents(cache) for x in pair]


@pytest.mark.parametrize(("name", "kind"), BOTH_KINDS)
def test_in_the_models_precision_it_is_the_dense_cache(name, kind, clean, many_shapes):
    model = FAMILIES[name].build(layers=2)
    truth = copy.deepcopy(model)
    got, want = run(compiled(model, **BOTH, precision="model", ratio=1.0), 3, kind), run(truth, 3, kind)
    assert_tokens("tokens", got.sequences, want.sequences)
    assert_close("logits", got.logits, want.logits, 1e-5)
    for x in coded(got.cache):
        assert x.codec.unprojected and x.codec.format.plain and x.positions is None, "positions are in it already"


@pytest.mark.parametrize(("name", "kind"), BOTH_KINDS)
def test_what_is_read_is_what_was_written_to_a_step(name, kind, clean, many_shapes):
    """Of one layer, whose keys and values do not depend on what was read: each token is off by half a step at most, in
    the root mean square over its features."""
    model = FAMILIES[name].build(layers=1)
    truth = copy.deepcopy(model)
    got, want = run(compiled(model, **INT8), 0, kind), run(truth, 0, kind)
    assert_tokens("the texts that are compared", got.sequences, want.sequences)
    for latent, dense in zip(coded(got.cache), _dense(want.cache), strict=True):
        assert latent.codec.format.spec == ((latent.codec.width, 8),)
        kept = latent.dense()[..., : dense.shape[-2], :]
        turned = (dense.transpose(1, 2) @ latent.codec.consts[0]).flatten(2)
        step = turned.abs().amax(-1) / 127.5 * 1.001  # the row's scale clips nothing, or what costs less
        far = (kept - dense).transpose(1, 2).flatten(2).square().mean(-1).sqrt()
        assert bool((far <= step / 2).all()), f"{float((far / step).max()):.2f} steps"


def _dense(cache: Any) -> list[torch.Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2"])
def test_pieces_are_the_whole_prompt(name, clean, many_shapes):
    model = compiled(FAMILIES[name].build(layers=2), **INT8)
    ids = prompt(2, 40)[0]
    whole = piecewise(model, ids, new_cache(model), [40])
    assert_close("logits", piecewise(model, ids, new_cache(model), [20, 37, 38, 40]), whole, 1e-4)


def test_keys_as_they_are_values_projected(clean):
    model = compiled(FAMILIES["llama-gqa"].build(layers=2), **KEYS)
    for keys, values in latents(run(model).cache):
        assert keys.codec.unprojected and not values.codec.unprojected


def test_bytes_are_those_of_the_budget(clean):
    model = FAMILIES["llama-gqa"].build(layers=2)
    ids, mask = prompt(2, TOKENS)
    given = {"attention_mask": mask, cache_name(model): new_cache(model), "use_cache": True}
    report = examined(model, (ids,), given, Options(**INT8))
    assert report.bytes_per_token <= 0.3 * report.bytes_per_token_dense
    assert {s.lowering for s in report.sites} == {"rows"}
    cache = run(compiled(model, **INT8), 0).cache
    assert lorc_fx.cache_nbytes(cache, used=True) == 2 * (TOKENS + NEW - 1) * report.bytes_per_token


def test_a_plan_says_it(clean, tmp_path):
    model = FAMILIES["llama-gqa"].build(layers=2)
    ids, mask = prompt(2, TOKENS)
    given = {"attention_mask": mask, cache_name(model): new_cache(model), "use_cache": True}
    plan = lorc_fx.make_plan(model, ids, options=KEYS, **given)
    assert [s.projected for s in plan.sites] == [s.kind == "value" for s in plan.sites]
    plan.save(tmp_path / "plan.json")
    again = lorc_fx.Plan.load(tmp_path / "plan.json")
    assert again == plan
    for keys, values in latents(run(compiled(model, plan=again)).cache):
        assert keys.codec.unprojected and not values.codec.unprojected


def test_a_saved_cache_is_refused_for_other_weights(clean, tmp_path):
    """Rows that hold plain keys would fit any model: which one they are of is part of the codec."""
    model, other = (FAMILIES["llama-gqa"].build(layers=2, seed=seed) for seed in (0, 1))
    found = run(compiled(model, **INT8))
    lorc_fx.save_cache(found.cache, tmp_path / "cache.safetensors")
    loaded = lorc_fx.load_cache(tmp_path / "cache.safetensors", model)
    for a, b in zip(coded(found.cache), coded(loaded), strict=True):
        assert torch.equal(a.dense(), b.dense())
    run(compiled(other, **INT8))
    with pytest.raises(errors.ForeignCache):
        lorc_fx.load_cache(tmp_path / "cache.safetensors", other)


@pytest.mark.parametrize(("ratio", "kept"), [(0.45, True), (0.24, True), (0.19, False)])
def test_auto_keeps_keys_where_there_are_bytes_for_them(ratio, kept, clean):
    """fp32, two kv heads: 8 bits of 32 for rotary keys and 5 for values are 0.203 of the dense bytes."""
    model = compiled(FAMILIES["llama-gqa"].build(layers=1), basis="auto", precision="auto", calibration="none",
                     scheduler="uniform", ratio=ratio)  # fmt: skip
    ((keys, values),) = latents(run(model).cache)
    assert (keys.codec.unprojected, values.codec.unprojected) == (kept, False)


def test_auto_projects_keys_that_are_read_as_latents(clean):
    model = compiled(FAMILIES["gpt2"].build(layers=1), basis="auto", precision="auto", calibration="none",
                     scheduler="uniform", ratio=0.45)  # fmt: skip
    assert not any(x.codec.unprojected for x in coded(run(model).cache))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 80, 96, 128, 256])
def test_turning_is_orthonormal_and_spreads(size):
    turn = turning(size, False, torch.bfloat16, torch.device("cpu")).double()
    assert_close("turning and back", turn @ turn.T, torch.eye(size, dtype=torch.float64), 1e-6)
    assert float(turn.abs().max()) <= 1.4143 / size**0.5, "no channel weighs more than another"
    for one in (torch.ones(size), torch.eye(size)[0]):
        assert float((one.double() @ turn).abs().max()) <= (0.75 if size > 16 else 1.01) * float(one.norm())
    assert turning(size, False, torch.float32, torch.device("cpu")) is turning(
        size, False, torch.float32, torch.device("cpu")
    )


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_it_is_the_oracle(name, clean, many_shapes):
    """The model whose cache rounds what comes in, written down a second time."""
    model = FAMILIES[name].build(layers=2)
    truth = copy.deepcopy(model)
    cache, ids = new_cache(model), prompt(2, 12)[0]
    got = piecewise(compiled(model, **KEYS), ids, cache, [5, 11, 12])
    pairs = latents(cache)
    want = piecewise(coded_oracle(FAMILIES[name], truth, pairs), ids, coded_cache(truth, pairs), [12])
    assert_close("logits", got, want, 2e-3)  # a rounding at 1e-7 may turn one level over


@pytest.mark.parametrize(
    ("objective", "ratio", "kept"),
    [
        ("balanced", 0.45, (True, False)),
        ("bytes", 0.45, (False, False)),
        ("time", 0.45, (True, True)),
        ("time", 0.25, (True, True)),  # two scales more than a quarter of fp32: values have six bits
        ("time", 0.22, (True, False)),
        ("time", 0.2, (False, False)),
    ],
)
def test_objectives(objective, ratio, kept, clean):
    given = {"basis": "auto", "precision": "auto", "calibration": "none", "scheduler": "uniform"}
    model = compiled(FAMILIES["llama-gqa"].build(layers=1), **given, objective=objective, ratio=ratio)
    ((keys, values),) = latents(run(model).cache)
    assert (keys.codec.unprojected, values.codec.unprojected) == kept


@pytest.mark.parametrize(("name", "kind"), [("llama-gqa", "dynamic"), ("gpt2", "static")])
def test_under_inductor(name, kind, clean):
    """The op reads rows that the same graph has just written in place."""
    given = INT8 if name == "llama-gqa" else {**BOTH, "basis": "joint", "ratio": 0.5}
    model = FAMILIES[name].build(layers=1)
    truth = copy.deepcopy(model)
    got, want = run(compiled(model, **given, inner="inductor"), 3, kind), run(compiled(truth, **given), 3, kind)
    assert_tokens("tokens", got.sequences, want.sequences)
    assert_close("logits", got.logits, want.logits, 1e-4)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_predicted_loss_counts_the_mean_and_every_direction(bits):
    """One scale serves a row, mean included, so what is rounded is as large where the loss is steep as where it is
    flat: predicted and real loss, in the metric of gradients, agree."""
    generator = torch.Generator().manual_seed(bits)
    n, steep = 64, torch.logspace(2, -2, 64, dtype=torch.float64)  # what varies little matters much
    mean = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    y = mean + torch.randn(4096, n, generator=generator, dtype=torch.float64) / steep.sqrt()
    cov = torch.diag(1 / steep)
    root = torch.diag(steep.sqrt())
    values, u = torch.linalg.eigh(root @ cov @ root)
    basis = Basis(root @ u, u.T @ torch.diag(steep.rsqrt()), values, mean[None], informed=True, absolute=True)
    flat = flat_basis(basis)
    decoder = as_it_is(("B", 1, "T", n), torch.float32)
    codec = identity_codec(torch.eye(n), "", (Segment(n, bits),), decoder, torch.float32)
    real = float(((as_it_reads(codec, y) - y).square() * steep).sum(1).mean())
    predicted = float(flat.energy.sum()) * distortion(bits)
    assert 0.7 < predicted / real < 1.5, (predicted, real)
