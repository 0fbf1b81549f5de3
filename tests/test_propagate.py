"""Errors through whole graphs: at every node of every kind of decoder, what is measured is within its bound."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import test_random_decoders as written
import torch
import torch.nn.functional as F
from certified import hold
from families import FAMILIES, VOCAB
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st
from torch import nn

import hand_written
from lorc_fx.bounds import ACTIVATIONS
from lorc_fx.propagate import layouts, products, tags
from lorc_fx.propagate.known import Known, Tag, known
from lorc_fx.propagate.rounding import rounded
from lorc_fx.propagate.walk import compute

QUICK = ("llama-gqa", "gemma3", "gpt2", "gpt-neox", "bloom", "phi3", "qwen3", "gemma2")
"""Rotary, with norms of keys, fused, partial, ALiBi, soft caps, LayerNorm, GELU spelled out: the rest is slow."""

WAYS: dict[str, dict[str, Any]] = {
    "joint": {"ratio": 0.4, "basis": "joint", "calibration": "none"},
    "auto": {"ratio": 0.6, "calibration": "none"},
    "paper": {"ratio": 0.5, "basis": "joint", "precision": "model", "calibration": "none"},
}


pytestmark = pytest.mark.usefixtures("quiet")


def ids(batch: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(3))


def check_family(name: str, way: str, **more: Any) -> None:
    held = hold(FAMILIES[name].build(**more), {"input_ids": ids(), "use_cache": True}, WAYS[way])
    assert held.ops == ()
    assert held.over == []
    assert held.nodes > 20


@pytest.mark.parametrize(("name", "way"), [*((n, "joint") for n in QUICK), ("gemma3", "auto"), ("phi3", "paper")])
def test_no_node_of_a_family_is_above_its_bound(name: str, way: str) -> None:
    check_family(name, way)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_node_of_any_family_is_above_its_bound(name: str, way: str, attn: str, dtype: torch.dtype) -> None:
    if attn == "sdpa" and not FAMILIES[name].sdpa:
        pytest.skip("transformers has only an eager attention for it")
    check_family(name, way, attn=attn, dtype=dtype)


def test_padding_on_the_left_is_no_exception() -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    given = {"input_ids": ids(), "attention_mask": mask, "use_cache": True}
    held = hold(FAMILIES["llama-gqa"].build(), given, WAYS["joint"])
    assert (held.over, held.ops) == ([], ())


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(s=written.shapes, layers=st.integers(1, 4), way=st.sampled_from(sorted(WAYS)), size=st.floats(0.2, 4))
def test_no_network_of_up_to_four_layers_breaks_a_bound(s: written.Shape, layers: int, way: str, size: float) -> None:
    """Hypothesis looks for the largest measured / bound at any node."""
    s = dataclasses.replace(s, layers=layers)
    model = written.decoder(s)
    with torch.no_grad():
        model.embed.weight.mul_(size)
    inputs = {"ids": ids(s.batch, s.prompt + 3) % written.VOCAB, "cache": None, "past": 0}
    held = hold(model, inputs, WAYS[way])
    target(held.largest)
    assert (held.over, held.ops) == ([], ())


def test_rotary_embedding_of_any_spelling_keeps_norms() -> None:
    """The bound of keys behind it is that of keys before it, however it is written: no factor of sqrt(2)."""
    sizes = []
    for spin in ("halves", "chunks", "complex"):
        torch._dynamo.reset()
        inputs = {"ids": ids(3) % hand_written.VOCAB, "cache": None, "past": 0}
        held = hold(hand_written.decoder(spin=spin), inputs, WAYS["joint"])
        assert (held.over, held.ops) == ([], ())
        keys = [k for k in held.states.values() if k.value.shape == (3, hand_written.KV, 9, hand_written.DIM)]
        sizes.append(sorted(float(k.along(-1).sum()) for k in keys))
    plain = hand_written.decoder(rope=None)
    torch._dynamo.reset()
    held = hold(plain, {"ids": ids(3) % hand_written.VOCAB, "cache": None, "past": 0}, WAYS["joint"])
    keys = [k for k in held.states.values() if k.value.shape == (3, hand_written.KV, 9, hand_written.DIM)]
    want = sorted(float(k.along(-1).sum()) for k in keys)
    for found in sizes:
        assert found == pytest.approx(sizes[0], rel=1e-6)
        assert found[-1] < 1.2 * want[-1]  # which has the bounds of single features beside that of their norm


class Gelu(nn.Module):
    """An activation as older code spells it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


class Quick(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Attention of one head behind which ``tail`` acts on the stream."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.embed, self.tail = nn.Embedding(30, 16), tail
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        x = self.embed(ids)
        q, k, v = (m(x)[:, None] for m in (self.q, self.k, self.v))
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.tail(y) @ self.embed.weight.T, (k, v)


class Op(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


GATE = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
TAILS: dict[str, Any] = {
    "relu squared": lambda x: torch.relu(x).square(),
    "gate": lambda x: F.silu(x @ GATE) * (x @ GATE.T),
    "gelu": lambda x: F.gelu(x),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "layer norm": lambda x: F.layer_norm(x, (16,), GATE[0], GATE[1]),
    "rms norm": lambda x: F.rms_norm(x, (16,), GATE[0]),
    "rms norm of small numbers": lambda x: F.rms_norm(1e-5 * x, (16,)),
    "added several times": lambda x: torch.add(x, 2.0, alpha=3.0) * torch.rsub(x, 1.0),
    "rms by division": lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "rms by power": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).pow(-0.5),
    "norm by its parts": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1.0),
    "softmax": lambda x: x.softmax(-1) @ GATE,
    "softplus": lambda x: F.softplus(x) - 0.5,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "where": lambda x: torch.where(GATE[0] > 0, x, 2 * x),
    "masked": lambda x: x.masked_fill(GATE[0] > 0, 0.0),
    "soft cap": lambda x: 3 * torch.tanh(x / 3),
    "quotient": lambda x: x / (2.0 + torch.sigmoid(x @ GATE)),
    "product of itself": lambda x: x * (x @ GATE),
    "maximum": lambda x: torch.maximum(x, x @ GATE),
    "mean and sum": lambda x: x - x.mean(-1, keepdim=True) + x.sum(-1, keepdim=True) / 7,
    "running sum": lambda x: x.cumsum(1),
    "cosine": lambda x: x.cos() + x.sin(),
    "exp": lambda x: (x / 4).exp(),
    "cube": lambda x: x.pow(3),
    "one feature again and again": lambda x: x[..., torch.zeros(16, dtype=torch.long)],
    "one feature selected again": lambda x: x.index_select(-1, torch.zeros(16, dtype=torch.long)),
    "picked in another order": lambda x: x[..., torch.arange(15, -1, -1)] - x,
    "selected in another order": lambda x: x.index_select(-1, torch.arange(15, -1, -1)) - x,
    "rolled": lambda x: x.roll(1, -1) + x.flip(-1),
    "stacked": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., :16],
}


@pytest.mark.parametrize("name", sorted(TAILS))
@given(seed=st.integers(0, 1000), ratio=st.sampled_from([0.3, 0.6]))
@settings(max_examples=2, suppress_health_check=list(HealthCheck))
def test_each_op_has_a_rule_that_holds(name: str, seed: int, ratio: float) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Block(Op(TAILS[name])).eval().requires_grad_(False)
    held = hold(model, {"ids": ids(2, 7) % 30}, {"ratio": ratio, "basis": "joint", "calibration": "none"})
    assert (held.over, held.ops) == ([], ())


@pytest.mark.parametrize(("tail", "same"), [(Gelu(), F.gelu), (Quick(), None)])
def test_activations_that_are_spelled_out_are_known(tail: nn.Module, same: Any) -> None:
    """Bounded as the one function that they are, and not factor by factor."""
    options = {"ratio": 0.5, "basis": "joint", "calibration": "none"}
    sizes = []
    one = Op(lambda x: F.gelu(x, approximate="tanh")) if same is not None else Op(lambda x: F.silu(1.702 * x) / 1.702)
    for module in (tail, one):
        torch._dynamo.reset()
        torch.manual_seed(0)
        held = hold(Block(module).eval(), {"ids": ids(2, 7) % 30}, options)
        assert (held.over, held.ops) == ([], ())
        sizes.append(float(list(held.states.values())[-1].along(-1).sum()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_what_has_no_rule_has_no_bound_and_is_named() -> None:
    held = hold(
        Block(Op(lambda x: x.sort(-1).values)).eval(), {"ids": ids(1, 7) % 30}, {"ratio": 0.5, "basis": "joint"}
    )
    assert held.over == []
    assert "aten.sort" in " ".join(held.ops)
    assert not bool(torch.isfinite(list(held.states.values())[-1].along(-1)).any())


def test_an_integer_that_depends_on_errors_has_no_bound() -> None:
    """Routing: which expert a token takes may change."""
    held = hold(
        Block(Op(lambda x: GATE[x.argmax(-1)] + x)).eval(), {"ids": ids(1, 7) % 30}, {"ratio": 0.5, "basis": "joint"}
    )
    assert held.over == []
    assert "argmax" in " ".join(held.ops)
    assert not bool(torch.isfinite(list(held.states.values())[-1].along(-1)).any())


def test_features_that_are_taken_again_are_counted_again() -> None:
    """A token's norm stays where its features change their order, and grows where one of them is repeated."""
    error = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    x = known(torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 1))
    for move, norm in ((lambda t: t.roll(1, -1), 1.0), (lambda t: t[:, [0, 0, 0]], 3**0.5)):
        made = layouts.moved(x, move, move(x.value), False)
        assert float(made.norm) == pytest.approx(norm)
        assert float(move(error).norm()) <= float(made.norm) * (1 + 1e-9)


def test_what_only_looks_like_an_activation_is_not_one() -> None:
    """Equal on every number that is likely, and not far out."""
    x = Known(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    plain = Tag(tags.FUNCTION, x, lambda t: t * torch.sigmoid(t), ("plain", 1))
    cut = Tag(tags.FUNCTION, x, lambda t: t.clamp(max=20.0) * torch.sigmoid(t), ("cut", 1))
    assert tags.named(plain) is ACTIVATIONS["silu"]
    assert tags.named(cut) is None


def test_a_vector_times_a_matrix() -> None:
    a, b = (torch.randn(n, dtype=torch.float64) for n in ((3,), (3, 5)))
    made = products.matmul(known(a, a.abs()), known(b, b.abs()), a @ b)
    assert made.each is not None and made.each.shape == (5,)
    assert bool(((2 * a) @ (2 * b) - a @ b).abs().le(made.each + 1e-9).all())


def test_a_running_sum_rounds_at_each_step() -> None:
    """In fp32, of numbers whose sums are not exact: within what is stated, which a bound of one sum would not be."""
    x = torch.rand(1 << 14, generator=torch.Generator().manual_seed(0)) + 0.1
    op, exact = torch.ops.aten.cumsum.default, x.double().cumsum(0)
    made = rounded(op, torch.float32, {"self": Known(x.double()), "dim": 0}, Known(exact))
    alone = torch.zeros(())
    for number in x:
        alone = alone + number
    assert made.each is not None
    assert float((alone.double() - exact[-1]).abs()) <= float(made.each[-1])


def test_graphs_of_other_devices_are_walked_on_the_cpu() -> None:
    """What an op makes on a device it makes here."""
    graph = torch.fx.Graph()
    made = graph.call_function(torch.ops.aten.arange.default, (5,), {"device": torch.device("meta")})
    assert compute(made, {}).tolist() == [0, 1, 2, 3, 4]
