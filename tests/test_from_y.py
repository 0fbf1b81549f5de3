"""Codes made of what the projection gives (``Codec.from_y``) instead of what it takes: where that is less to read, and
the same cache either way."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import coded_cache, coded_oracle
from test_bounds_codecs import decoder

from helpers import assert_close, compiled, error, latents, new_cache, piecewise, prompt, some
from lorc_fx import codec as codec_module
from lorc_fx.codec import grouped_prior, make_codec, reads_y
from lorc_fx.factors import gram
from lorc_fx.groups import compact, joined, projected, split
from lorc_fx.kernels import pack as by_op
from lorc_fx.packing import MODEL, Format, Segment

TOKENS = 12


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packed site makes its codes of y."""
    monkeypatch.setattr(codec_module, "reads_y", lambda shape, form, groups: not form.plain)


FEW = ("llama-gqa", "llama-bias", "qwen3", "phi3", "gpt2", "gpt-neox", "gemma3")
CASES = [(name, basis, kind) for name in FEW for basis in ("joint", "grouped") for kind in ("dynamic", "static")]


@pytest.mark.usefixtures("quiet", "many_shapes", "always")
@pytest.mark.parametrize(
    ("name", "basis", "kind"),
    some(CASES, [(name, ("joint", "grouped")[i % 2], ("dynamic", "static")[i // 2 % 2]) for i, name in enumerate(FEW)]),
)
def test_it_is_the_oracle(name: str, basis: str, kind: str) -> None:
    family = FAMILIES[name]
    model = family.build(layers=2)
    truth = copy.deepcopy(model)
    ids, cache = prompt(2, TOKENS)[0], new_cache(model, kind, TOKENS)
    options = {"basis": basis, "calibration": "none", "scheduler": "energy", "precision": "auto"}
    got = piecewise(compiled(model, **options, ratio=0.3), ids, cache, [5, 11, TOKENS])
    pairs = latents(cache)
    codecs = [x.codec for pair in pairs for x in pair]
    assert all(c.from_y for c in codecs if not (c.format.plain or c.unprojected)) and any(c.from_y for c in codecs)
    want = piecewise(coded_oracle(family, truth, pairs), ids, coded_cache(truth, pairs), [TOKENS])
    assert_close("logits", got, want, 2e-3)  # a rounding at 1e-7 may turn one level over


@pytest.mark.usefixtures("quiet", "many_shapes", "always")
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_with_statistics(name: str) -> None:
    """The first prompt gives bases; then the model is one function."""
    family = FAMILIES[name]
    model = family.build(layers=2)
    truth = copy.deepcopy(model)
    ids = prompt(2, 160)[0]
    compiled(model, basis="grouped", ratio=0.13, precision="auto", scheduler="loss", calibration="first-prompt")
    piecewise(model, ids, new_cache(model), [160])
    cache = new_cache(model)
    got = piecewise(model, ids, cache, [100, 159, 160])
    pairs = latents(cache)
    codecs = [x.codec for pair in pairs for x in pair if not x.codec.unprojected]
    assert codecs and all(c.from_y for c in codecs)
    want = piecewise(coded_oracle(family, truth, pairs), ids, coded_cache(truth, pairs), [160])
    assert_close("logits", got, want, 5e-3)


@pytest.mark.usefixtures("quiet", "many_shapes", "always")
@pytest.mark.parametrize("name", ["llama-bias", "gpt2"])
def test_where_no_op_packs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices without ``lorc::pack`` torch ops make the same codes."""
    ids, found = prompt(2, TOKENS)[0], []
    for devices in (by_op.DEVICES, ()):
        monkeypatch.setattr(by_op, "DEVICES", devices)
        model = FAMILIES[name].build(layers=2)
        cache = new_cache(model)
        compiled(model, ratio=0.4, calibration="none", scheduler="energy", precision="auto", basis="grouped")
        found.append(piecewise(model, ids, cache, [5, 11, TOKENS]))
        assert any(x.codec.from_y for pair in latents(cache) for x in pair)
    assert_close("logits", *found, 2e-3)


@pytest.mark.usefixtures("quiet", "many_shapes")
@pytest.mark.parametrize("name", ["falcon-gqa", "falcon-mqa", "bloom", "opt"])
def test_it_is_what_codes_of_x_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, where y loses nothing; of layouts for which there is no oracle."""
    ids, found = prompt(2, TOKENS)[0], []
    for of_y in (True, False):
        monkeypatch.setattr(codec_module, "reads_y", lambda shape, form, groups, of_y=of_y: of_y and not form.plain)
        model = FAMILIES[name].build(layers=2)
        cache = new_cache(model)
        compiled(model, ratio=0.4, calibration="none", scheduler="energy", precision="auto", basis="grouped")
        found.append(piecewise(model, ids, cache, [5, 11, TOKENS]))
        assert any(x.codec.from_y for pair in latents(cache) for x in pair) == of_y
    assert_close("logits", *found, 2e-3)


@pytest.mark.usefixtures("quiet", "many_shapes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of y lose what y in 16 bits has lost, no more: the model is as near to the dense one as with P^T W."""
    family = FAMILIES["llama-gqa"]
    plain = family.build(layers=2).to(dtype)
    ids = prompt(2, 40)[0]
    dense = piecewise(copy.deepcopy(plain), ids, new_cache(plain), [30, 40])
    off = []
    for of_y in (True, False):
        monkeypatch.setattr(codec_module, "reads_y", lambda *_, of_y=of_y: of_y)
        model = copy.deepcopy(plain)
        compiled(model, ratio=0.8, precision="int8", calibration="none", scheduler="uniform")
        cache = new_cache(model)
        off.append(error(piecewise(model, ids, cache, [30, 40]), dense))
        found = [x.codec for pair in latents(cache) for x in pair if not x.codec.unprojected]
        assert {c.from_y for c in found} == {of_y}
    assert off[0] <= 1.5 * off[1] + 1e-3, off


class Twice(torch.nn.Module):
    """Two products, which are rounded apart: their sum may be far smaller."""

    def __init__(self, first: torch.nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, copy.deepcopy(first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.usefixtures("quiet", "always")
def test_not_where_y_is_more_than_one_product() -> None:
    """The bounds on y's own rounding are those of one."""
    model = FAMILIES["llama-gqa"].build(layers=2)
    attention = model.model.layers[1].self_attn
    attention.v_proj = Twice(attention.v_proj)
    cache = new_cache(model)
    compiled(model, ratio=0.4, calibration="none", scheduler="energy", precision="auto")
    piecewise(model, prompt(2, TOKENS)[0], cache, [5, TOKENS])
    (_, once), (_, twice) = latents(cache)
    assert not (once.codec.unprojected or once.codec.format.plain or twice.codec.format.plain)
    assert once.codec.from_y and not twice.codec.from_y


def test_where_it_is_less_to_read() -> None:
    packed, half = Format((Segment(1024, 4),), 2, torch.bfloat16), Format((Segment(512, 4),), 2, torch.bfloat16)
    assert reads_y((1024, 4096), packed, 8), "Llama-3-8B, all columns at 4 bits"
    assert reads_y((1024, 4096), packed, 1), "a joint basis of as many: 12 MiB for 16"
    assert not reads_y((1024, 4096), half, 1) and not reads_y((1024, 1024), packed, 1)
    assert not reads_y((1024, 4096), Format((Segment(1024, MODEL),), 1, torch.bfloat16), 8), "W as it is"
    assert reads_y((1024, 1024), Format((Segment(1024, 4),), 2, torch.float32), 16), (
        "a tenth more, and a copy of W less"
    )
    assert not reads_y((1024, 1024), Format((Segment(1024, 4),), 2, torch.float32), 8)


def test_a_codec_says_what_it_is_of() -> None:
    """``folded`` is the same map of x, digests and signatures differ, and its own bytes are few."""
    n, d, heads = 32, 64, 4
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(n, d, generator=g), torch.randn(n, generator=g)
    basis = grouped_prior(gram(weight, "w"), bias, heads)
    basis = replace(basis, means=torch.randn(2, n, generator=g, dtype=torch.float64))
    form = (Segment(16, 8), Segment(8, 4))
    given = (weight, bias, basis, form, decoder(heads, n // heads, torch.bfloat16), (), torch.bfloat16)
    of_x, of_y = make_codec(*given), make_codec(*given, from_y=True)
    assert of_y.from_y and not of_x.from_y and of_x.signature != of_y.signature and not of_x.equals(of_y)
    assert of_y.encode.shape == (7, n) and of_y.latent_width == of_x.latent_width == 25
    assert of_y.nbytes() < of_x.nbytes() / 2
    for a, b in zip(of_x.folded(weight, bias), of_y.folded(weight, bias), strict=True):
        assert_close("what x meets", a, b, 1e-5)


@settings(max_examples=100)
@given(
    groups=st.integers(1, 4),
    counts=st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0, 8, 5, 4, 3, 2, 1])), min_size=1, max_size=3),
    size=st.integers(1, 40),
    tokens=st.sampled_from([1, 2, 5, by_op.TOKENS, by_op.TOKENS + 1]),
    choices=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shifted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rows_of_y_are_those_of_its_latents(
    groups: int, counts: Any, size: int, tokens: int, choices: int, dtype: torch.dtype, shifted: bool, seed: int
) -> None:
    """Small whole numbers, whose sums are exact in any order: the same bytes from C++ and from torch."""
    g = torch.Generator().manual_seed(seed)
    bits = sorted({b for _, b in counts}, key=lambda b: -b or -99)
    segments = tuple(Segment(groups * {b: c for c, b in counts}[b], b) for b in bits)
    form = Format(segments, choices, dtype)
    whole = lambda *shape: torch.randint(-3, 4, shape, generator=g).float()  # noqa: E731
    y = whole(tokens, 2, groups * size).to(dtype)
    project = whole(form.columns // groups + choices - 1, groups * size)
    shift = whole(form.columns + choices - 1) if shifted else None
    offsets = whole(choices, form.columns) if choices > 1 else None
    latent = projected(y, project, shift, form.spec, groups)
    assert latent.shape == (tokens, 2, form.columns + choices - 1)
    spread = torch.ones(form.columns)
    got = by_op.pack(y, offsets, spread, form, project, shift, groups)
    read = by_op.unpack(got, form)  # zeros may have either sign
    assert torch.equal(read, by_op.unpack(by_op.pack(latent, offsets, spread, form), form))
    both = by_op.pack_all(
        [by_op.Given(latent, offsets, spread, form), by_op.Given(y, offsets, spread, form, project, shift, groups)]
    )
    assert torch.equal(both[1], got) and torch.equal(by_op.unpack(both[0], form), read)


@settings(max_examples=50)
@given(groups=st.integers(1, 5), columns=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_columns_are_joined_as_they_were_split(groups: int, columns: list[int], seed: int) -> None:
    segments = [(groups * c, 4) for c in columns]
    g = torch.Generator().manual_seed(seed)
    row = torch.randn(3, sum(c for c, _ in segments), generator=g)
    assert torch.equal(joined(split(row, segments, groups), segments), row)
    whole = torch.block_diag(
        *torch.randn(groups, sum(columns), 7, generator=g).unbind()
    )  # [r, n], one group after the other
    rows = joined(torch.arange(len(whole)).view(groups, -1), segments)
    matrix = compact(whole[rows], segments, groups)
    y = torch.randn(2, groups * 7, generator=g)
    assert_close("products", projected(y, matrix, None, segments, groups), y @ whole[rows].T, 1e-5)
