"""Text that is too short, too uniform, too large or no text at all: each has a stated behaviour."""

from __future__ import annotations

import pytest
import torch
from calibrating import projected, quiet, text
from families import FAMILIES

from helpers import compiled, error, latents, new_cache, piecewise
from lorc_fx import calibrate
from lorc_fx.calibration import PRIOR, basis_of
from lorc_fx.errors import BadCalibration, QualityWarning
from lorc_fx.factors import gram

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")


def test_the_prior_fills_in_for_few_tokens():
    model = FAMILIES["llama-gqa"].build()
    with pytest.warns(QualityWarning, match="more calibration text"):
        made = calibrate(model, [text(rows=1, tokens=3)], progress=False)
    site = made.sites[0]
    projections = FAMILIES["llama-gqa"].projections(model)
    weight = next(p.weight for p in projections if (p.layer, p.kind) == (site.layer, site.kind))
    basis = basis_of(site, gram(weight, "a site"))
    assert bool((basis.energy > 0).all()) and PRIOR > 0


def test_zero_variance_is_no_trouble():
    """Every token the same: the covariance is zero, and the prior alone orders the columns."""
    model = FAMILIES["gpt2"].build(layers=1)
    model.transformer.wpe.weight.data.zero_()
    same = torch.ones(2, 40, dtype=torch.long)
    made = quiet(model, [same])
    compiled(model, ratio=0.4, calibration=made, precision="auto", scheduler="loss")
    with torch.no_grad():
        out = model(text(rows=1), use_cache=True)
    assert bool(torch.isfinite(out.logits).all())


BAD = {
    "no batches": ([], "no text"),
    "a string": ("wiki", "neither an iterable"),
    "floats": ([torch.randn(2, 4)], "ints of shape"),
    "an empty row": ([torch.ones(0, dtype=torch.long)], "ints of shape"),
    "a number": ([7], "a batch is"),
    "ids out of range": ([torch.full((1, 9), 10_000)], "token id 10000"),
    "negative ids": ([torch.full((1, 9), -1)], "token id -1"),
    "one token": ([torch.ones(2, 1, dtype=torch.long)], "no token after the first"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_refused(name):
    batches, words = BAD[name]
    with pytest.raises(BadCalibration, match=words):
        quiet(FAMILIES["llama-gqa"].build(layers=1), batches)


def test_activations_that_are_not_finite_are_refused():
    model = FAMILIES["llama-gqa"].build(layers=1)
    model.model.embed_tokens.weight.data[5] = float("nan")
    with pytest.raises(BadCalibration, match="not finite"):
        quiet(model, [torch.full((1, 9), 5)])


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(BadCalibration, match="no cached projection"):
        quiet(torch.nn.Linear(4, 4), [{"input": torch.randn(2, 4)}])


def test_large_activations_do_not_overflow():
    """fp16 up to 60000: squares are summed in fp64, and what is read back is near what was written."""
    model = FAMILIES["gpt2"].build(layers=1).to(torch.float16)
    inner = model.transformer.h[0]
    width = inner.attn.c_attn.weight.shape[0]
    with torch.no_grad():
        y = inner.attn.c_attn(inner.ln_1(model.transformer.wte(text()) + model.transformer.wpe.weight[:24]))
        inner.attn.c_attn.weight[:, 2 * width :] *= 3e4 / float(y[..., 2 * width :].abs().max())
        inner.attn.c_proj.weight *= 1e-5
    found = quiet(model, [text(rows=16)])
    assert float(found.sites[1].outer.max()) > 65504**2 / 100 and bool(torch.isfinite(found.sites[1].outer).all())
    want = projected(FAMILIES["gpt2"], model, text(rows=2, tokens=12))[0, "value"]
    compiled(model, ratio=0.5, calibration=found)
    cache = new_cache(model, "dynamic", 12)
    logits = piecewise(model, text(rows=2, tokens=12), cache, [12])
    assert bool(torch.isfinite(logits).all())
    value = latents(cache)[0][1].dense().transpose(1, 2).flatten(2).double()
    assert error(value, want) < 0.1
