"""Bases that a library author registers: they decide the columns, and what they return is checked."""

import pytest
import torch
from test_attention_forms import build, halved

import lorc_fx
from helpers import assert_close, compiled, generate, latents, prompt
from lorc_fx import bases, errors


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(bases, "_REGISTRY", {})
    return lorc_fx.register_basis


def svd(weight, statistics):
    u, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
    return u, u.T, sigma**2


def run(model, **options):
    ids, mask = prompt(pad=2)
    return generate(compiled(model, **options), ids, mask)


def test_columns_are_those_of_the_basis(register, many_shapes):
    """The weight's singular vectors are LoRC's own basis; other orthonormal columns of the same space lose nothing."""
    seen = []

    @register("mine")
    def mine(weight, statistics):
        assert statistics is None
        seen.append(tuple(weight.shape))
        return svd(weight, statistics)

    @register("turned")
    def turned(weight, statistics):
        u = svd(weight, statistics)[0][:, :8]  # the weights below have rank 8
        q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
        return u @ q, (u @ q).T, torch.ones(8, dtype=torch.float64)

    model = halved(build("llama"))
    want = run(model, ratio=0.5)
    got = run(model, ratio=0.5, basis="mine")
    assert seen == [(32, 64)] * 4
    assert_close("logits", got.logits, want.logits, 1e-5)
    got = run(model, ratio=0.5, basis="turned")
    assert_close("logits", got.logits, want.logits, 1e-4)
    assert all(t.codec.rank == 8 for pair in latents(got.cache) for t in pair)


def test_statistics_are_given_where_the_data_is_known(register, many_shapes):
    tokens = []

    @register("seen")
    def seen(weight, statistics):
        tokens.append(statistics.tokens)
        return svd(weight, statistics)

    model = build("llama")
    texts = [torch.randint(2, 100, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    calibration = lorc_fx.calibrate(model, texts, gradients=False)
    got = run(model, ratio=0.5, basis="seen", calibration=calibration)
    assert len(tokens) == 4 and all(n > 100 for n in tokens)
    latents(got.cache)


BAD = {
    "no tuple": lambda u, s: u,
    "shapes": lambda u, s: (u, u[:-1], s),
    "too many": lambda u, s: (torch.cat([u, u], 1), torch.cat([u, u], 1).T, torch.cat([s, s])),
    "not finite": lambda u, s: (u * torch.nan, u.T, s),
    "do not fall": lambda u, s: (u, u.T, s.flip(0)),
    "negative": lambda u, s: (u, u.T, -s.flip(0)),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_basis_is_refused(what, register):
    @register("bad")
    def bad(weight, statistics):
        u, _, energy = svd(weight, statistics)
        return BAD[what](u, energy)

    with pytest.raises(errors.BadBasis, match="layer 0"):
        run(build("llama"), ratio=0.5, basis="bad")


def test_names(register):
    register("mine")(svd)
    for taken in ("mine", "joint", "auto"):
        with pytest.raises(errors.AlreadyRegistered):
            register(taken)(svd)
    for bad in ("", 3):
        with pytest.raises(errors.BadOption):
            register(bad)
    with pytest.raises(errors.BadOption):
        register("other")("no function")
    with pytest.raises(errors.BadOption, match="'mine'"):
        lorc_fx.Options.parse({"basis": "min"})
    assert lorc_fx.Options.parse({"basis": "mine"}).basis == "mine"
