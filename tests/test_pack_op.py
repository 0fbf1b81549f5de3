"""``lorc::pack`` and ``lorc::unpack``: compiled code makes the rows of ``packing.pack``, and reads them alike."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import DTYPES, formats, latent_of, scale_in

from lorc_fx import packing
from lorc_fx.kernels import native
from lorc_fx.kernels import pack as by_op
from lorc_fx.kernels.pack import pack
from lorc_fx.packing import BITS, MODEL, Format, Segment, unpack

ODD = [1, 7, 15, 16, 17, 33, 129]


def read(rows, form):
    """What rows hold is what ``packing.unpack`` finds in them, bit by bit."""
    got, want = by_op.unpack(rows, form), unpack(rows, form.spec, form.choices, form.dtype)
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def same(latent, offsets, spread, form):
    """Rows are those of ``packing.pack``; where a scale differs, it is as good a one."""
    got = pack(latent, offsets, spread, form)
    want = packing.pack(latent, offsets, spread, form.spec, form.choices, form.dtype)
    assert got.dtype == want.dtype and got.shape == want.shape
    read(want, form)
    other = (got != want).any(-1)
    if not other.any():
        return
    assert form.scaled and other.float().mean() <= 0.2
    exact = sum(s.columns for s in form.segments if s.bits == MODEL)
    a, b = (unpack(rows[other], form.spec, form.choices, form.dtype).float() for rows in (got, want))
    assert torch.equal(a[..., form.columns :], b[..., form.columns :]), "another mean"
    assert not torch.equal(scale_in(got[other], form), scale_in(want[other], form)), "other levels at the same scale"
    values = latent[other][..., : form.columns].float()
    if offsets is not None:
        near = torch.cat([torch.zeros_like(values[..., :1]), latent[other][..., form.columns :].float()], -1)
        values = values - offsets.float()[near.argmax(-1)]
    unit = torch.ones(form.columns) if spread is None else spread.float()
    off = [((x[..., : form.columns] - values) * unit)[..., exact:].norm(dim=-1) for x in (a, b)]
    torch.testing.assert_close(*off, rtol=1e-4, atol=1e-30)


@settings(max_examples=150)
@given(form=formats(), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-9, 1e-3, 1.0, 300.0, 1e6]), data=st.data())
def test_rows_are_those_of_torch(form, seed, scale, data):
    latent, offsets = latent_of(form, seed, 1.0)
    latent = (latent.float() * scale).to(data.draw(st.sampled_from(DTYPES)))
    offsets = None if offsets is None else offsets * scale
    g = torch.Generator().manual_seed(seed)
    spread = torch.rand(form.columns, generator=g) + 0.1 if data.draw(st.booleans()) else None
    same(latent, offsets, spread, form)


@pytest.mark.parametrize("columns", ODD)
@pytest.mark.parametrize("bits", (MODEL, *BITS))
def test_odd_sizes(columns, bits):
    g = torch.Generator().manual_seed(columns * 10 + bits)
    for dtype in DTYPES:
        same(torch.randn(5, 3, columns, generator=g), None, None, Format((Segment(columns, bits),), 1, dtype))


def test_many_tokens_are_packed_by_all_threads():
    form = Format((Segment(24, 8), Segment(40, 3)), 2, torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(600, 2, 65, generator=g)  # FEW_COLUMNS of pack.cpp, and some
    same(latent, torch.randn(2, 64, generator=g), None, form)


def test_rows_that_lie_apart():
    """A slice of features, tokens in the second place, no token, no batch."""
    form = Format((Segment(8, 4), Segment(5, 2)), 1, torch.float32)
    wide = torch.randn(6, 4, 30)
    for latent in (
        wide[..., 3:16],
        wide.transpose(0, 1)[..., :13],
        wide[:0, :, :13],
        wide[0, 0, :13],
        wide[..., ::2][..., :13],
    ):
        same(latent, None, None, form)


def test_rows_of_a_larger_buffer():
    """Some tokens and batch rows of a cache that has room, at any offset."""
    form = Format((Segment(8, 8), Segment(21, 3)), 2, torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    rows = pack(torch.randn(40, 5, 30, generator=g), torch.randn(2, 29, generator=g), None, form)
    for part in (rows[3:17], rows[:, 1:4], rows[::2], rows.transpose(0, 1), rows[0], rows[0, 0], rows[:0], rows[None]):
        read(part, form)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9])
def test_up_to_a_multiple_of_tokens_there_are_zeros(tokens):
    form = Format((Segment(8, 8), Segment(21, 3)), 2, torch.bfloat16)
    rows = pack(torch.randn(tokens, 5, 30), torch.randn(2, 29), None, form)
    more = -tokens % 8
    for library in (native.library(), None):
        with mock.patch.object(native, "library", return_value=library):
            got = by_op.unpack(rows, form, 8)
        assert got.shape == (tokens + more, 5, 30) and not got[tokens:].any()
        assert torch.equal(got[:tokens], unpack(rows, form.spec, 2, form.dtype))
    fake = torch.ops.lorc.unpack.default(rows.to("meta"), *form.parts, 8)
    assert fake.shape == got.shape


def test_rows_without_a_token():
    """All zero bytes."""
    for form in (
        Format((Segment(7, 5),), 2, torch.float32),
        Format((Segment(7, MODEL), Segment(3, 2)), 3, torch.float16),
    ):
        read(torch.zeros(2, 3, form.nbytes, dtype=torch.uint8), form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0x7C01, 0x7E00, 0x7FFF, 0xFFFF, 0x7C00, 0xFC00])
def test_a_scale_that_is_no_number_is_never_read_as_one(scale, dtype):
    """Whatever NaN or infinity it is: also one that rounding would carry over into the sign."""
    form = Format((Segment(21, 8), Segment(9, 3)), 2, dtype)
    rows = pack(torch.randn(2, 1, 31), torch.randn(2, 30), None, form)
    rows.view(torch.int16)[0, 0, 0] = scale - (scale >> 15 << 16)
    read(rows, form)
    assert not bool(by_op.unpack(rows, form)[0, 0, :30].isfinite().any())


@settings(max_examples=60)
@given(form=formats(), seed=st.integers(0, 2**31))
def test_any_bytes_are_read_as_torch_does(form, seed):
    g = torch.Generator().manual_seed(seed)
    read(torch.randint(256, (4, 2, form.nbytes), generator=g, dtype=torch.uint8), form)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 5, 30])
def test_numbers_that_are_none_are_never_read_as_numbers_of_their_own(value, at):
    """What is written of NaN is read as NaN, of infinity as torch ops have it."""
    form = Format((Segment(3, MODEL), Segment(20, 8), Segment(9, 3)), 1, torch.bfloat16)
    latent = torch.randn(2, 1, 32)
    latent[0, 0, at] = value
    got, want = (
        unpack(rows, form.spec, 1, form.dtype)
        for rows in (pack(latent, None, None, form), packing.pack(latent, None, None, form.spec, 1, form.dtype))
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if value != value:
        assert bool(got[0].isnan().any()) and not bool(got[1].isnan().any())


def test_borders_of_16_bits():
    """Numbers that round to the next, to infinity, to subnormal ones and to nothing."""
    edges = torch.tensor(
        [65504.0, 65519.9, 65520.0, 1e9, 6.1e-5, 6.0e-5, 5.96e-8, 2.9e-8, 3.0e-8, 1e-30, 1.0009765, 1.00048828125]
    )
    both = torch.cat([edges, -edges, torch.tensor([0.0, float("inf"), float("nan")])])
    for dtype in DTYPES:
        form = Format((Segment(len(both), MODEL),), 2, dtype)
        latent = torch.cat([both, torch.tensor([-1.0])]).expand(2, 1, -1)
        found = unpack(pack(latent, torch.zeros(2, len(both)), None, form), form.spec, 2, dtype)
        torch.testing.assert_close(found[..., :-1], both.to(dtype).expand(2, 1, -1), rtol=0, atol=0, equal_nan=True)


def test_where_nothing_compiles():
    form = Format((Segment(8, 4),), 1, torch.float32)
    latent = torch.randn(3, 2, 8)
    with mock.patch.object(native, "library", return_value=None):
        same(latent, None, None, form)


def test_the_op_is_one_of_torch():
    form = Format((Segment(8, MODEL), Segment(9, 5)), 2, torch.float16)
    given = ([torch.randn(2, 3, 18)], [torch.randn(2, 17)], [torch.ones(17)], [None], [None], by_op.spelled(form))
    (rows,) = torch.ops.lorc.pack.default(*given)
    for op, arguments in ((torch.ops.lorc.pack, given), (torch.ops.lorc.unpack, (rows, *form.parts))):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_several_means_need_offsets():
    form = Format((Segment(8, 4),), 2, torch.float32)
    want = packing.pack(torch.ones(1, 1, 9), None, None, form.spec, 2, form.dtype)
    assert torch.equal(pack(torch.ones(1, 1, 9), None, None, form), want)


@pytest.mark.parametrize("shape", [(30, 2), (2, 30), (60,), (1, 30, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_latents_of_many_tokens_are_made_block_by_block(shape, groups):
    """The same rows, in whatever order tokens and batch rows come."""
    form = Format((Segment(16, 8), Segment(8, 3)), 2, torch.float32)
    g = torch.Generator().manual_seed(0)
    y, project = torch.randn(*shape, 32, generator=g), torch.randn(24 // groups + 1, 32, generator=g)
    given = (torch.randn(2, 24, generator=g), torch.rand(24, generator=g) + 0.5, form, project, None, groups)
    want = pack(y, *given)
    with mock.patch.object(by_op, "BLOCK", 7), mock.patch.object(by_op, "TOKENS", 3):
        got = pack(y, *given)
    assert got.shape == want.shape
    torch.testing.assert_close(by_op.unpack(got, form), by_op.unpack(want, form), rtol=1e-3, atol=1e-3)
