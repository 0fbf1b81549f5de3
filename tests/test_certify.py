"""Certificates: what they promise holds for the model that is really compiled, and what cannot be certified is said."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, make_low_rank
from torch import nn

import hand_written
import lorc_fx
from lorc_fx.errors import BadCertificate, BadOption, UnloadedWeights
from lorc_fx.store import reset

JOINT = {"ratio": 0.5, "basis": "joint", "calibration": "none"}


pytestmark = pytest.mark.usefixtures("quiet")


def ids(batch: int = 1, tokens: int = 20) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def model(name: str = "llama-gqa", **more: Any) -> Any:
    return FAMILIES[name].build(**more)


@pytest.fixture
def llama() -> Any:
    return model()


def test_a_certificate_has_every_site_and_layer_and_is_sound(llama: Any) -> None:
    found = lorc_fx.certify(llama, ids(), options=JOINT)
    assert found.sound
    assert {s.name for s in found.sites} == {f"layer {i} {kind}" for i in range(2) for kind in ("key", "value")}
    assert [x.layer for x in found.layers] == [0, 1]
    assert found.unbounded == ()
    assert all(len(t) == 20 for t in (found.bound, found.measured, found.margin, found.proven, found.kept))
    assert all(s.error.bound.shape == (20,) for s in found.sites)
    first, second = found.layers
    assert torch.allclose(first.alone.bound, first.network.bound, rtol=1e-6)
    assert float(second.network.bound.median()) > float(second.alone.bound.median())


def test_with_errors_known_attention_is_bounded_sharply(llama: Any) -> None:
    """And from their sizes within far more: what sums of norms lose."""
    found = lorc_fx.certify(llama, ids(), options={**JOINT, "ratio": 0.95})
    for layer in found.layers:
        assert layer.linearised is not None
        assert layer.linearised.slack < 1.5
        assert layer.alone.slack > layer.linearised.slack


@pytest.mark.parametrize(
    ("name", "basis"), [("gpt2", "joint"), ("gemma3", "joint"), ("bloom", "joint"), ("gpt2", "grouped")]
)
def test_what_is_bounded_is_the_compiled_model(name: str, basis: str) -> None:
    """Logits of the model that torch.compile gives are within the certificate (and rounding) of the eager ones."""
    dense, given = model(name), {**JOINT, "basis": basis}
    found = lorc_fx.certify(dense, ids(), options=given)
    with torch.no_grad():
        want = dense(input_ids=ids(), use_cache=True).logits
        reset(dense)
        compiled = torch.compile(dense, backend="lorc", options={**given, "inner": "eager"})
        got = compiled(input_ids=ids(), use_cache=True).logits
    away = (got - want)[0].double().abs().amax(-1)
    assert bool((away <= found.bound + 1e-3).all())
    assert torch.allclose(away, found.measured, rtol=0.02, atol=1e-4)
    assert bool((got.argmax(-1)[0] == want.argmax(-1)[0])[found.proven].all())


def test_what_loses_nothing_is_proven_everywhere() -> None:
    exact = model("llama-mha")
    rank = make_low_rank(FAMILIES["llama-mha"], exact, 0.25)
    assert rank == 16
    given = {**JOINT, "ratio": 0.26, "precision": "model", "scheduler": "uniform"}
    found = lorc_fx.certify(exact.double(), ids(), options=given)
    assert bool(found.proven.all())
    assert bool(found.kept.all())
    assert float(found.bound.max()) < 1e-6


def test_proven_implies_kept_and_a_bad_codec_proves_nothing(llama: Any) -> None:
    for ratio in (0.05, 0.3, 0.9):
        reset(llama)
        found = lorc_fx.certify(llama, ids(), options={**JOINT, "ratio": ratio})
        assert bool(found.kept[found.proven].all())
        assert bool((found.measured <= found.bound).all())
    with torch.no_grad():
        assert not bool(lorc_fx.certify(llama, ids(), options={**JOINT, "ratio": 0.05}).proven.any())


def test_what_is_proven_is_kept_where_not_all_is() -> None:
    """And all is proven whose margin is more than twice the bound."""
    given = {"ratio": 0.95, "precision": "auto", "basis": "joint", "calibration": "none"}
    found = lorc_fx.certify(model("bloom", layers=1).double(), ids(), options=given)
    assert 0 < int(found.proven.sum()) < 20
    assert bool(found.kept[found.proven].all())
    assert bool(found.proven[found.margin > 2 * found.bound].all())


def test_the_first_prompt_gives_the_codecs_as_it_does_to_the_compiled_model(llama: Any) -> None:
    given = {"ratio": 0.5, "basis": "joint"}
    prompt = ids(1, 300)
    found = lorc_fx.certify(llama, prompt, options=given)
    with torch.no_grad():
        want = llama(input_ids=prompt, use_cache=True).logits
        reset(llama)
        got = torch.compile(llama, backend="lorc", options={**given, "inner": "eager"})(
            input_ids=prompt, use_cache=True
        )
    away = (got.logits - want)[0].double().abs().amax(-1)  # single tokens may be rounded to another level in fp32
    assert float(away.median()) == pytest.approx(float(found.measured.median()), rel=0.02)


def test_it_can_be_asked_again_and_again(llama: Any) -> None:
    """More often than Dynamo compiles one piece of code: it would run it as it is, and there would be no graph."""
    for tokens in range(4, 14):
        assert len(lorc_fx.certify(llama, ids(1, tokens), options=JOINT).sites) == 4


def test_a_model_in_fp64_can_be_asked_again() -> None:
    """Its weights are walked as they are, the same tensors each time."""
    dense = model(dtype=torch.float64)
    for rounding in (False, True):
        assert lorc_fx.certify(dense, ids(), options=JOINT, rounding=rounding).sound


def test_it_is_a_table_plain_data_and_a_plot(llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot is of the extra `plot`")
    found = lorc_fx.certify(llama, ids(), options=JOINT)
    text = str(found)
    for words in ("attention, all coded", "the same, errors known", "greedy token: proven", "logits: within"):
        assert words in text
    line = json.loads(json.dumps(found.json()))
    assert line["sound"] is True
    assert len(line["sites"]) == 4
    assert set(line["layers"][0]) == {"layer", "alone", "linearised", "network"}
    png, svg = found.plot(tmp_path / "figure")
    assert png.stat().st_size > 10_000
    assert "</svg>" in svg.read_text()


def test_ops_without_a_rule_are_named_and_nothing_is_proven_behind_them() -> None:
    from test_propagate import Block, Op

    block = Block(Op(lambda x: x.sort(-1).values)).eval()
    found = lorc_fx.certify(block, {"ids": ids() % 30}, options=JOINT)
    assert found.unbounded == ("aten.sort.default",)
    assert "no bound behind: aten.sort.default" in str(found)
    assert not bool(found.proven.any())
    assert found.sound


def test_sites_whose_attention_is_not_found_have_their_bounds(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lorc_fx.certify"]  # its name in the package is the function's
    known = module.read_graph

    def unread(*given: Any) -> Any:
        graph, matched, arguments = known(*given)
        return graph, replace(matched, sites=tuple(replace(s, reader=None) for s in matched.sites)), arguments

    want = lorc_fx.certify(llama, ids(), options=JOINT)
    monkeypatch.setattr(module, "read_graph", unread)
    found = lorc_fx.certify(llama, ids(), options=JOINT)
    assert found.layers == () and found.sound
    assert [s.name for s in found.sites] == [s.name for s in want.sites]
    first = [s for s in found.sites if s.layer == 0]
    for got, same in zip(first, want.sites, strict=False):
        assert torch.allclose(got.error.bound, same.error.bound)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.embed(ids) @ self.embed.weight.T,)


class Broken(nn.Module):
    """Two graphs, each with a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = hand_written.decoder(), hand_written.decoder()

    def forward(self, ids: torch.Tensor) -> Any:
        a, kept = self.first(ids, None, 0)
        torch._dynamo.graph_break()
        b, more = self.second(ids, None, 0)
        return a + b, kept, more


def test_what_cannot_be_certified_is_refused() -> None:
    with pytest.raises(BadCertificate, match="no cached key or value"):
        lorc_fx.certify(Plain().eval(), {"ids": ids() % 30})
    with pytest.raises(BadCertificate, match="several graphs"):
        lorc_fx.certify(Broken().eval(), {"ids": ids() % hand_written.VOCAB}, options=JOINT)
    with pytest.raises(BadOption, match="the model has"):
        lorc_fx.certify(model(), torch.tensor([0, 10**6]))
    with pytest.raises(BadOption, match="token ids are ints"):
        lorc_fx.certify(model(), torch.ones(3))
    with pytest.raises(lorc_fx.errors.UnknownOption, match="Did you mean 'ratio'"):
        lorc_fx.certify(model(), ids(), options={"ration": 0.5})
    with pytest.raises(UnloadedWeights):
        lorc_fx.certify(model().to("meta"), ids())


@pytest.mark.parametrize(("name", "dtype"), [("llama-gqa", torch.float32), ("gpt2", torch.bfloat16)])
def test_with_rounding_the_bound_holds_for_the_machine(name: str, dtype: torch.dtype) -> None:
    """Nothing is added to it: the models as they run, in fp32 or in 16 bits."""
    dense = model(name, dtype=dtype)
    exact = lorc_fx.certify(dense, ids(), options=JOINT)
    found = lorc_fx.certify(dense, ids(), options=JOINT, rounding=True)
    assert found.unbounded == ()
    with torch.no_grad():
        want = dense(input_ids=ids(), use_cache=True).logits
        reset(dense)
        got = torch.compile(dense, backend="lorc", options={**JOINT, "inner": "eager"})(input_ids=ids(), use_cache=True)
    away = (got.logits.double() - want.double())[0].abs().amax(-1)
    assert bool((away <= found.bound).all())
    assert bool((found.bound >= exact.bound).all())
    assert found.sound


def test_rounding_alone_is_counted_op_by_op() -> None:
    """A dense model in 16 bits against itself in fp64: within what the ops of its graph can lose."""
    from lorc_fx.certify import Certified
    from lorc_fx.options import Options
    from lorc_fx.propagate import Track
    from lorc_fx.report import traced

    for dtype in (torch.float32, torch.bfloat16):
        dense = model("llama-gqa", dtype=dtype)
        with torch.no_grad():
            logits = dense(input_ids=ids(), use_cache=True).logits
        found = []

        def visit(gm: Any, examples: Any, logits: torch.Tensor = logits, found: list[Any] = found) -> None:
            certified = Certified.of(gm, examples, Options.parse(JOINT))
            assert certified is not None
            track, outputs = Track({}, rounds=True), certified.gm.graph.output_node().all_input_nodes
            certified.walker.run([track], keep=outputs)
            node = next(n for n in outputs if tuple(n.meta["val"].shape) == tuple(logits.shape))
            found.append((certified.walker.dense[node], track.known[node]))

        traced(dense, (), {"input_ids": ids(), "use_cache": True}, visit)
        ((value, bound),) = found
        assert bound.each is not None
        away = (logits.double() - value).abs()
        assert bool((away <= bound.each).all())
        assert bool(torch.isfinite(bound.each).all())


class Odd(nn.Module):
    """One layer of a cache, and behind it something that bounds do not follow, or must."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(30, 16)
        self.q, self.k, self.v, self.o, self.router = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed(ids)
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        empty = x.new_zeros(len(x), 2, 0, 8)
        k, v = torch.cat([empty, k], 2), torch.cat([empty, v], 2)
        if self.kind == "buffer":
            room = [x.new_zeros(len(x), 2, 12, 8) for _ in range(2)]
            k, v = (r.index_copy_(2, torch.arange(ids.shape[1]), t) for r, t in zip(room, (k, v), strict=True))
            k, v = k[:, :, : ids.shape[1]], v[:, :, : ids.shape[1]]
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(made)
        if self.kind == "picked":
            x = x + 5 * x[:, self.router(x).argmax(-1)[0] % ids.shape[1]]
        if self.kind == "mean":
            x = x - x.mean(dim=None, keepdim=True)
        if self.kind == "written":
            h = self.router(x)
            h.transpose(0, 1)[..., :4].mul_(3)
            x = x + h
        return x @ self.embed.weight.T, k, v


def odd(kind: str, **given: Any) -> Any:
    asked = {**JOINT, "ratio": 0.5, "precision": "int4"} | given
    return lorc_fx.certify(Odd(kind).eval(), {"ids": ids(1, 7) % 30}, options=asked)


def test_what_is_picked_by_something_inexact_has_no_bound() -> None:
    found = odd("picked")
    assert "aten.index.Tensor" in found.unbounded and found.sound and not bool(found.proven.any())


def test_a_mean_of_everything_is_bounded() -> None:
    found = odd("mean")
    assert found.unbounded == () and found.sound


def test_buffers_are_written_for_each_model_apart() -> None:
    """What the compressed model writes is not what the dense one reads."""
    assert float(odd("buffer").measured.max()) == pytest.approx(float(odd("").measured.max()), rel=1e-6)


def test_what_is_written_in_place_and_read_again_is_refused() -> None:
    with pytest.raises(BadCertificate, match="written in place and read again"):
        odd("written")
