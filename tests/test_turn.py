"""Keys that are decoded, turned and multiplied in one kernel: it is the reference, it is found behind whatever ops say
that keys are turned, and a compiled model that has it is the one that decodes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle, ranks_of
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from bench.attention_cases import BF16, F16, F32, ROTARY, Case, build, decoder_of
from helpers import Recorder, assert_close, compiled, generate, latents, new_cache, prompt
from lorc_fx.decoder import POSITION, Decoder
from lorc_fx.kernels import fused, native, reference, tiled, tune
from lorc_fx.passes import attention, turns

TOLERANCE = {F32: 1e-5, BF16: 2e-2, F16: 3e-3}
BASE = Case(heads=4, cached=2, dim=16, keys=((16, 8), (8, 4)), values=((16, 8),), rotary="half", turned=True, mean=True)


def by_one_kernel(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """What it gives, and what is right."""
    about, query, keys, values, extras = build(case)
    assert tiled._ways(about, keys, values)[1] == (fused.WAY, fused.WAY), "nothing was turned"
    got = tiled.attend(about, query, keys, values, extras)
    assert got.dtype == query.dtype
    return got.double(), reference.attend(about, query, keys, values, extras)


TABLE: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1},
    "seven": {"tokens": 7, "queries": 3},
    "a run and one": {"tokens": 65},
    "many": {"tokens": 2049, "batch": 1},
    "seven queries of a head": {"heads": 7, "cached": 1},
    "no groups": {"heads": 2, "queries": 16},
    "wide heads": {"dim": 80, "keys": ((96, 8), (32, 4))},
    "256": {"dim": 256, "cached": 1, "keys": ((64, 5), (64, 3))},
    "odd heads": {"dim": 6, "keys": ((8, 8), (4, 4))},
    "in groups": {"groups": 2},
    "groups of two heads": {"heads": 8, "cached": 4, "groups": 2},
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": F16},
    "plain": {"keys": ((13, 0),)},
    "plain bf16": {"keys": ((13, 0),), "dtype": BF16},
    "exact and levels": {"keys": ((3, 0), (24, 8))},
    "exact and levels in bf16": {"keys": ((3, 0), (24, 8)), "dtype": BF16},
    "6 5 3": {"keys": ((8, 6), (16, 5), (8, 3))},
    "8 4 2 1": {"keys": ((8, 8), (8, 4), (8, 2), (8, 1))},
    "two means": {"means": 2},
    "two means in groups and bf16": {"means": 2, "groups": 2, "dtype": BF16},
    "no mean": {"mean": False},
    "a mask": {"scores": "bool"},
    "a row that sees nothing": {"scores": "hidden"},
    "a free end": {"scores": "free", "tokens": 200},
    "a bias per head, a sink": {"scores": "alibi", "sink": True},
    "interleaved": {"rotary": "interleaved"},
    "complex": {"rotary": "complex"},
    "partial": {"rotary": "partial"},
    "looked up": {"rotary": "table"},
    "own": {"rotary": "own"},
    "normed": {"norm": "rms"},
    "normed, in groups, bf16": {"norm": "rms", "groups": 2, "dtype": BF16},
    "normed and interleaved, 256": {"norm": "rms", "rotary": "interleaved", "dim": 256, "keys": ((64, 5), (64, 3))},
    "values by runs": {"heads": 32, "values": ((40, 5), (120, 4), (88, 3), (8, 2))},
    "values by runs, two means": {"heads": 32, "means": 2, "values": ((40, 5), (88, 3), (8, 2)), "dtype": BF16},
}


@pytest.mark.parametrize("name", TABLE)
def test_it_is_the_reference(name: str) -> None:
    case = replace(BASE, **TABLE[name])
    got, want = by_one_kernel(case)
    assert_close("out", got, want, TOLERANCE[case.dtype])


EIGHTS = st.integers(1, 5).map(lambda n: 8 * n)


@settings(max_examples=60)
@given(
    made=st.builds(
        replace,
        st.just(BASE),
        tokens=st.integers(1, 140),
        batch=st.integers(1, 3),
        queries=st.integers(1, 5),
        cached=st.sampled_from([2, 4]),
        heads=st.sampled_from([4, 12, 20]),
        dim=st.sampled_from([2, 8, 10, 16, 34]),
        keys=st.lists(st.sampled_from([8, 6, 5, 4, 3, 2, 1]), min_size=1, max_size=4, unique=True).flatmap(
            lambda bits: st.tuples(*[st.tuples(EIGHTS, st.just(b)) for b in sorted(bits, reverse=True)])
        ),
        values=st.sampled_from([((16, 8),), ((40, 5), (120, 4), (88, 3), (8, 2))]),
        groups=st.sampled_from([1, 2]),
        means=st.integers(1, 2),
        mean=st.booleans(),
        rotary=st.sampled_from(["half", "interleaved"]),
        norm=st.sampled_from([None, "rms"]),
        scores=st.sampled_from(["none", "bool", "add", "cap"]),
        sink=st.booleans(),
        seed=st.integers(0, 1000),
    )
)
def test_any_shape(made: Case) -> None:
    about, query, keys, values, extras = build(made)
    got = tiled.attend(about, query, keys, values, extras, 16)
    assert_close("out", got.double(), reference.attend(about, query, keys, values, extras), 2e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_heads_and_tokens(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, want = by_one_kernel(replace(BASE, tokens=333, groups=2))
    finally:
        torch.set_num_threads(before)
    assert_close("out", got, want, 1e-5)


@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (100, 3), (20, 2)])
def test_a_tuner_has_them_at_any_size(tokens: int, batch: int) -> None:
    made = tune.Problem(*build(replace(BASE, norm="rms"))).at(tokens, batch)
    given = made.about, made.query, made.keys, made.values, made.extras
    assert made.tokens == tokens and made.batch == batch
    assert_close("out", tiled.attend(*given, 64).double(), reference.attend(*given), 1e-5)


def test_without_a_compiler_it_is_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    about, query, keys, values, extras = build(replace(BASE, norm="rms"))
    monkeypatch.setattr(native, "library", lambda: None)
    assert fused.WAY not in tiled._ways(about, keys, values)[1]
    got = tiled.attend(about, query, keys, values, extras)
    assert_close("out", got.double(), reference.attend(about, query, keys, values, extras), 1e-5)


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rotary", "dtype"),
    [(r, d) for r in ROTARY if r != "kept" for d in (F32, BF16, F16) if (r, d) != ("complex", F16)],
)
def test_every_form_is_found(rotary: str, dtype: torch.dtype) -> None:
    """But complex numbers in fp16, whose products are rounded in another order: these are found, or they are not."""
    decoder, consts = decoder_of(rotary, None, 2, 16, dtype)
    found = turns.find(decoder, consts, 2, 16)
    assert found is not None and found.norm is None
    assert found.turn.pairs == (2 if rotary == "partial" else 8)
    assert sorted(found.turn.dims) == list(range(16)) and sorted(found.turn.sources) == list(range(32))
    assert bool(found.angles) == (rotary != "own")


@pytest.mark.parametrize("rotary", ["half", "interleaved", "table", "complex"])
def test_a_norm_before_it_is_found(rotary: str) -> None:
    decoder, consts = decoder_of(rotary, "rms", 2, 16, F32)
    found = turns.find(decoder, consts, 2, 16)
    assert found is not None and found.norm is not None
    assert found.turn.eps == 1e-6


def of(function: Any, heads: int = 2, dim: int = 8, dtype: torch.dtype = F32) -> Decoder:
    given = torch.zeros(2, 3, heads * dim, dtype=dtype), torch.zeros(2, 3, dtype=torch.int32)
    graph = make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(*given).graph  # of torch's ops, as models are
    for node, name in zip(graph.find_nodes(op="placeholder"), ["y", "positions"], strict=True):
        node.name = name
    made = GraphModule(torch.nn.Module(), graph)
    return Decoder(made, heads * dim, ("B", heads, "T", dim), dtype, POSITION, "made up")


def _halves(y: torch.Tensor, positions: torch.Tensor, heads: int = 2) -> tuple[torch.Tensor, ...]:
    x = y.view(y.shape[0], y.shape[1], heads, -1).transpose(1, 2)
    angle = torch.stack([positions.float()[:, None] * by for by in (1.0, 0.5, 0.25, 0.125)], -1)
    return x[..., :4], x[..., 4:], angle.cos(), angle.sin()


def turns_all(y: Any, positions: Any) -> Any:
    a, b, cos, sin = _halves(y, positions)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def clamped(y: Any, positions: Any) -> Any:
    return turns_all(y.clamp(-50, 50), positions)


def stretched(y: Any, positions: Any) -> Any:
    a, b, cos, sin = _halves(y, positions)
    return torch.cat([a * cos - b * sin, b * cos + 2 * a * sin], -1)


def shifted(y: Any, positions: Any) -> Any:
    return turns_all(y, positions) + 0.001


def thirds(y: Any, positions: Any) -> Any:
    a, b, cos, sin = _halves(y, positions)
    return torch.cat([a * cos - b * sin, b * cos + a * sin + 0.1 * a.roll(1, -1)], -1)


def heads_apart(y: Any, positions: Any) -> Any:
    a, b, cos, sin = _halves(y, positions)
    sign = 1 - 2 * torch.arange(2)[:, None, None]
    return torch.cat([a * cos - b * sin * sign, b * cos + a * sin * sign], -1)


def squared(y: Any, positions: Any) -> Any:
    return turns_all(y * y.abs(), positions)


def longer_far_away(y: Any, positions: Any) -> Any:
    return turns_all(y, positions) * torch.where(positions >= 8192, 2.0, 1.0)[:, None, :, None]


def stretched_far_away(y: Any, positions: Any) -> Any:
    far = positions[:, None, :, None] >= 8192
    return torch.where(far, stretched(y, positions), turns_all(y, positions))


def test_what_is_another_beyond_a_length() -> None:
    """Cosines are not taken from where they are those of near positions alone."""
    near, found = turns.find(of(turns_all), (), 2, 8), turns.find(of(longer_far_away), (), 2, 8)
    assert near is not None and near.angles
    assert found is not None and not found.angles
    assert turns.find(of(stretched_far_away), (), 2, 8) is None


def test_what_is_no_turn_is_none() -> None:
    assert turns.find(of(turns_all), (), 2, 8) is not None
    for other in (clamped, stretched, shifted, thirds, heads_apart, squared):
        assert turns.find(of(other), (), 2, 8) is None, other.__name__
    assert turns.find(of(turns_all), (torch.zeros(2, dtype=torch.int64),), 4, 4) is None
    for norm in ("layer", "l2"):
        decoder, consts = decoder_of("half", norm, 2, 16, F32)
        assert turns.find(decoder, consts, 2, 16) is None, norm


# -- models -----------------------------------------------------------------------------------------------------------

TOKENS, NEW = 9, 3
MODELS = ["llama-gqa", "llama-bias", "qwen3", "gemma3", "gemma2", "gpt-neox", "phi3", "mistral-window", "falcon-gqa"]


class Watched(Recorder):
    """How many tables and readers the last graph has."""

    def counts(self) -> tuple[int, int]:
        names = [str(node.target) for node in self.graphs[-1].graph.nodes]
        return sum("lorc.table" in n for n in names), sum("lorc.attend" in n for n in names)


def run(model: Any, pad: int, kind: str) -> Any:
    ids, mask = prompt(2, TOKENS, pad)
    return generate(model, ids, mask, new_cache(model, kind, TOKENS + NEW), new=NEW)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_turns_is_the_one_that_decodes(
    name: str, kind: str, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"ratio": 0.5, "basis": "joint", "precision": "auto", "calibration": "none"}
    model, watched = FAMILIES[name].build(), Watched()
    other = copy.deepcopy(model)
    got = {pad: run(compiled(model, inner=watched, **given), pad, kind) for pad in (0, 3)}
    tables, readers = watched.counts()
    formats = [(key.codec.format, value.codec.format) for key, value in latents(got[0].cache)]
    assert readers == sum(not (key.plain and value.plain) for key, value in formats) > 0, "keys are decoded"
    if kind == "dynamic" and name in ("llama-gqa", "qwen3"):
        assert tables == 1, "each layer has angles of its own"
    monkeypatch.setattr(attention, "_turning", lambda *_: None)
    plain = Watched()
    compiled(other, inner=plain, **given)
    for pad, found in got.items():
        assert_close(f"logits after {pad} padded tokens", found.logits, run(other, pad, kind).logits, 2e-5)
    assert plain.counts()[1] == 0


def test_a_model_of_exact_rows_is_the_oracle(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in the model's dtype, where the op reads those too."""
    monkeypatch.setattr(attention, "PLAIN", True)
    model, watched = FAMILIES["qwen3"].build(), Watched()
    truth = copy.deepcopy(model)
    got = run(compiled(model, ratio=0.5, scheduler="uniform", inner=watched), 3, "dynamic")
    assert watched.counts()[1] == len(latents(got.cache))
    want = run(oracle(FAMILIES["qwen3"], truth, ranks_of(got.cache)), 3, "dynamic")
    assert_close("logits", got.logits, want.logits, 1e-5)
