"""Decoders as people write them, and the graphs before and after: what is coded, what is left alone and why."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hand_written import DIM, KV, ROOM, VOCAB, WIDTH, N, check, decoder, run
from helpers import assert_close, options
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV
from lorc_fx.passes import sites

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore::lorc_fx.errors.EagerWarning")]

FORMS = [
    {"layout": layout, "rope": rope} for layout in ("BHTD", "BTHD", "BTn", "TBn") for rope in ("before", "after", None)
] + [
    {"fused": "rows"}, {"fused": "heads"}, {"lora": True}, {"fused": "rows", "layout": "BTn", "rope": None},
    {"nest": "tuple"}, {"nest": "dict"}, {"form": "slice"}, {"form": "index"}, {"form": "slice", "rope": "after"},
    {"form": "slice", "layout": "BTHD"}, {"form": "index", "layout": "TBn", "rope": None}, {"form": "narrow"},
    {"layout": "BTn", "twist": "unflatten"}, {"layers": 2},
    {"spin": "chunks"}, {"spin": "complex"}, {"spin": "complex", "fused": "heads", "layout": "BTn"},
    {"fused": "rows", "twist": "clamp"}, {"fused": "heads", "twist": "clamp"}, {"fused": "rows", "twist": "norm"},
    {"layout": "BHDT"}, {"layout": "BHDT", "rope": "after"}, {"layout": "BHDT", "form": "slice"},
    {"layout": "BHDT", "read": "matmul"}, {"layout": "BHDT", "read": "einsum"},
    {"form": "put"}, {"form": "copy"}, {"form": "put", "layout": "BTHD"}, {"form": "copy", "layout": "TBn"},
    {"form": "put", "rope": "after"}, {"form": "copy", "layout": "BTn", "nest": "dict"},
    {"form": "put", "nest": "tuple", "layers": 2},
    {"angles": "table"}, {"angles": "lone"}, {"angles": "lone", "form": "index"}, {"angles": "table", "layers": 2},
    {"read": "einsum"}, {"read": "einsum", "rope": "after"}, {"read": "matmul", "form": "put"},
]  # fmt: skip


@pytest.mark.parametrize("kind", FORMS, ids=lambda k: "-".join(f"{a}={b}" for a, b in k.items()))
def test_hand_written_decoders_are_coded(kind):
    values, _, said = check(decoder(**kind))
    assert all(isinstance(v, LatentKV) for v in values), said
    assert not said


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("layout", ["BHTD", "BTHD", "BTn", "TBn"])
def test_prompts_of_one_token(layout, tokens):
    values, _, said = check(decoder(layout=layout), tokens=tokens)
    assert all(isinstance(v, LatentKV) for v in values), said


# -- what must be left alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twist", ["shift", "conv"])
def test_what_mixes_tokens_before_the_projection_is_fair(twist):
    """A token shift or a convolution makes the activation; keys and values are still affine in it, token by token."""
    values, _, said = check(decoder(rope=None, twist=twist))
    assert all(isinstance(v, LatentKV) for v in values) and not said


@pytest.mark.parametrize(("twist", "reason"), [
    ("late shift", "`aten.cat.default` concatenates along the tokens|has no rule|takes some tokens"),
    ("gate", "no single vector to code"),
    ("glu", "32 features of its projection become 16 in the cache"),
    ("unknown", "aten.cumsum.default"),
])  # fmt: skip
def test_what_is_not_understood_stays_dense_and_right(twist, reason):
    values, recorder, said = check(decoder(rope=None, twist=twist))
    assert not any(isinstance(v, LatentKV) for v in values)
    assert said and "not understood" in said[0] and re.search(reason, said[0]), said


def test_angles_as_inputs_of_the_call():
    """cos and sin come with the call, for one layer only: they would cost more than half of what the cache holds."""
    values, _, said = check(decoder(), turn=True)
    keys, others = values[::2], values[1::2]
    assert not any(isinstance(k, LatentKV) for k in keys)
    assert all(isinstance(v, LatentKV) for v in others)
    assert any("bytes per token beside the projection" in text for text in said), said


def test_angles_as_inputs_cost_nothing_where_keys_are_kept_as_they_are():
    """Nothing is decoded then, so nothing is kept beside."""
    values, _, said = check(decoder(), turn=True, basis="identity")
    assert all(isinstance(v, LatentKV) for v in values) and not said, said
    assert all(k.positions is None for k in values[::2])


@pytest.mark.parametrize("ratio", [1.0, 0.75])
def test_angles_as_inputs_are_kept_where_that_costs_little(monkeypatch, ratio):
    """They are kept for each token, once for all layers that share them."""
    monkeypatch.setattr(sites, "SIDE_SHARE", 2.0)
    values, _, said = check(decoder(), ratio=ratio, turn=True)
    assert all(isinstance(v, LatentKV) for v in values), said
    assert values[0].positions.shape == (12, 3, 2 * DIM) and values[0].positions.dtype == torch.float32


class WithState(nn.Module):
    """A decoder that also keeps the inputs of a convolution, and a table of where each token was sorted to."""

    def __init__(self):
        super().__init__()
        self.inner, self.p, self.conv = decoder(), nn.Linear(WIDTH, WIDTH), nn.Conv1d(WIDTH, VOCAB, 3)

    def forward(self, ids, cache, past):
        pairs, state = (None, torch.zeros(len(ids), 0, WIDTH)) if cache is None else cache
        logits, pairs = self.inner(ids, pairs, past)
        state = torch.cat([state, self.p(self.inner.embed(ids))], 1)
        order = ids.flatten().argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        mixed = self.conv(F.pad(state.mT, (2, 0))).mT[:, -ids.shape[1] :].flatten(0, 1)
        return logits + mixed[order][back].view_as(logits), (pairs, state)


def test_a_state_that_no_attention_reads_is_left_alone():
    torch.manual_seed(0)
    model = WithState().eval().requires_grad_(False)
    want, _ = run(model)
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0, strict=True))
    got, (pairs, state) = run(call)
    assert_close("logits", got, want, 1e-5)
    assert all(isinstance(v, LatentKV) for pair in pairs for v in pair)
    assert type(state) is torch.Tensor and state.shape == (3, 12, WIDTH)


@pytest.mark.parametrize("form", ["slice", "index", "narrow"])
def test_a_buffer_from_outside_stays_dense(form):
    cache = [tuple(torch.zeros(3, KV, ROOM, DIM) for _ in range(2))]
    values, _, said = check(decoder(form=form), cache=cache)
    assert not any(isinstance(v, LatentKV) for v in values)
    assert said and re.search("(?s)outside of a compiled graph.*model.compile", said[0]), said


def test_a_filled_cache_from_outside_stays_dense():
    model = decoder()
    _, cache = run(model, steps=0)
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0))
    with pytest.warns(LorcWarning, match="(?s)outside of a compiled graph.*model.compile"):
        out, cache = call(torch.tensor([[1]] * 3), cache, 9)
    assert_close("logits", out, model(torch.tensor([[1]] * 3), run(model, steps=0)[1], 9)[0], 1e-5)
    assert not any(isinstance(v, LatentKV) for pair in cache for v in pair)


# -- the graph before and after ---------------------------------------------------------------------------------------


def linears(graph):
    return [tuple(n.args[1].meta["val"].shape) for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default]


def test_the_dense_projection_is_gone():
    model = decoder(layers=1)
    values, recorder, _ = check(model, ratio=0.5)
    assert all(isinstance(v, LatentKV) for v in values)
    ranks = sorted(v.codec.rank for v in values)
    for graph in recorder.graphs:
        shapes = linears(graph)
        assert (N, WIDTH) not in shapes
        assert sorted(rows for rows, _ in shapes if rows < N) == ranks
        assert len(shapes) == 4  # q, two encoders, o


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("twist", ["view", "strides"])
def test_attention_over_latents_has_other_strides(twist, tokens):
    """SDPA's result can be viewed after its transpose; what is absorbed need not be so laid out."""
    model, plain = decoder(rope=None, twist=twist), decoder(rope=None)
    plain.load_state_dict(model.state_dict())
    got, _ = run(torch.compile(model, backend="lorc", options=options(ratio=0.5)), tokens=tokens)
    want, _ = run(torch.compile(plain, backend="lorc", options=options(ratio=0.5)), tokens=tokens)
    assert_close("logits", got, want, 1e-5)


def test_decode_writes_rows_in_place():
    _, recorder, _ = check(decoder(layers=1), ratio=0.5)
    assert len(recorder.graphs) == 2
    prefill, decode = ({**recorder.ops(i)} for i in (0, 1))
    assert "aten.copy_.default" not in prefill
    assert decode["aten.copy_.default"] == 3  # codes of k and v, positions of k
    for node in recorder.graphs[1].graph.nodes:
        if node.target is torch.ops.aten.copy_.default:
            window = node.args[0].args[0]
            assert window.op == "placeholder" and window.name.endswith(("codes", "positions"))
        if node.target is torch.ops.aten.cat.default:
            dim = node.args[1] if len(node.args) > 1 else 0
            assert dim == -1, f"{node.format_node()} joins tokens"


def test_what_comes_out_is_what_was_planned():
    values, _, _ = check(decoder(), ratio=0.5)
    dense = len(values) * N * 4
    used = sum(v.used_nbytes() for v in values) / (3 * 12)
    assert used <= 0.5 * dense
    for value in values:
        assert value.shape == (3, KV, 12, DIM) and value.codes.shape == (12, 3, value.codec.rank)
    keys = values[::2]
    assert all(torch.equal(k.positions, torch.arange(12, dtype=torch.int32)[:, None].expand(12, 3)) for k in keys)
    assert all(v.positions is None for v in values[1::2])
