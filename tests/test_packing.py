"""Rows of bytes: what goes in comes out, as near as its bits promise, in as many bytes as planned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_fx.packing import (
    BITS,
    CLIPS,
    MODEL,
    SNAP,
    STEPS,
    TINY,
    Format,
    Segment,
    dequantise,
    pack,
    quantise,
    segment_bytes,
    unpack,
)
from lorc_fx.rows import unwritten

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def formats(draw):
    """Segments by falling precision, of any size."""
    bits = [b for b in (MODEL, *BITS) if draw(st.booleans())] or [draw(st.sampled_from((MODEL, *BITS)))]
    segments = tuple(Segment(draw(st.integers(1, 40)), b) for b in bits)
    return Format(segments, draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES)))


def latent_of(form, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    latent = scale * torch.randn(3, 2, form.columns + form.choices - 1, generator=g)
    offsets = torch.randn(form.choices, form.columns, generator=g)
    offsets[0] = 0
    return latent.to(form.dtype), offsets.to(form.dtype) if form.choices > 1 else None


def scale_in(rows, form):
    """The scale that rows hold, [.., 1] fp32."""
    at = sum(s.columns for s in form.segments if s.bits == MODEL) * form.dtype.itemsize
    return rows[..., at : at + 2].view(torch.float16).float().abs()


def nearest(latent, form):
    """Index of the nearest mean, and one-hot of the further ones."""
    scores = torch.cat([torch.zeros_like(latent[..., :1]), latent[..., form.columns :]], -1).float()
    index = scores.argmax(-1)
    return index, torch.nn.functional.one_hot(index, form.choices)[..., 1:]


@settings(max_examples=80)
@given(form=formats(), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_rows_hold_what_they_promise(form, seed, scale):
    latent, offsets = latent_of(form, seed, scale)
    rows = pack(latent, offsets, None, form.spec, form.choices, form.dtype)
    assert rows.dtype == torch.uint8 and rows.shape == (3, 2, form.nbytes)
    found = unpack(rows, form.spec, form.choices, form.dtype)
    assert found.shape == latent.shape and found.dtype == form.dtype
    index, further = nearest(latent, form)
    assert torch.equal(found[..., form.columns :].long(), further)
    values = latent[..., : form.columns].float()
    if offsets is not None:
        gap = offsets.float()[index]
        values = values - gap
        near = values.norm(dim=-1) <= SNAP * torch.finfo(form.dtype).eps * gap.norm(dim=-1)
        values = torch.where(near[..., None], 0.0, values)
    at = 0
    for columns, bits in form.segments:
        want, got = values[..., at : at + columns], found[..., at : at + columns].float()
        at += columns
        rounding = torch.finfo(form.dtype).eps
        if bits == MODEL:
            assert torch.equal(got, want.to(form.dtype).float())
            continue
        step, half = scale_in(rows, form) * STEPS[bits], 1 << (bits - 1)
        excess = (want.abs() - half * step).clamp_min(0)
        assert bool(((got - want).abs() <= excess + step * 0.5001 + rounding * (want.abs() + half * step)).all())


@settings(max_examples=60)
@given(form=formats(), seed=st.integers(0, 2**31), heavy=st.booleans())
def test_the_scale_is_the_best_of_the_ladder(form, seed, heavy):
    """No other candidate has less squared error in the columns' own units; the first clips nothing."""
    quantised = [s for s in form.segments if s.bits != MODEL]
    if not quantised:
        return
    g = torch.Generator().manual_seed(seed)
    k = sum(s.columns for s in quantised)
    values, spread = torch.randn(5, k, generator=g), torch.rand(k, generator=g) + 0.01
    values = values**3 if heavy else values
    steps = torch.cat([torch.full((s.columns,), STEPS[s.bits]) for s in quantised])
    half = torch.cat([torch.full((s.columns,), 2.0 ** (s.bits - 1)) for s in quantised])

    def error(scale):
        levels = ((values / (scale * steps)).floor()).clamp(-half, half - 1) + half
        return ((dequantise(levels, scale * steps, half) - values) * spread).square().sum(-1)

    levels, scale = quantise(values, form.segments, spread)
    assert bool((levels >= 0).all()) and bool((levels < 2 * half).all())
    largest = (values.abs() / (steps * half)).amax(-1, keepdim=True)
    for clip in CLIPS:
        assert bool((error(scale.float()) <= error((largest * clip).half().float()) * (1 + 1e-5)).all())
    whole = (largest.half().float() * steps * half) * (1 + 2**-10)
    assert bool((values.abs() <= whole).all()), "the first candidate clips nothing (but what fp16 rounds off)"


@pytest.mark.parametrize("bits", BITS)
def test_every_level_survives_packing(bits):
    """What is read back is what was rounded to, to the bit, in every place of a byte."""
    half = 1 << (bits - 1)
    levels = torch.arange(1 << bits).repeat(3)[: (1 << bits) + 3]
    scale = torch.tensor(0.5).half().float()
    values = dequantise(levels, scale * STEPS[bits], half)[None]
    values[0, 0] = -half * STEPS[bits] * scale  # the edge of the outermost level, so that the scale is this one
    form = Format((Segment(values.shape[-1], bits),), 1, torch.float32)
    found = unpack(pack(values, None, None, form.spec, 1, form.dtype), form.spec, 1, torch.float32)
    levels, scale = quantise(values, form.segments)  # with few bits a clipped scale may have less error
    assert torch.equal(found, dequantise(levels, scale.float() * STEPS[bits], half))
    assert len(found.unique()) <= 1 << bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 7, 8, 16, 63, 256])
def test_bytes_are_what_the_bits_need(bits, columns):
    form = Format((Segment(columns, bits),), 1, torch.bfloat16)
    exact = columns * bits / 8
    assert exact <= segment_bytes(columns, bits, 2) < exact + 2
    assert form.nbytes - segment_bytes(columns, bits, 2) in (2, 3)


def test_one_scale_serves_all_columns():
    """Two bytes per row, however many precisions."""
    form = Format(tuple(Segment(8, b) for b in BITS), 1, torch.bfloat16)
    assert form.nbytes == sum(BITS) + 2 + sum(BITS) % 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("segments", "choices"),
    [(s, c) for s in (((4, 8),), ((3, MODEL), (5, 2))) for c in (1, 2, 3)] + [(((4, MODEL),), c) for c in (2, 3)],
)
def test_a_written_row_is_never_taken_for_an_empty_one(segments, choices, dtype):
    """Even a token that lies exactly on its mean: its scale is TINY, or its index is not zero."""
    form = Format(tuple(Segment(*s) for s in segments), choices, dtype)
    assert not form.plain
    latent = torch.zeros(2, 1, form.columns + choices - 1, dtype=dtype)
    offsets = torch.zeros(choices, form.columns, dtype=dtype) if choices > 1 else None
    rows = pack(latent, offsets, None, form.spec, choices, form.dtype)
    assert not bool(unwritten(rows).any())
    assert bool(unwritten(torch.zeros_like(rows)).all())
    assert bool((unpack(rows, form.spec, choices, dtype).abs() <= 128 * TINY).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_on_a_mean_is_stored_as_lying_there(dtype):
    """Up to the rounding of a product of the mean's size, which says nothing."""
    form = Format((Segment(16, 4),), 2, dtype)
    mean = 100 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    offsets = torch.stack([torch.zeros(16), mean]).to(dtype)
    rounded = offsets[1].float() * (1 + torch.finfo(dtype).eps)
    latent = torch.cat([rounded, torch.ones(1)]).to(dtype)[None]
    found = unpack(pack(latent, offsets, None, form.spec, 2, form.dtype), form.spec, 2, dtype)
    assert bool((found[..., :16].abs() <= 8 * TINY).all()) and float(found[0, 16]) == 1
    far = torch.cat([rounded * 1.5, torch.ones(1)]).to(dtype)[None]
    found = unpack(pack(far, offsets, None, form.spec, 2, form.dtype), form.spec, 2, dtype)
    assert float(found[..., :16].abs().max()) > 1


def test_more_bits_lose_less():
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    errors = []
    for bits in BITS:
        levels, scale = quantise(values, [(32, bits)])
        found = dequantise(levels, scale.float() * STEPS[bits], 1 << (bits - 1))
        errors.append(float((found - values).square().sum()))
    assert errors == sorted(errors)


def test_huge_and_tiny_values_stay_finite():
    for size in (1e-30, 1e30):
        levels, scale = quantise(torch.full((1, 4), size), [(4, 4)])
        assert bool(torch.isfinite(dequantise(levels, scale.float() * STEPS[4], 8)).all())
