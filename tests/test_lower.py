"""Cached operands that attention reads as latents: the same values as decoding first, and no dense value is made.

Keys and values without rotation or norm (GPT-2, OPT, Bloom) are absorbed, rotary keys are decoded (Llama, Falcon).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from oracle import oracle, ranks_of
from torch.fx import GraphModule, Interpreter

from helpers import Recorder, assert_close, cache_name, compiled, generate, latents, new_cache, piecewise, prompt
from lorc_fx.kernels import pack
from lorc_fx.options import Options
from lorc_fx.passes import attention, cost, lower, operands, rewrite
from lorc_fx.report import examined
from lorc_fx.timing import COUNTS

TOKENS, NEW = 9, 3
BOTH, VALUES = {"key", "value"}, {"value"}
#: (family, attention) -> the kinds of sites that are absorbed
CASES = {
    ("gpt2", "sdpa"): BOTH,
    ("gpt2", "eager"): BOTH,
    ("opt", "sdpa"): BOTH,
    ("opt", "eager"): BOTH,
    ("bloom", "eager"): BOTH,
    ("llama-gqa", "sdpa"): VALUES,
    ("llama-gqa", "eager"): VALUES,
    ("llama-bias", "sdpa"): VALUES,
    ("falcon-gqa", "sdpa"): VALUES,
    ("falcon-gqa", "eager"): VALUES,
    ("falcon-mqa", "sdpa"): VALUES,
}


class Watched(Recorder):
    """Runs each graph op by op; ``sizes`` are the shapes that the matrix products of the last call made."""

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        watched = self

        class Watch(Interpreter):
            def run_node(self, node: Any) -> Any:
                out = super().run_node(node)
                if "matmul" in str(node.target):
                    watched.sizes.append(tuple(out.shape))
                return out

        def run(*args: Any) -> Any:
            watched.sizes = []
            return Watch(gm).run(*args)

        return run

    def attends(self) -> bool:
        """Whether the last graph has one attention op over rows for each layer, here one."""
        return sum("lorc.attend" in str(node.target) for node in self.graphs[-1].graph.nodes) == 1

    def dense(self, batch: int, tokens: int, width: int) -> int:
        """How many products made a dense cached value: B x T x n numbers, with tokens along one axis."""
        return sum(tokens in size and torch.Size(size).numel() == batch * tokens * width for size in self.sizes)


def build(name: str, attn: str) -> Any:
    return FAMILIES[name].build(attn=attn, layers=1)


def run(model: Any, pad: int, kind: str = "dynamic") -> Any:
    ids, mask = prompt(2, TOKENS, pad)
    return generate(model, ids, mask, new_cache(model, kind, TOKENS + NEW), new=NEW)


@pytest.fixture(params=["rows", "products"])
def lowering(request, monkeypatch):
    """Attention as one op over rows, or (as where that is not understood) product by product."""
    if request.param == "products":
        monkeypatch.setattr(lower, "find_attention", lambda *_: None)
    for name in ("ANGLES", "PLAIN"):
        monkeypatch.setattr(attention, name, True)
    return request.param


def decoded(lowering: str, absorbed: set[str]) -> int:
    """How many operands are decoded as a whole."""
    return 0 if lowering == "rows" else 2 - len(absorbed)


@pytest.mark.parametrize(("name", "attn"), CASES, ids=str)
def test_absorbed_is_decoded_is_the_oracle(name, attn, clean, monkeypatch, lowering):
    absorbed, watched = CASES[name, attn], Watched()
    model = build(name, attn)
    truth = copy.deepcopy(model)
    compiled(model, ratio=0.5, scheduler="uniform", inner=watched)
    got = {pad: run(model, pad) for pad in (0, 3)}
    cached, width = TOKENS + NEW - 1, latents(got[3].cache)[0][0].codec.width
    assert watched.dense(2, cached, width) == decoded(lowering, absorbed), watched.sizes
    assert watched.attends() == (lowering == "rows" and name != "bloom"), "Bloom's products are of merged heads"
    oracle(FAMILIES[name], truth, ranks_of(got[3].cache))
    for pad, found in got.items():
        assert_close(f"logits after {pad} padded tokens, oracle", found.logits, run(truth, pad).logits, 1e-5)
    universal = build(name, attn)
    monkeypatch.setattr(rewrite, "absorb", lambda *_: {})
    compiled(universal, ratio=0.5, scheduler="uniform", inner=watched)
    for pad, found in got.items():
        assert_close(f"logits after {pad} padded tokens, decoded", found.logits, run(universal, pad).logits, 1e-5)
    assert watched.dense(2, cached, width) == 2, "the universal lowering decodes both"


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bloom"])
def test_pieces_are_the_whole_prompt(name, clean):
    """Prefill and decode of one model: each piece reads the rows of those before it, absorbed or not."""
    model = compiled(FAMILIES[name].build(layers=1), ratio=0.5, scheduler="uniform")
    ids = prompt(2, TOKENS)[0]
    whole = piecewise(model, ids, new_cache(model), [TOKENS])
    assert_close("logits", piecewise(model, ids, new_cache(model), [6, 7, 8, 9]), whole, 1e-5)


@pytest.mark.parametrize(("name", "attn"), [("gpt2", "sdpa"), ("opt", "eager"), ("llama-gqa", "sdpa")], ids=str)
def test_static_caches(name, attn, clean, lowering):
    """The whole buffer is read: rows that nothing has written yet are masked."""
    watched, model = Watched(), build(name, attn)
    truth = copy.deepcopy(model)
    got = run(compiled(model, ratio=0.5, scheduler="uniform", inner=watched), 3, "static")
    width = latents(got.cache)[0][0].codec.width
    assert watched.dense(2, TOKENS + NEW, width) == decoded(lowering, CASES[name, attn]), watched.sizes
    want = run(oracle(FAMILIES[name], truth, ranks_of(got.cache)), 3, "static")
    assert_close("logits", got.logits, want.logits, 1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3"])
def test_decoded_keys_that_heads_share_are_read_once(name, kind, clean, monkeypatch):
    """Static caches come with the keys repeated for every query head; each cached head is multiplied with all of its
    queries at once, and no product has more keys than are cached."""
    monkeypatch.setattr(attention, "ANGLES", False)
    watched = Watched()
    model = build(name, "sdpa")
    truth = copy.deepcopy(model)
    compiled(model, ratio=0.5, scheduler="uniform", inner=watched)
    got = run(model, 3, kind)
    heads, cached = model.config.num_attention_heads, latents(got.cache)[0][0].shape[1]
    scores = [size for size in watched.sizes if len(size) == 4 and size[-1] in (TOKENS + NEW - 1, TOKENS + NEW)]
    assert scores and all(size[1] == cached < heads and size[2] == heads // cached for size in scores), watched.sizes
    oracle(FAMILIES[name], truth, ranks_of(got.cache))
    assert_close("logits, oracle", got.logits, run(truth, 3, kind).logits, 1e-5)


@pytest.mark.parametrize("basis", ["joint", "grouped"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_products_in_16_bits_have_the_same_sizes_at_each_step(name, basis, clean, monkeypatch):
    """oneDNN compiles code for each size; what is padded is cut off again, so nothing else changes."""
    monkeypatch.setattr(lower, "find_attention", lambda *_: None)
    options = {"ratio": 0.4, "basis": basis, "precision": "auto"}

    @torch.no_grad()
    def steps(multiple: int) -> tuple[list[Any], torch.Tensor]:
        monkeypatch.setattr(pack, "MULTIPLE", multiple)
        watched, model = Watched(), build(name, "sdpa").to(torch.bfloat16)
        model = compiled(model, inner=watched, **options)
        ids, cache, sizes, logits = prompt(2, TOKENS + NEW)[0], new_cache(model), [], []
        for start, stop in ((0, TOKENS), *((i, i + 1) for i in range(TOKENS, TOKENS + NEW))):
            out = model(input_ids=ids[:, start:stop], use_cache=True, **{cache_name(model): cache})
            sizes.append(list(watched.sizes))
            logits.append(out.logits.float())
        return sizes[1:], torch.cat(logits, 1)

    sizes, logits = steps(16)
    assert sizes[0] and all(other == sizes[0] for other in sizes), sizes
    other, want = steps(1)
    assert other[0] != other[1], "no product has the tokens among its sizes"
    assert_close("logits", logits, want, 2e-2)


@torch.no_grad()
def test_a_step_that_fills_a_multiple_needs_no_graph_of_its_own(clean):
    """Of inductor, which looks at the sizes of paddings."""
    model = compiled(build("llama-gqa", "sdpa").to(torch.bfloat16), ratio=0.4, precision="auto", inner="inductor")
    ids, cache, before, made = prompt(2, pack.MULTIPLE + 3)[0], new_cache(model), COUNTS["inner_compiles"], []
    for start, stop in ((0, pack.MULTIPLE - 3), *((i, i + 1) for i in range(pack.MULTIPLE - 3, pack.MULTIPLE + 3))):
        model(input_ids=ids[:, start:stop], use_cache=True, **{cache_name(model): cache})
        made.append(COUNTS["inner_compiles"] - before)
    assert made == [1] + [2] * 6, made


@pytest.mark.parametrize(("name", "attn"), CASES, ids=str)
def test_explain_says_how(name, attn, clean, lowering):
    how = "tiles" if lowering == "rows" else "decoding"
    model = build(name, attn)
    ids, mask = prompt(2, TOKENS)
    given = {"attention_mask": mask, cache_name(model): new_cache(model), "use_cache": True}
    report = examined(model, (ids,), given, Options(ratio=0.5, scheduler="uniform", basis="joint"))
    assert {s.kind: s.lowering for s in report.sites} == {
        kind: "latent" if kind in CASES[name, attn] else how for kind in ("key", "value")
    }


def test_at_full_rank_there_is_nothing_to_move(clean):
    """Its codes are the projections themselves: there is no decode matrix."""
    watched = Watched()
    model = compiled(build("gpt2", "sdpa"), ratio=1.0, inner=watched)
    found = run(model, 3)
    assert all(x.codec.decode is None for pair in latents(found.cache) for x in pair)
    assert watched.sizes == [] and not watched.attends(), "SDPA reads both"


def test_selection_tells_moved_columns_from_computed_ones():
    class Epilogue(torch.nn.Module):
        def __init__(self, fn: Any) -> None:
            super().__init__()
            self.fn = fn

        def forward(self, y: Any, positions: Any) -> Any:
            return self.fn(y)

    def found(fn: Any) -> Any:
        return operands._moved(torch.fx.symbolic_trace(Epilogue(fn)), 6, fn)

    assert found(lambda y: y).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert found(lambda y: y.unflatten(2, (3, 2)).transpose(2, 3)).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert found(lambda y: y.to(torch.float32)).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert found(lambda y: y.repeat(1, 1, 2)).flatten().tolist() == [0, 1, 2, 3, 4, 5] * 2
    for computed in (
        lambda y: y * 2, lambda y: -y, lambda y: y + 1, lambda y: y.clamp(max=4), lambda y: y / y.max(),
        lambda y: y.relu(), lambda y: torch.nn.functional.leaky_relu(y, 0.1), lambda y: y.abs(),
        lambda y: y.clamp(-100, 100), lambda y: torch.where(y.abs() < 1e-3, 0.0, y),
    ):  # fmt: skip
        assert found(computed) is None


@pytest.mark.parametrize(
    ("queries", "heads", "dim", "width", "rank", "wanted"),
    [
        (1, 32, 128, 4096, 2048, True),  # a decode step without groups
        (1, 32, 128, 1024, 512, True),  # four queries per cached head
        (1, 4, 256, 256, 128, True),  # one cached head
        (1, 4, 256, 256, 256, True),
        (64, 32, 128, 1024, 512, False),  # a prompt: decoding once serves all its queries
        (1, 32, 2, 4, 4, False),  # heads so small that the latent is wider than they are
        (torch.SymInt, 32, 128, 4096, 2048, False),  # a number of queries that is not known
    ],
)
def test_the_cheaper_way_is_taken(queries, heads, dim, width, rank, wanted):
    assert cost.absorbs(queries, heads, dim, width, rank) is wanted
    if isinstance(queries, int):
        decoding = 2 * rank * width + 2 * queries * heads * dim
        assert wanted == (2 * queries * heads * rank < decoding)
