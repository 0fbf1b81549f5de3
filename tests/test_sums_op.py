"""``lorc::sums``: weighted sums of stored columns are those of unpacked ones."""

from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_packing import DTYPES

from lorc_fx.groups import split
from lorc_fx.kernels import native
from lorc_fx.kernels.pack import pack
from lorc_fx.kernels.sums import sums
from lorc_fx.packing import BITS, MODEL, Format, Segment, unpack


@st.composite
def cases(draw):
    """A format whose segments divide into groups, and sizes."""
    groups = draw(st.sampled_from([1, 1, 2, 4, 7]))
    bits = [b for b in (MODEL, *BITS) if draw(st.booleans())] or [draw(st.sampled_from(BITS))]
    unit = groups * draw(st.sampled_from([1, 8]))
    segments = tuple(Segment(unit * draw(st.integers(1, 5)), b) for b in bits)
    form = Format(segments, draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES)))
    return form, groups, draw(st.sampled_from([0, 1, 7, 63, 300])), draw(st.integers(1, 3)), draw(st.integers(1, 16))


def made(form, groups, tokens, batch, lines, seed=0):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, batch, form.columns + form.choices - 1, generator=g)
    offsets = torch.randn(form.choices, form.columns, generator=g) if form.choices > 1 else None
    weights = torch.randn(batch, groups, lines, tokens, generator=g).softmax(-1)
    return pack(latent, offsets, None, form), weights


def truth(rows, weights, form):
    """In fp64, of what ``unpack`` reads: columns of each group, then of further means."""
    latent = unpack(rows, form.spec, form.choices, form.dtype).double()
    own = split(latent[..., : form.columns], form.spec, weights.shape[1])
    further = latent[..., None, form.columns :].expand(*own.shape[:-1], -1)
    return weights.double() @ torch.cat([own, further], -1).permute(1, 2, 0, 3)


def close(got, want, form):
    """The op does not round what it unpacks to the model's dtype; the truth does."""
    room = max(4 * torch.finfo(form.dtype).eps, 1e-5)
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max() if want.numel() else 0) <= room * max(
        1.0, float(want.abs().max()) if want.numel() else 0
    )


@settings(max_examples=120)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_sums_are_those_of_unpacked_columns(case, seed):
    form, *sizes = case
    assume(not form.plain)  # graphs multiply such rows as they are
    rows, weights = made(form, *sizes, seed)
    close(sums(rows, weights, form), truth(rows, weights, form), form)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_the_dtype_of_the_weights(dtype):
    form = Format((Segment(8, 8), Segment(16, 3)), 2, dtype)
    rows, weights = made(form, 4, 50, 2, 3)
    got = sums(rows, weights.to(dtype), form)
    assert got.dtype == dtype
    close(got, truth(rows, weights.to(dtype), form), form)


def test_where_nothing_compiles():
    form = Format((Segment(8, 4), Segment(16, 2)), 2, torch.float32)
    rows, weights = made(form, 4, 50, 2, 3)
    with mock.patch.object(native, "library", return_value=None):
        close(sums(rows, weights, form), truth(rows, weights, form), form)


def test_rows_of_a_larger_buffer():
    form = Format((Segment(8, 4), Segment(16, 5)), 2, torch.float32)
    rows, weights = made(form, 2, 40, 5, 3)
    part = rows[3:17, 1:4]
    close(sums(part, weights[1:4, ..., 3:17], form), truth(part, weights[1:4, ..., 3:17], form), form)


def test_the_op_is_one_of_torch():
    form = Format((Segment(8, 4), Segment(16, 5)), 2, torch.float32)
    given = (*made(form, 2, 9, 2, 3), *form.parts)
    torch.library.opcheck(torch.ops.lorc.sums.default, given, test_utils=("test_schema", "test_faketensor"))


def test_rows_of_any_strides():
    """A last axis that is not contiguous is no reason for other numbers."""
    form = Format((Segment(16, MODEL), Segment(32, 4)), 1, torch.float32)
    rows, weights = made(form, 2, 40, 2, 3)
    strided = torch.empty(rows.shape[2], *rows.shape[:2], dtype=rows.dtype).permute(1, 2, 0)
    strided.copy_(rows)
    assert strided.stride(2) != 1
    assert torch.equal(sums(strided, weights, form), sums(rows, weights, form))
