"""Rows of bytes: what goes in comes out, as near as its bits promise, in as many bytes as planned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_fx.packing import BITS, MODEL, SNAP, TINY, Format, Segment, dequantise, pack, quantise, segment_bytes, unpack
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


def nearest(latent, form):
    """Index of the nearest mean, and one-hot of the further ones."""
    scores = torch.cat([torch.zeros_like(latent[..., :1]), latent[..., form.columns :]], -1).float()
    index = scores.argmax(-1)
    return index, torch.nn.functional.one_hot(index, form.choices)[..., 1:]


@settings(deadline=None, max_examples=80)
@given(form=formats(), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_rows_hold_what_they_promise(form, seed, scale):
    latent, offsets = latent_of(form, seed, scale)
    rows = pack(latent, offsets, form.spec, form.choices, form.dtype)
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
        _, step = quantise(want, bits)
        step, half = step.float(), 1 << (bits - 1)
        excess = (want.abs() - half * step).clamp_min(0)
        assert bool(((got - want).abs() <= excess + step * 0.5001 + rounding * (want.abs() + half * step)).all())


@pytest.mark.parametrize("bits", BITS)
def test_every_level_survives_packing(bits):
    levels = torch.arange(1 << bits).repeat(3)[: (1 << bits) + 3]
    values = dequantise(levels, torch.tensor(0.5), bits)[None]
    form = Format((Segment(values.shape[-1], bits),), 1, torch.float32)
    found = unpack(pack(values, None, form.spec, 1, form.dtype), form.spec, 1, torch.float32)
    if bits == 8:
        assert torch.allclose(found, values, rtol=0, atol=0.5 / 2)
    assert len(found.unique()) <= 1 << bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 7, 8, 16, 63, 256])
def test_bytes_are_what_the_bits_need(bits, columns):
    form = Format((Segment(columns, bits),), 1, torch.bfloat16)
    exact = 2 + columns * bits / 8
    assert exact <= segment_bytes(columns, bits, 2) < exact + 2
    assert form.nbytes - segment_bytes(columns, bits, 2) in (0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choices", [1, 2, 3])
@pytest.mark.parametrize("segments", [((4, 8),), ((3, MODEL), (5, 2)), ((4, MODEL),)])
def test_a_written_row_is_never_taken_for_an_empty_one(segments, choices, dtype):
    """Even a token that lies exactly on its mean: its scale is TINY, or its index is not zero."""
    form = Format(tuple(Segment(*s) for s in segments), choices, dtype)
    if form.plain:
        return
    latent = torch.zeros(2, 1, form.columns + choices - 1, dtype=dtype)
    offsets = torch.zeros(choices, form.columns, dtype=dtype) if choices > 1 else None
    rows = pack(latent, offsets, form.spec, choices, form.dtype)
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
    found = unpack(pack(latent, offsets, form.spec, 2, form.dtype), form.spec, 2, dtype)
    assert bool((found[..., :16].abs() <= 8 * TINY).all()) and float(found[0, 16]) == 1
    far = torch.cat([rounded * 1.5, torch.ones(1)]).to(dtype)[None]
    assert float(unpack(pack(far, offsets, form.spec, 2, form.dtype), form.spec, 2, dtype)[..., :16].abs().max()) > 1


def test_more_bits_lose_less():
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    errors = []
    for bits in BITS:
        levels, scale = quantise(values, bits)
        errors.append(float((dequantise(levels, scale.float(), bits) - values).square().sum()))
    assert errors == sorted(errors)


def test_huge_and_tiny_values_stay_finite():
    for scale in (1e-30, 1e30):
        levels, step = quantise(torch.full((1, 4), scale), 4)
        assert bool(torch.isfinite(dequantise(levels, step.float(), 4)).all())
