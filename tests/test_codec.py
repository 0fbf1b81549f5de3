"""The codec against linear algebra: its error is the dropped singular values, and what it promises to keep is kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import matrix
from lorc_fx.codec import Codec, make_codec, model_segments, prior_basis
from lorc_fx.decoder import Decoder, decode_dense, decode_vectors
from lorc_fx.errors import BadWeight
from lorc_fx.factors import CONDITION_FLOOR, condition_number, factorise

FP64 = torch.float64


class Flat(nn.Module):
    """The epilogue of a cache [B, T, n]: none."""

    def forward(self, y, positions):
        return y


def decoder(width, dtype=FP64):
    return Decoder(torch.fx.symbolic_trace(Flat()), width, ("B", "T", width), dtype, None, "none")


def codec_of(weight, rank, bias=None, dtype=FP64):
    basis = prior_basis(factorise(weight, "a site"), bias)
    return make_codec(weight, bias, basis, model_segments(rank), decoder(weight.shape[0], dtype), (), dtype)


def effective(codec):
    """S^T (P^T W): the matrix that encoding and decoding amount to."""
    return codec.encode if codec.decode is None else codec.decode.T @ codec.encode


@st.composite
def weights(draw):
    n, d = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    return matrix(n, d, draw(st.integers(0, 2**31)))


@st.composite
def decaying(draw):
    """Weights with a spectrum that falls over up to six decades."""
    n, d = draw(st.integers(2, 24)), draw(st.integers(24, 40))
    seed, decades = draw(st.integers(0, 2**31)), draw(st.floats(0, 6))
    left = torch.linalg.qr(matrix(n, n, seed))[0]
    right = torch.linalg.qr(matrix(d, d, seed + 1))[0][:n]
    return left @ torch.diag(torch.logspace(0, -decades, n, dtype=FP64)) @ right


@settings(max_examples=40)
@given(weight=weights(), data=st.data())
def test_eckart_young(weight, data):
    n, d = weight.shape
    rank = data.draw(st.integers(1, n))
    singular = torch.zeros(n, dtype=FP64)
    singular[: min(n, d)] = torch.linalg.svdvals(weight)
    error = weight - effective(codec_of(weight, rank))
    total, dropped = float(weight.square().sum()), float(singular[rank:].square().sum())
    assert float(error.square().sum()) == pytest.approx(dropped, rel=1e-10, abs=1e-13 * total)
    worst = float(torch.linalg.matrix_norm(error, 2))
    following = float(singular[rank]) if rank < n else 0.0
    assert worst == pytest.approx(following, rel=1e-10, abs=1e-13 * total**0.5)


@settings(max_examples=40)
@given(weight=decaying(), data=st.data())
def test_eckart_young_on_falling_spectra(weight, data):
    rank = data.draw(st.integers(1, weight.shape[0] - 1))
    dropped = torch.linalg.svdvals(weight)[rank:].square().sum()
    error = (weight - effective(codec_of(weight, rank))).square().sum()
    assert abs(float(error - dropped)) <= 1e-10 * float(weight.square().sum())


def test_no_other_basis_of_that_rank_does_better():
    weight, rank = matrix(12, 20, 3), 5
    best = (weight - effective(codec_of(weight, rank))).square().sum()
    for seed in range(20):
        other = torch.linalg.qr(matrix(12, rank, seed))[0]
        assert (weight - other @ (other.T @ weight)).square().sum() > best


@settings(max_examples=40)
@given(weight=weights())
def test_singular_values_and_vectors(weight):
    n, d = weight.shape
    factors = factorise(weight, "a site")
    truth = torch.zeros(n, dtype=FP64)
    truth[: min(n, d)] = torch.linalg.svdvals(weight)
    assert bool((factors.singular.diff() <= 0).all())
    assert torch.allclose(factors.singular, truth, atol=1e-7 * float(truth[0]))
    assert torch.allclose(factors.left.T @ factors.left, torch.eye(n, dtype=FP64), atol=1e-12)


@pytest.mark.parametrize("dtype", [FP64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 63), (63, 7), (16, 16)])
def test_full_rank_is_the_weight_bit_by_bit(n, d, dtype):
    weight, bias = matrix(n, d, 1).to(dtype), matrix(n, 1, 2)[:, 0].to(dtype)
    basis = prior_basis(factorise(weight, "a site"), bias)
    codec = make_codec(weight, bias, basis, model_segments(n), decoder(n, dtype), (), dtype)
    assert codec.decode is None and codec.rank == n
    assert torch.equal(codec.encode, weight) and torch.equal(codec.mean, bias)


@settings(max_examples=40)
@given(weight=weights(), data=st.data())
def test_the_bias_is_exact_at_every_rank(weight, data):
    n, d = weight.shape
    bias = matrix(n, 1, 9)[:, 0]
    codec = codec_of(weight, data.draw(st.integers(1, n)), bias)
    codes = (torch.zeros(3, 2, d, dtype=FP64)) @ codec.encode.T
    y = decode_vectors(codes, codec.decode, codec.mean)
    assert torch.equal(y, bias.expand(2, 3, n))


@settings(max_examples=40)
@given(weight=weights(), data=st.data())
def test_decode_then_encode_is_the_identity_on_latents(weight, data):
    n, d = weight.shape
    rank = data.draw(st.integers(1, n))
    codec = codec_of(weight, rank, matrix(n, 1, 9)[:, 0])
    codes = matrix(6, d, 5).reshape(3, 2, d) @ codec.encode.T  # [T, B, r]
    y = decode_dense(codec.decoder, codes, None, codec.decode, codec.mean, ())
    assert y.shape == (2, 3, n)
    again = y - codec.mean if codec.decode is None else (y - codec.mean) @ codec.decode.T  # c = (y - mu) P
    assert torch.allclose(again.transpose(0, 1), codes, rtol=1e-10, atol=1e-10 * float(weight.abs().max()))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6))
def test_a_weight_of_low_rank_is_lossless_at_that_rank(seed, rank):
    weight = matrix(12, rank, seed) @ matrix(rank, 20, seed + 1)
    found = effective(codec_of(weight, rank))
    assert torch.allclose(found, weight, rtol=0, atol=1e-10 * float(weight.abs().max()))


def test_a_rank_deficient_weight_has_the_floored_condition_number():
    factors = factorise(matrix(12, 3, 1) @ matrix(3, 20, 2), "a site")
    assert factors.condition == pytest.approx(1 / CONDITION_FLOOR, rel=1e-12)
    assert bool(torch.isfinite(factors.left).all()) and bool(torch.isfinite(factors.singular).all())


def test_condition_number():
    assert condition_number(torch.tensor([8.0, 4.0, 2.0])) == 4.0
    assert condition_number(torch.tensor([1.0, 1e-30])) == pytest.approx(1 / CONDITION_FLOOR)
    assert condition_number(torch.zeros(4)) == 1.0
    assert condition_number(torch.empty(0)) == 1.0


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_an_all_zero_weight_decodes_to_its_bias(rank):
    bias = matrix(8, 1, 4)[:, 0]
    codec = codec_of(torch.zeros(8, 5, dtype=FP64), rank, bias)
    assert factorise(torch.zeros(8, 5), "a site").condition == 1.0
    y = decode_vectors(matrix(3, 5, 1)[:, None] @ codec.encode.T, codec.decode, codec.mean)
    assert torch.equal(y, bias.expand(1, 3, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_refused(bad, dtype):
    weight = matrix(8, 5, 1).to(dtype)
    weight[3, 2] = bad
    with pytest.raises(BadWeight, match="layer 7 key"):
        factorise(weight, "layer 7 key")


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    weight = matrix(8, 12, 1).float()
    plain, scaled = factorise(weight, "a site"), factorise(weight * scale, "a site")
    assert scaled.condition == pytest.approx(plain.condition, rel=1e-4)
    assert torch.allclose(scaled.singular / scale, plain.singular, rtol=1e-4)


def test_signatures_tell_apart_what_a_graph_depends_on():
    weight, bias = matrix(8, 12, 1), matrix(8, 1, 2)[:, 0]
    shared = decoder(8)

    def made(rank, bias, dtype=FP64):
        basis = prior_basis(factorise(weight, "a site"), bias)
        return make_codec(weight, bias, basis, model_segments(rank), shared, (), dtype)

    assert made(3, bias).signature == made(3, bias * 2).signature
    kinds = [made(3, bias), made(4, bias), made(3, None), made(8, bias), made(3, bias, torch.float32)]
    assert len({c.signature for c in kinds}) == len(kinds)
    assert made(3, bias) != made(3, bias), "codecs are compared by identity"


def test_nbytes_counts_each_matrix_once():
    codec = codec_of(matrix(8, 12, 1), 3, matrix(8, 1, 2)[:, 0])
    assert codec.nbytes() == 8 * (3 * 12 + 3 * 8 + 8)
    assert isinstance(codec, Codec) and set(codec.tensors()) == {"encode", "decode", "mean"}
