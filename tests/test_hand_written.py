"""More forms that people write: how a cache is laid out, written, allocated and read; opaque projections; einsum."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hand_written import DIM, HEADS, KV, ROOM, VOCAB, WIDTH, N, check, decoder, run, turns
from helpers import assert_close, options
from lorc_fx import backend
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV
from lorc_fx.passes.normalise import normalise
from lorc_fx.passes.sites import match

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore::lorc_fx.errors.EagerWarning")]


def name_of(kind):
    return "-".join(f"{a}={b}" for a, b in kind.items())


@pytest.mark.parametrize("kind", [{}, {"angles": "lone"}, {"angles": "table"}, {"layout": "BHDT"}], ids=name_of)
@pytest.mark.parametrize("cuts", [(5, 9), (1, 9), (8, 9)])
def test_a_prompt_in_pieces_goes_on_coded(kind, cuts):
    """Lengths become symbols with the second piece, and what is cut to as many tokens must not cut the cache."""
    model = decoder(**kind)
    ids = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0, strict=True))
    want, dense, got, cache = [], None, [], None
    for begin, end in zip((0, *cuts, 10, 11), (*cuts, 10, 11, 12), strict=True):
        out, dense = model(ids[:, begin:end], dense, begin)
        want.append(out)
        out, cache = call(ids[:, begin:end], cache, begin)
        got.append(out)
    assert_close("logits", torch.cat(got, 1), torch.cat(want, 1), 1e-5)
    assert all(isinstance(v, LatentKV) and v.tail is None for pair in cache for v in pair)


@pytest.mark.parametrize(
    "form, rope",
    [(form, "before") for form in ("cat", "index", "put", "slice", "copy", "narrow")]
    + [(form, None) for form in ("slice", "copy", "rows")],
)
def test_keys_are_told_from_values(form, rope, monkeypatch):
    """By who reads them, also where what a write returns is not used."""
    seen = []
    monkeypatch.setattr(backend, "match", lambda graph: seen.append(match(graph)) or seen[-1])
    check(decoder(form=form, rope=rope, layers=2))
    assert seen
    for found in seen:
        names = [site.name for site in found.sites]
        assert sorted(names) == sorted(f"layer {i} {kind}" for i in (0, 1) for kind in ("key", "value")), names
        for site in found.sites:
            assert site.reader is not None
            assert (site.decoder.words == "none") is (site.kind == "value" or rope != "before")


@pytest.mark.parametrize("turn", [True, "all", "first"])
@pytest.mark.parametrize("form", ["cat", "index"])
def test_angles_that_come_in(form, turn):
    """They are kept as they come; a cache that began so goes on so where the steps have positions of their own."""
    values, _, said = check(decoder(form=form, layers=4, once=True), turn=turn)
    shares = form == "cat"  # buffers keep what they need each for itself, and that is too much
    coded = [isinstance(v, LatentKV) for v in values]
    assert all(coded) if shares else not any(coded[::2]) and all(coded[1::2]), said
    assert bool(said) != shares


@pytest.mark.parametrize("change", ["replaced", "in place"])
def test_a_table_that_changes(change):
    """What was cached under the old angles keeps them, and what comes later gets the new ones."""
    model = decoder(angles="table")
    plain = copy.deepcopy(model)
    ids = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0))
    (_, dense), (_, cache) = plain(ids[:, :9], None, 0), call(ids[:, :9], None, 0)
    for at in range(9, 12):
        for table in (m.layers[0].table for m in (model, plain)):
            if at == 10 and change == "replaced":
                table["cpu"] = turns(torch.arange(ROOM), 30.0)
            elif at == 10:
                for old, new in zip(table["cpu"], turns(torch.arange(ROOM), 30.0), strict=True):
                    old.copy_(new)
        want, dense = plain(ids[:, at : at + 1], dense, at)
        got, cache = call(ids[:, at : at + 1], cache, at)
        assert_close(f"logits of token {at}", got, want, 1e-5)


@pytest.mark.parametrize("form", ["slice", "index", "narrow", "put", "copy"])
@pytest.mark.parametrize("layout", ["BHTD", "TBn"])
def test_buffers_of_a_module_stay_dense_and_that_is_said(form, layout):
    """Allocated before the first call: what fills them is compiled, but they were not born in it."""
    model = decoder(form=form, layout=layout, kept=True)
    plain = copy.deepcopy(model)
    want, _ = run(plain)
    call = torch.compile(model, backend="lorc", options=options(ratio=0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, _ = run(call)
    assert_close("logits", got, want, 1e-5)
    said = [str(w.message) for w in caught if issubclass(w.category, LorcWarning)]
    assert said and all("outside of a compiled graph" in text for text in said), said
    for name, buffer in model.layers[0].named_buffers():
        assert type(buffer) is torch.Tensor
        assert_close(name, buffer, plain.layers[0].get_buffer(name), 1e-5)


def test_buffers_that_are_written_row_by_row_stay_dense_and_that_is_said():
    model = decoder(form="rows", kept=True)
    want, _ = run(copy.deepcopy(model))
    call = torch.compile(model, backend="lorc", options=options(ratio=0.5))
    with pytest.warns(LorcWarning, match="outside of a compiled graph"):
        got, _ = run(call)
    assert_close("logits", got, want, 1e-5)
    assert all(type(buffer) is torch.Tensor for buffer in model.layers[0].buffers())


class Fresh(nn.Module):
    """The same buffers of a module, made anew in the compiled region where a prompt begins."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, cache, past):
        if past == 0:
            for layer in self.model.layers:
                layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
        return self.model(ids, cache, past)


@pytest.mark.parametrize("form", ["slice", "index", "put", "copy"])
def test_buffers_of_a_module_that_are_born_in_the_graph_are_coded(form):
    model = decoder(form=form, kept=True)
    want, _ = run(copy.deepcopy(model))
    call = torch.compile(Fresh(model), backend="lorc", options=options(ratio=1.0, strict=True))
    for _ in range(2):  # and again for the next prompt
        got, _ = run(call)
        assert_close("logits", got, want, 1e-5)
        assert all(isinstance(v, LatentKV) and v.tail is None for v in model.layers[0].buffers())


class WithState(nn.Module):
    """A decoder that also returns a state without tokens, which a product before a softmax reads in another shape."""

    def __init__(self):
        super().__init__()
        self.inner, self.p = decoder(), nn.Linear(WIDTH, 4 * 8)

    def forward(self, ids, cache, past):
        logits, pairs = self.inner(ids, None if cache is None else cache[0], past)
        x = self.inner.embed(ids)
        state = self.p(x).sum(1).unflatten(-1, (4, 8))
        queries = x.unflatten(-1, (2, 4, 4)).sum(3).transpose(1, 2)
        read = queries @ (state * 2).view(ids.shape[0], 2, 4, 4)
        return logits + read.softmax(-1).amax((1, 3))[..., None], (pairs, state)


def test_a_state_that_is_regrouped_before_it_is_read_is_no_cache():
    torch.manual_seed(0)
    model = WithState().eval().requires_grad_(False)
    want, _ = run(model)
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0, strict=True))
    got, (pairs, state) = run(call)
    assert_close("logits", got, want, 1e-5)
    assert all(isinstance(v, LatentKV) for pair in pairs for v in pair) and type(state) is torch.Tensor


# -- projections that cannot be read ----------------------------------------------------------------------------------


@torch.library.custom_op("lorc_tests::opaque_linear", mutates_args=())
def opaque_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


@opaque_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Linear(torch.autograd.Function):
    """Keys and values through a function with its own derivative."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


class Custom(nn.Module):
    """A projection by way of ``product``."""

    def __init__(self, product):
        super().__init__()
        self.product, self.weight = product, nn.Parameter(torch.randn(N, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        return self.product(x, self.weight)


def with_projection(product, **kind):
    model = decoder(**kind)
    for layer in model.layers:
        layer.k, layer.v = Custom(product), Custom(product)
    return model.requires_grad_(False)


@pytest.mark.parametrize("form", ["cat", "put"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_an_opaque_projection_is_a_miss_that_names_it(form, ratio):
    """Nothing is projected, so it is right at half the bytes, too."""
    model = with_projection(opaque_linear, form=form)
    want, _ = run(model)
    call = torch.compile(model, backend="lorc", options=options(ratio=ratio))
    with pytest.warns(LorcWarning, match=r"(?s)lorc_tests.opaque_linear.*register_rule"):
        got, cache = run(call)
    assert_close("logits", got, want, 1e-5)
    assert all(type(t) is torch.Tensor for pair in cache for t in pair)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_function_with_its_own_derivative_is_a_projection(ratio):
    """Dynamo looks inside it where no gradient is asked for."""
    model, plain = with_projection(Linear.apply), with_projection(F.linear)
    plain.load_state_dict(model.state_dict())
    want, _ = run(torch.compile(plain, backend="lorc", options=options(ratio=ratio)))
    got, cache = run(torch.compile(model, backend="lorc", options=options(ratio=ratio)))
    assert_close("logits", got, want, 1e-5)
    assert all(isinstance(t, LatentKV) for pair in cache for t in pair)


# -- einsum ------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Projections with weights [d, heads, head dim], as some libraries keep them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        sizes = {"q": HEADS, "k": KV, "v": KV}
        for name, heads in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(WIDTH, heads, DIM) / WIDTH**0.5))
        self.o = nn.Parameter(torch.randn(HEADS, DIM, WIDTH) / WIDTH**0.5)

    def forward(self, ids, cache, past):
        x = self.embed(ids)
        q, k, v = (torch.einsum("bsd,dnh->bnsh", x, w) for w in (self.q, self.k, self.v))
        if cache is not None:
            k, v = torch.cat([cache[0][0], k], 2), torch.cat([cache[0][1], v], 2)
        mask = torch.arange(k.shape[2])[None] <= torch.arange(past, past + ids.shape[1])[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return torch.einsum("bnsh,nhd->bsd", out, self.o) @ self.embed.weight.T, [(k, v)]


def test_projections_written_as_einsum_are_coded():
    torch.manual_seed(0)
    model = Heads().eval().requires_grad_(False)
    values, recorder, said = check(model)
    assert all(isinstance(v, LatentKV) for v in values) and not said
    for i in range(len(recorder.graphs)):
        assert "aten.einsum.default" not in recorder.ops(i)


EQUATIONS = [
    ("bsd,dnh->bsnh", (2, 5, 8), (8, 3, 4)), ("bsnh,nhd->bsd", (2, 5, 3, 4), (3, 4, 8)),
    ("bsd,nhd->bnsh", (2, 5, 8), (3, 4, 8)), ("bhqd,bhkd->bhqk", (2, 3, 5, 4), (2, 3, 6, 4)),
    ("bqhd,bkhd->bhqk", (2, 5, 3, 4), (2, 6, 3, 4)), ("bhqk,bhkd->bqhd", (2, 3, 5, 6), (2, 3, 6, 4)),
    ("bsd,d->bs", (2, 5, 8), (8,)), ("d,de->e", (8,), (8, 4)), ("bsd,ed->ebs", (2, 5, 8), (4, 8)),
    ("bsd,bsd->bs", (2, 5, 8), (2, 5, 8)), ("...d,ed->...e", (2, 5, 8), (4, 8)), ("bd,be->bde", (2, 5), (2, 4)),
    ("bsd,bd->b", (2, 5, 8), (2, 8)), ("bsd,bde->se", (2, 5, 8), (2, 8, 4)), ("bsd,bsd->sd", (2, 1, 8), (2, 5, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS, ids=lambda e: e if isinstance(e, str) else "")
def test_einsum_means_what_it_meant(equation, left, right):
    """Also where it is more than one product, or sums or broadcasts beside it: it then stays as it is."""
    a, b = torch.randn(left), torch.randn(right)

    def f(x, y):
        return torch.einsum(equation, x * 1, y * 1)

    def backend(gm, examples):
        return normalise(gm, examples).forward

    assert_close(equation, torch.compile(f, backend=backend)(a, b), f(a, b), 1e-5)
