"""Statistics of one forward pass, the bases made of them, and models that run on them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from calibrating import ordinary, projected, quiet, text
from families import FAMILIES
from oracle import coded_cache, coded_oracle
from transformers import DynamicCache

import lorc_fx
from helpers import assert_close, compiled, error, latents, new_cache, piecewise, prompt, some
from lorc_fx import Calibration, calibration
from lorc_fx.calibration import basis_of, fingerprint, groups_of
from lorc_fx.errors import BadCalibration
from lorc_fx.factors import gram
from lorc_fx.gather import drawn_queries, parted

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")
NAMES = ["llama-gqa", "llama-bias", "gpt2", "gemma3", "gpt-neox", "falcon-mqa"]


def test_tokens_that_lie_on_the_sink_are_sinks():
    """A model makes new ones where the first falls out of a window: left out, however large their gradients."""
    g = torch.Generator().manual_seed(4)
    y, sink = torch.randn(2, 50, 8, generator=g), 3 * torch.randn(8, generator=g)
    y[:, [0, 20, 33]] = sink
    y[0, 33] += 0.01
    real = torch.ones(2, 50, dtype=torch.bool)
    real[1, :5] = False  # the first real token of this row is no sink: it stands alone
    first, rest = parted(y, real)
    assert first.nonzero().tolist() == [[0, 0], [1, 5]]
    assert not rest[0, [0, 20, 33]].any() and int(rest[0].sum()) == 47
    assert rest[1, [20, 33]].all() and int(rest[1].sum()) == 44
    same = torch.ones(1, 9, 4)
    assert int(parted(same, None)[1].sum()) == 8, "tokens without any variance are ordinary"


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_projections(name):
    """Half the rows padded on the left: padding does not count, and each row's first real token stands apart, with
    those that lie on it (in a first layer: the same token again)."""
    family = FAMILIES[name]
    model = family.build(layers=family.fewest)
    ids, mask = text(), torch.ones(4, 24, dtype=torch.long)
    mask[:2, :7] = 0
    found = quiet(model, [{"input_ids": ids, "attention_mask": mask}])
    want = projected(family, model, ids, mask)
    assert len(found.sites) == len(want)
    first = mask.bool() & (mask.cumsum(1) == 1)
    for site in found.sites:
        y = want[site.layer, site.kind]
        rest = ordinary(y, mask.bool())
        assert (site.tokens, site.sinks) == (int(rest.sum()), 4)
        assert_close("total", site.total, y[rest].sum(0), 1e-5)
        assert_close("outer", site.outer[0], y[rest].T @ y[rest], 1e-5)
        assert_close("sinks", site.sink_total, y[first].sum(0), 1e-5)


@pytest.mark.parametrize(
    ("width", "head", "groups"),
    [(4095, 1, 1), (2560, 80, 1), (4096, 128, 2), (5120, 128, 4), (8192, 64, 4), (4544, 64, 71), (4099, 1, 1)],
)
def test_wide_sites_are_in_groups_of_whole_heads(width, head, groups):
    assert groups_of(width, head) == groups
    assert width % groups == 0 and (groups == 1 or (width // groups % head == 0 and width // groups <= 2048))


@pytest.mark.parametrize("gradients", [False, True])
def test_statistics_by_groups_of_heads(monkeypatch, tmp_path, gradients):
    """The diagonal blocks of the whole; a basis that reads all columns back; a model like its oracle; saved too."""
    family = FAMILIES["gpt2"]
    model = family.build(layers=1)
    whole = quiet(model, [text(rows=8)], gradients=gradients)
    width = len(whole.sites[0].total)
    monkeypatch.setattr(calibration, "WIDE", width)
    monkeypatch.setattr(calibration, "GROUP", width // 2)
    monkeypatch.setattr(calibration, "NARROW", 1)
    made = quiet(model, [text(rows=8)], gradients=gradients)
    for a, b in zip(whole.sites, made.sites, strict=True):
        assert b.outer.shape == (2, width // 2, width // 2)
        assert_close(
            "blocks",
            torch.stack([a.outer[0, : width // 2, : width // 2], a.outer[0, width // 2 :, width // 2 :]]),
            b.outer,
            1e-12,
        )
        weight = torch.randn(width, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        basis = basis_of(b, gram(weight, "a site"))
        assert_close("S P", basis.synthesis @ basis.analysis, torch.eye(width, dtype=torch.float64), 1e-8)
        assert bool((basis.energy.diff() <= 0).all()) and basis.absolute == gradients
    made.save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c") == made != whole
    truth = copy.deepcopy(model)
    compiled(model, ratio=0.3, calibration=made)
    ids = text(rows=2, tokens=12, seed=8)
    cache = new_cache(model, "dynamic", 12)
    got = piecewise(model, ids, cache, [5, 12])
    want = piecewise(coded_oracle(family, truth, latents(cache)), ids, new_cache(truth, "dynamic", 12), [12])
    assert_close("logits", got, want, 2e-3)


def test_merging_is_calibrating_on_both():
    model = FAMILIES["llama-gqa"].build()
    one, two = text(seed=1), text(seed=2, tokens=17)
    both = quiet(model, [one, two])
    merged = quiet(model, [one]).merge(quiet(model, [two]))
    for a, b in zip(both.sites, merged.sites, strict=True):
        assert (a.tokens, a.sinks) == (b.tokens, b.sinks)
        assert_close("outer", b.outer, a.outer, 1e-12)
    with pytest.raises(BadCalibration, match="different weights"):
        both.merge(quiet(FAMILIES["llama-gqa"].build(seed=9), [one]))


def test_saved_and_loaded(tmp_path):
    model = FAMILIES["llama-gqa"].build()
    made = quiet(model, [text()], gradients=True)
    made.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    for a, b in zip(made.sites, again.sites, strict=True):
        assert (a.layer, a.kind, a.tokens, a.sinks, a.gradients) == (b.layer, b.kind, b.tokens, b.sinks, b.gradients)
        assert torch.equal(a.outer, b.outer) and torch.equal(a.gradient, b.gradient)
    (tmp_path / "bad").write_text("no calibration")
    for path in (tmp_path / "bad", tmp_path / "missing"):
        with pytest.raises(BadCalibration, match="cannot be read"):
            Calibration.load(path)


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
    made = quiet(FAMILIES["llama-gqa"].build(layers=1), [text()])
    monkeypatch.setattr(calibration, "VERSION", calibration.VERSION - 1)
    made.save(tmp_path / "old.safetensors")
    monkeypatch.undo()
    with pytest.raises(BadCalibration, match=rf"(?s)old\.safetensors.*no calibration of version {calibration.VERSION}"):
        Calibration.load(tmp_path / "old.safetensors")


def test_a_path_serves_every_graph_of_a_model(tmp_path):
    """Each graph reads it anew: prompt, second piece and steps share their codecs, and nothing falls back to dense."""
    model = FAMILIES["llama-gqa"].build(layers=1)
    made = quiet(copy.deepcopy(model), [text()])
    made.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert again == made and hash(again) == hash(made) and made != quiet(copy.deepcopy(model), [text(seed=9)])
    compiled(model, calibration=str(tmp_path / "c.safetensors"), ratio=0.2)
    cache = new_cache(model, "dynamic", 12)
    piecewise(model, text(rows=2, tokens=12), cache, [5, 10, 11, 12])
    latents(cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fingerprint_does_not_depend_on_the_dtype(dtype):
    model = FAMILIES["llama-gqa"].build()
    made = quiet(model, [text()])
    low = compiled(copy.deepcopy(model).to(dtype), calibration=made, precision="auto", scheduler="loss")
    cache = new_cache(low, "dynamic", 12)
    piecewise(low, prompt(2, 12)[0], cache, [12])
    latents(cache)


def test_other_weights_are_refused():
    made = quiet(FAMILIES["llama-gqa"].build(), [text()])
    other = compiled(FAMILIES["llama-gqa"].build(seed=9), calibration=made)
    with pytest.raises(BadCalibration, match="other weights"), torch.no_grad():
        other(prompt(2, 12)[0])


@pytest.mark.parametrize("ratio", some([0.2, 0.35], [0.2]))
@pytest.mark.parametrize("name", some(NAMES, ["llama-gqa", "gpt2", "gemma3"]))
def test_calibrated_models_are_the_oracle(name, ratio):
    """Mixed precision, sinks and all: one function, however the text is cut."""
    family = FAMILIES[name]
    model = family.build(layers=family.fewest)
    made = quiet(model, [text(rows=8, tokens=32)])
    truth = copy.deepcopy(model)
    compiled(model, ratio=ratio, calibration=made, precision="auto", scheduler="loss")
    ids = text(rows=2, tokens=12, seed=8)
    got = {}
    for cuts in ([12], [5, 12], list(range(1, 13))):
        cache = new_cache(model, "dynamic", 12)
        got[len(cuts)] = piecewise(model, ids, cache, cuts)
    pairs = latents(cache)
    want = piecewise(coded_oracle(family, truth, pairs), ids, coded_cache(truth, pairs), [12])
    for pieces, logits in got.items():
        assert_close(f"{pieces} pieces", logits, want, 2e-3)  # a rounding at 1e-7 may turn one level over
    assert any(not x.codec.format.plain for pair in pairs for x in pair)


@pytest.mark.parametrize("precision", ["auto", "int8", "int4", "model"])
@pytest.mark.parametrize("scheduler", some(["loss", "progressive", "uniform", "energy"], ["loss", "progressive"]))
def test_bytes_held_are_bytes_planned(precision, scheduler):
    model = FAMILIES["llama-gqa"].build()
    given = {"ratio": 0.4, "precision": precision, "scheduler": scheduler, "calibration": quiet(model, [text()])}
    plan = lorc_fx.make_plan(model, text(), options=given)
    dense = plan.bytes_per_token_dense
    compiled(model, **given)
    cache = new_cache(model, "dynamic", 12)
    piecewise(model, text(rows=2, tokens=12), cache, [12])
    assert lorc_fx.cache_nbytes(cache, used=True) == 2 * 12 * plan.bytes_per_token <= 2 * 12 * 0.4 * dense


def test_sinks_are_exact_at_any_budget():
    """A constant first token decodes to its own mean, which only the model's dtype rounds."""
    family = FAMILIES["llama-gqa"]
    model = family.build(layers=1)
    made = quiet(model, [text(rows=16)])
    want = projected(family, model, text(rows=1))
    compiled(model, ratio=0.1, calibration=made, precision="auto", scheduler="loss")
    cache = new_cache(model, "dynamic", 12)
    piecewise(model, text(rows=2, tokens=12), cache, [12])
    value = latents(cache)[0][1]
    first = value.dense()[0, :, 0].flatten().double()
    assert_close("the sink", first, want[0, "value"][0, 0], 1e-5)
    other = value.dense()[0, :, 5].flatten().double()
    assert error(other, projected(family, model, text(rows=2, tokens=12))[0, "value"][0, 5]) > 1e-3


@pytest.mark.parametrize(("window", "spare"), [(None, 0), (3, 0), (None, 4)])
@pytest.mark.parametrize("shared", [2, 6])
def test_queries_drawn_for_a_key_are_those_that_read_it(window, spare, shared):
    """Of its own heads, of the same token or a later one in the window, with either sign; no token, no query."""
    query, keys = torch.randn(2, 6, 7, 3), torch.randn(2, shared, 7 + spare, 3)
    signs = set()
    for seed in range(20):
        drawn = drawn_queries(query, keys, window, torch.Generator().manual_seed(seed))
        assert drawn.shape == keys.shape and not drawn[:, :, 7:].any()
        for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(shared), torch.arange(7)).tolist():
            heads = slice(h * 6 // shared, (h + 1) * 6 // shared)
            may = query[b, heads, t : None if window is None else t + window].reshape(-1, 3)
            equal = [sign for sign in (1, -1) if bool((may * sign == drawn[b, h, t]).all(1).any())]
            assert equal
            signs.update(equal)
    assert signs == {1, -1}
    assert drawn_queries(query, keys[:, :, :5], window, torch.Generator()) is None


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma3"])
def test_keys_are_coded_for_the_queries_that_read_them(name):
    """Without gradients of the loss: the metric is that of the scores for keys, none for values."""
    family = FAMILIES[name]
    model = family.build(layers=family.fewest)
    for site in quiet(model, [text(rows=8, tokens=32)]).sites:
        assert site.local == (site.gradient is not None) == (site.kind == "key")


def test_columns_that_no_query_asks_for_are_the_last():
    family = FAMILIES["llama-gqa"]
    model = family.build(layers=family.fewest)
    attention = model.model.layers[0].self_attn
    dim = attention.head_dim
    with torch.no_grad():  # rotary pairs i and i + dim / 2: queries are silent in all pairs but the first
        mute = torch.arange(attention.q_proj.weight.shape[0]) % (dim // 2) != 0
        attention.q_proj.weight[mute] = 0
    site = next(s for s in quiet(model, [text(rows=8, tokens=32)]).sites if (s.layer, s.kind) == (0, "key"))
    loud = torch.arange(len(site.total)) % (dim // 2) == 0
    share = site.gradient[0].diagonal()[loud].sum() / site.gradient[0].diagonal().sum()
    assert float(share) == pytest.approx(1.0, abs=1e-9)
    basis = basis_of(site, gram(attention.k_proj.weight, "a site"))
    first = basis.analysis[:, : int(loud.sum())].detach().square()
    assert float(first[loud].sum() / first.sum()) > 0.9


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", some(["llama-gqa", "gpt2", "gemma3"], ["llama-gqa", "gpt2"]))
def test_padding_and_first_tokens_change_nothing(name, bos):
    """A row alone, and the same row padded on the left in a batch, in one piece and in two: with a constant first token
    (which has a mean of its own) and with any. gemma3 has windows that the text outgrows."""
    family = FAMILIES[name]
    model = family.build(layers=family.fewest)
    ids = text(rows=8, tokens=32)
    if not bos:
        ids[:, 0] = torch.randint(2, 60, (8,), generator=torch.Generator().manual_seed(6))
    compiled(model, ratio=0.25, calibration=quiet(model, [ids]))
    row, tokens, pad = ids[:1, :20], 20, 5
    cache = new_cache(model, "dynamic", tokens)
    with torch.no_grad():
        alone = model(row, past_key_values=cache).logits
    assert any(latent.codec.format.choices == 2 for pair in latents(cache) for latent in pair) or not bos
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), row], 1), ids[1:2, : tokens + pad]])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    position = (mask.cumsum(1) - 1).clamp_min(0)
    for cuts in ([tokens + pad], [11, tokens + pad]):
        cache, parts, at = new_cache(model, "dynamic", tokens + pad), [], 0
        for cut in cuts:
            with torch.no_grad():
                given = {"attention_mask": mask[:, :cut], "position_ids": position[:, at:cut]}
                parts.append(model(batch[:, at:cut], past_key_values=cache, **given).logits)
            at = cut
        assert_close(f"{cuts}", torch.cat(parts, 1)[:1, pad:], alone, 2e-3)


def test_gradients_are_the_second_moment_of_the_loss():
    """G is symmetric, has the trace that labels drawn anew give by hand, and makes another basis."""
    family = FAMILIES["llama-gqa"]
    model, ids = family.build(layers=1), text(rows=64, tokens=12)
    plain, made = quiet(model, [ids]), quiet(model, [ids], gradients=True)
    want, weights = _squares(family, model, ids), {p.kind: p.weight.double() for p in family.projections(model)}
    for a, b in zip(plain.sites, made.sites, strict=True):
        assert_close("outer", b.outer, a.outer, 1e-9)
        g = b.gradient[0]
        assert b.gradients == b.tokens and torch.allclose(g, g.T) and float(torch.linalg.eigvalsh(g).min()) > -1e-9
        assert 0.75 < float(g.trace()) / b.gradients / want[b.kind] < 1.35, b.kind
        square = gram(weights[b.kind], "a site")
        basis, other = basis_of(b, square), basis_of(a, square)
        eye = basis.synthesis @ basis.analysis
        assert_close("S P", eye, torch.eye(len(eye), dtype=torch.float64), 1e-8)
        half = len(eye) // 2  # what is kept at half the columns
        ours, theirs = (x.analysis[:, :half] @ x.synthesis[:half] for x in (basis, other))
        assert error(ours, theirs) > 0.1, b.kind


def _squares(family, model, ids, draws=200):
    """The mean of |g|^2 over ordinary tokens: g is the gradient, at keys or values, of the loss of drawn labels."""
    leaves, handles = {}, []
    for p in family.projections(model):

        def hook(module, args, y, kind=p.kind):
            leaves[kind] = y.detach().requires_grad_()
            return leaves[kind]

        handles.append(p.module.register_forward_hook(hook))
    logits = model(ids).logits.flatten(0, 1)
    for handle in handles:
        handle.remove()
    real = {kind: ordinary(y.detach().double(), torch.ones_like(ids, dtype=torch.bool)) for kind, y in leaves.items()}
    found, g = dict.fromkeys(leaves, 0.0), torch.Generator().manual_seed(0)
    for _ in range(draws):
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=g)[:, 0]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        for kind, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True):
            found[kind] += float(grad.square().sum(-1)[real[kind]].mean()) / draws
    return found


def test_text_of_the_models_own():
    model = FAMILIES["llama-gqa"].build(layers=1)
    model.generation_config.bos_token_id = None
    with pytest.raises(BadCalibration, match="no BOS"):
        quiet(model, "self")
    model.generation_config.bos_token_id = 1
    made = quiet(model, "self")
    assert made.sites[0].sinks == 8 and 8 * 200 < made.sites[0].tokens <= 8 * 256


def test_fingerprints_tell_weights_apart():
    a, b = (torch.randn(8, 12, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    near = float((fingerprint(a) - fingerprint(a.bfloat16())).norm() / fingerprint(a).norm())
    far = float((fingerprint(a) - fingerprint(b)).norm() / fingerprint(a).norm())
    assert near < 0.01 < far


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_bytes_for_everything_nothing_is_lost(dtype):
    """Ratio 1 with statistics: every column in the model's dtype, no mean for the sink, no byte more than dense."""
    model = FAMILIES["gpt2"].build(layers=2).to(dtype)
    known = quiet(model, [text()])
    want = piecewise(model, text(), DynamicCache(config=model.config), [24])
    compiled(model, ratio=1.0, calibration=known)
    cache = DynamicCache(config=model.config)
    assert_close("logits", piecewise(model, text(), cache, [9, 24]), want, 1e-5 if dtype == torch.float32 else 2e-2)
    for pair in latents(cache):
        for latent in pair:
            assert latent.codec.format.plain and latent.codec.decode is None, "the identity"


def test_a_smaller_budget_is_a_prefix(tmp_path):
    """One calibration file serves every ratio: the columns of a smaller budget are the first of a larger one's."""
    quiet(FAMILIES["llama-gqa"].build(layers=2), [text(rows=8, tokens=32)]).save(tmp_path / "c")
    bases = {}
    for ratio in (0.06, 0.15, 0.6):
        options = {"ratio": ratio, "calibration": str(tmp_path / "c"), "basis": "joint"}
        model = compiled(FAMILIES["llama-gqa"].build(layers=2), **options)
        cache = new_cache(model, "dynamic", 12)
        piecewise(model, text(rows=2, tokens=12), cache, [12])
        found = [latent.codec for pair in latents(cache) for latent in pair]
        bases[ratio] = [
            codec.encode[: codec.rank] * (1 if codec.spread is None else codec.spread[:, None]) for codec in found
        ]
    assert sum(map(len, bases[0.06])) < sum(map(len, bases[0.6]))
    for small, large in ((0.06, 0.15), (0.15, 0.6)):
        for a, b in zip(bases[small], bases[large], strict=True):
            few = min(len(a), len(b))
            assert_close("columns", a[:few], b[:few], 1e-5)
