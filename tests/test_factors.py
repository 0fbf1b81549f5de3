"""Factors against an SVD in fp64: singular values and subspaces, for weights of any shape, dtype and condition."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import matrix
from lorc_fx import factors, prepared
from lorc_fx.calibration import second_moment
from lorc_fx.codec import prior_basis
from lorc_fx.decoder import Decoder
from lorc_fx.errors import BadWeight
from lorc_fx.factors import factorise, gram, spectrum
from lorc_fx.groups import on_diagonal
from lorc_fx.packing import MODEL, Segment
from lorc_fx.prepared import Prepared
from lorc_fx.records import PlannedSite

FP64 = torch.float64
EPS = torch.finfo(FP64).eps


@st.composite
def weights(draw):
    """Spectra that fall over up to twelve decades (fp32 holds seven) or end at a rank, in every dtype."""
    n, d, seed = draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.integers(0, 2**31))
    least = min(n, d)
    left, right = torch.linalg.qr(matrix(n, least, seed))[0], torch.linalg.qr(matrix(d, least, seed + 1))[0]
    singular = torch.logspace(0, -draw(st.floats(0, 12)), least, dtype=FP64)
    singular[draw(st.integers(1, least)) :] *= draw(st.sampled_from([0.0, 1.0]))
    scale = 10.0 ** draw(st.integers(-20, 20))
    dtype = draw(st.sampled_from([FP64, torch.float32, torch.bfloat16]))
    return (left * singular @ right.T * scale).to(dtype)


@st.composite
def tilings(draw):
    """Stripes and bands that do and do not divide the weights' sizes."""
    return draw(st.integers(1, 50)), draw(st.integers(1, 50))


def tiled(tiling):
    return mock.patch.multiple(factors, STRIPE=tiling[0], BAND=tiling[1])


@settings(max_examples=80)
@given(weight=weights(), tiling=tilings())
def test_the_gram_matrix_is_the_product_and_symmetric_to_the_bit(weight, tiling):
    with tiled(tiling):
        found = gram(weight, "a site")
    wide = weight.double()
    bound = 4 * EPS * weight.shape[1] * (wide.abs() @ wide.abs().T)  # of a sum of d products, whatever its order
    assert torch.equal(found, found.T)
    assert bool(((found - wide @ wide.T).abs() <= bound + torch.finfo(FP64).tiny).all())


@settings(max_examples=80)
@given(weight=weights(), tiling=tilings())
def test_singular_values_and_subspaces(weight, tiling):
    """Squares of singular values are right to about eps of the largest square; a leading subspace captures what the
    SVD's does, to the same measure, wherever it is cut."""
    n, d = weight.shape
    with tiled(tiling):
        found, alone = factorise(weight, "a site"), spectrum(gram(weight, "a site"))
    truth = torch.zeros(n, dtype=FP64)
    truth[: min(n, d)] = torch.linalg.svdvals(weight.double())
    tolerance = 64 * n * EPS * float(truth[0]) ** 2
    for singular in (found.singular, alone.singular):
        assert bool((singular.diff() <= 0).all())
        assert float((singular.square() - truth.square()).abs().max()) <= tolerance
    assert alone.left.shape == (n, 0)
    assert float((found.left.T @ found.left - torch.eye(n, dtype=FP64)).abs().max()) <= 64 * n * EPS
    captured = (found.left.T @ weight.double()).square().sum(1).cumsum(0)
    assert float((captured - truth.square().cumsum(0)).abs().max()) <= n * tolerance


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 8), dtype=st.sampled_from([FP64, torch.float32]))
def test_an_exactly_low_rank_weight_has_that_rank_and_its_columns_span_it(seed, rank, dtype):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-8, 9, (20, rank), generator=generator).double()
    whole[:rank] += 20 * torch.eye(rank, dtype=FP64)  # of full column rank: diagonally dominant
    rows = torch.randint(-8, 9, (rank, 50), generator=generator).double()
    rows[:, :rank] += 20 * torch.eye(rank, dtype=FP64)
    weight = (whole @ rows).to(dtype)  # integers: exact in either dtype
    found = factorise(weight, "a site")
    assert found.rank == spectrum(gram(weight, "a site")).rank == rank
    u, exact = found.left[:, :rank], weight.double()
    assert float((exact - u @ (u.T @ exact)).norm()) <= 1e-12 * float(exact.norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (7, 0), (0, 299), (7, 299), (4, 150)])
def test_one_bad_number_is_found_wherever_it_is(bad, place):
    weight = matrix(8, 300, 0).float()
    weight[place] = bad
    with tiled((128, 3)), pytest.raises(BadWeight, match="layer 7 key"):
        gram(weight, "layer 7 key")


def test_blocks_of_the_gram_matrix_are_those_of_groups_of_rows():
    weight = matrix(24, 40, 0)
    for groups in (1, 2, 6):
        found = on_diagonal(gram(weight, "a site"), groups)
        want = second_moment(weight.T, groups)
        assert torch.allclose(found, want, rtol=1e-13, atol=1e-12)
        assert torch.equal(on_diagonal(found, groups), found)
        for other in (1, 2, 3, 12):  # of what is known by blocks: zeros outside of them
            known = on_diagonal(torch.block_diag(*found), other)
            assert torch.equal(on_diagonal(found, other), known)


# -- a site's codec from singular values alone ------------------------------------------------------------------------


class Flat(torch.nn.Module):
    def forward(self, y, positions):
        return y


def prepared_of(weight):
    found = spectrum(gram(weight, "a site"))
    return Prepared("a site", weight, None, found, prior_basis(found, None))


def planned(rank, bits=MODEL, width=8):
    return PlannedSite(0, "key", width, (Segment(rank, bits),), 1, 0, 0, None, 1.0, 0.0, False, True)


@pytest.mark.parametrize(("rank", "bits"), [(1, MODEL), (5, MODEL), (8, 4), (3, 8)])
def test_vectors_are_made_with_the_codec(rank, bits):
    """... the one that is made where they are there from the start."""
    weight = matrix(8, 30, 0).float()
    decoder = Decoder(torch.fx.symbolic_trace(Flat()), 8, ("B", "T", 8), torch.float32, None, "none")
    late, whole = prepared_of(weight), factorise(weight, "a site")
    early = Prepared("a site", weight, None, whole, prior_basis(whole, None))
    made, wanted = (p.codec(planned(rank, bits), decoder, (), torch.float32) for p in (late, early))
    assert late.basis.analysis.numel() == 0 and made.decode is not None
    assert made.equals(wanted)
    assert late.kept(planned(rank, bits)) == pytest.approx(early.kept(planned(rank, bits)), rel=1e-12)


def test_a_codec_that_loses_nothing_needs_no_vectors():
    weight = matrix(8, 30, 0).float()
    decoder = Decoder(torch.fx.symbolic_trace(Flat()), 8, ("B", "T", 8), torch.float32, None, "none")
    with mock.patch.object(prepared, "factorise", side_effect=AssertionError("it is not needed")):
        made = prepared_of(weight).codec(planned(8), decoder, (), torch.float32)
    assert made.decode is None and torch.equal(made.encode, weight)
