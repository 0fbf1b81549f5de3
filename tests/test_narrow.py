"""Products that models take apart: of those whose keys and values come from factors, only the columns that are still
read are computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from helpers import assert_close, compiled, new_cache, piecewise, prompt
from lorc_fx.passes import narrow as pass_of
from lorc_fx.passes.narrow import narrow

pytestmark = pytest.mark.usefixtures("quiet", "many_shapes")

aten = torch.ops.aten


def traced(function: Any, *inputs: torch.Tensor) -> GraphModule:
    """ATen before decompositions, as the rewriter leaves it; weights are inputs, with fakes for values."""
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def widths(gm: GraphModule) -> list[int]:
    """Columns of each product with a weight."""
    sizes = []
    for node in gm.graph.nodes:
        if node.target in (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default):
            weight, dim = pass_of._weight(node)
            assert weight is not None
            cut = weight.target is aten.slice.Tensor
            sizes.append(weight.args[3] - weight.args[2] if cut else weight.meta["val"].shape[dim])
    return sizes


def narrowed(function: Any, *inputs: torch.Tensor) -> list[int]:
    """Widths after the pass; the graph must compute what it did."""
    gm = traced(function, *inputs)
    want = gm(*inputs)
    narrow(gm.graph, {n: n for n in gm.graph.nodes})
    gm.graph.eliminate_dead_code()
    gm.recompile()
    got = gm(*inputs)
    for a, b in zip(got, want, strict=True):
        assert_close("a part", a, b, 1e-6)
    return widths(gm)


X, W, B = torch.randn(2, 3, 8), torch.randn(24, 8), torch.randn(24)

TAKEN = {
    "the first of three": (lambda x, w: (torch.nn.functional.linear(x, w).split(8, -1)[0],), [8]),
    "the last": (lambda x, w: (torch.nn.functional.linear(x, w).split(8, -1)[2],), [8]),
    "two beside one another": (lambda x, w: torch.nn.functional.linear(x, w).split(8, -1)[1:], [16]),
    "the outer two": (lambda x, w: torch.nn.functional.linear(x, w).split(8, -1)[::2], [24]),
    "pieces of unequal size": (lambda x, w: (torch.nn.functional.linear(x, w).split([4, 14, 6], 2)[1],), [14]),
    "chunks": (lambda x, w: (torch.nn.functional.linear(x, w).chunk(5, -1)[4] * 2,), [4]),
    "a slice from the end": (lambda x, w: (torch.nn.functional.linear(x, w)[..., -6:],), [6]),
    "slices of a slice": (lambda x, w: (torch.nn.functional.linear(x, w)[..., 4:20][..., 2:],), [16]),
    "heads": (lambda x, w: (torch.nn.functional.linear(x, w).view(2, 3, 6, 4)[:, :, :-2],), [16]),
    "one head": (lambda x, w: (torch.nn.functional.linear(x, w).view(2, 3, 6, 4).select(2, -1),), [4]),
    "a part of each head": (lambda x, w: (torch.nn.functional.linear(x, w).view(2, 3, 6, 4)[..., :2],), [24]),
    "heads and columns": (
        lambda x, w: ((y := torch.nn.functional.linear(x, w)).view(2, 3, 6, 4)[:, :, 1:3], y[..., 4:7]),
        [8],
    ),
    "heads that begin within": (
        lambda x, w: ((y := torch.nn.functional.linear(x, w)).view(2, 3, 6, 4)[:, :, 2:3], y[..., 7:9]),
        [24],
    ),
    "every other": (lambda x, w: (torch.nn.functional.linear(x, w)[..., :8:2],), [24]),
    "tokens": (lambda x, w: (torch.nn.functional.linear(x, w)[:, 1:],), [24]),
    "also as a whole": (lambda x, w: ((y := torch.nn.functional.linear(x, w))[..., :8], y.sum()), [24]),
    "all": (lambda x, w: torch.nn.functional.linear(x, w).split(8, -1), [24]),
    "a weight that is computed": (lambda x, w: (torch.nn.functional.linear(x, w * 2)[..., :8],), None),
}


@pytest.mark.parametrize("name", TAKEN)
def test_columns_that_are_read(name: str) -> None:
    function, want = TAKEN[name]
    if want is None:
        gm = traced(function, X, W)
        narrow(gm.graph, {n: n for n in gm.graph.nodes})
        assert not [n for n in gm.graph.nodes if n.target is aten.slice.Tensor and n.args[1] == 0]
    else:
        assert narrowed(function, X, W) == want


def test_products_with_a_bias() -> None:
    assert narrowed(lambda x, w, b: (torch.nn.functional.linear(x, w, b)[..., 8:],), X, W, B) == [16]
    flat = X.flatten(0, 1)
    assert narrowed(lambda x, w, b: (torch.addmm(b, x, w).view(2, 3, 24).split(8, 2)[1],), flat, W.T.clone(), B) == [8]
    gm = traced(lambda x, w, b: (torch.addmm(b, x, w, beta=2)[:, :8],), flat, W.T.clone(), B)
    before = str(gm.graph)
    narrow(gm.graph, {n: n for n in gm.graph.nodes})
    assert str(gm.graph) == before


def test_a_weight_the_other_way_round() -> None:
    assert narrowed(lambda x, w: (torch.matmul(x, w)[..., 8:],), X, W.T.clone()) == [16]
    gm = traced(lambda x, w: (torch.matmul(x, w.T)[..., 8:],), X, W)
    narrow(gm.graph, {n: n for n in gm.graph.nodes})
    assert any(n.target is aten.slice.Tensor and n.args[2:] == (8, 24) for n in gm.graph.nodes)


def test_a_weight_that_meets_itself() -> None:
    """What is multiplied with the weight stays whole, though it is the same value."""
    assert narrowed(lambda w: (torch.nn.functional.linear(w, w)[..., 8:],), W) == [16]
    assert narrowed(lambda w: (torch.mm(w, w)[:, :3],), W[:8].clone()) == [3]


#: name of the family -> the share of the fused projection that queries are
FULL = {"scheduler": "uniform", "precision": "model", "calibration": "none", "basis": "joint"}
FUSED = {"gpt2": 1 / 3, "phi3": 0.5}


@pytest.mark.parametrize("name", FUSED)
def test_models_with_one_projection_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries alone are computed by it, and tokens are those of the uncompressed model (full rank)."""
    from lorc_fx.passes import rewrite

    shares: list[float] = []

    def watched(graph: Any, old: Any) -> None:
        before = {n: pass_of._columns(n) for n in graph.nodes}
        narrow(graph, old)
        for node, wide in before.items():
            weight, _ = pass_of._weight(node)
            if wide and weight is not None and weight.target is aten.slice.Tensor:
                shares.append((weight.args[3] - weight.args[2]) / wide)

    monkeypatch.setattr(rewrite, "narrow", watched)
    model = FAMILIES[name].build()
    plain = copy.deepcopy(model)
    ids = prompt(2, 12)[0]
    got = piecewise(compiled(model, ratio=1.0, **FULL), ids, new_cache(model, "dynamic", 12), [7, 8, 12])
    want = piecewise(plain, ids, new_cache(plain, "dynamic", 12), [7, 8, 12])
    assert_close("logits", got, want, 1e-4)
    assert shares and all(share == pytest.approx(FUSED[name]) for share in shares), shares
