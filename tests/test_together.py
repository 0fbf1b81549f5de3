"""Rows of a layer's keys and values are packed in one call, and never across a write that comes first."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch.fx import Graph, GraphModule

from helpers import compiled, new_cache, piecewise, prompt
from lorc_fx.kernels import pack as by_op
from lorc_fx.packing import Format, Segment
from lorc_fx.passes.together import pack_together

aten, lorc = torch.ops.aten, torch.ops.lorc
FORM = Format((Segment(4, 4),), 1, torch.float32)


def count(gm: GraphModule) -> int:
    return sum(n.target is lorc.pack.default for n in gm.graph.nodes)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_one_call_a_layer(name: str, kind: str) -> None:
    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    model = FAMILIES[name].build(layers=3)
    options = {"calibration": "none", "scheduler": "energy", "precision": "auto", "inner": inner}
    piecewise(compiled(model, ratio=0.4, **options), prompt(2, 12)[0], new_cache(model, kind, 12), [10, 11, 12])
    assert graphs and {count(gm) for gm in graphs} == {3}


def graph_of(write: bool, depends: bool) -> GraphModule:
    """Two packs: rows of the first are written before the second one if ``write``; the second takes them if
    ``depends``."""
    graph = Graph()
    x, y, cell = (graph.placeholder(name) for name in ("x", "y", "cell"))

    def pack(latent: Any) -> Any:
        made = graph.call_function(lorc.pack.default, ([latent], [None], [None], [None], [None], by_op.spelled(FORM)))
        return graph.call_function(operator.getitem, (made, 0))

    first = graph.call_function(aten.transpose.int, (pack(x), 0, 1))
    if write:
        graph.call_function(aten.copy_.default, (cell, first))
        y = graph.call_function(aten.add.Tensor, (y, graph.call_function(aten.mul.Tensor, (cell, 1))))
    second = pack(
        graph.call_function(aten.to.dtype, (graph.call_function(aten.slice.Tensor, (first, 2, 0, 4)), torch.float32))
        if depends
        else y
    )
    graph.output((first, second, cell))
    return GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(("write", "depends", "calls"), [(False, False, 1), (True, False, 2), (False, True, 2)])
def test_what_comes_first_stays_first(write: bool, depends: bool, calls: int) -> None:
    gm = graph_of(write, depends)
    x, y, cell = torch.randn(3, 2, 4), torch.randn(2, 3, 4), torch.zeros(2, 3, FORM.nbytes, dtype=torch.uint8)
    want = gm(x, y, cell.clone())
    pack_together(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert count(gm) == calls
    for a, b in zip(gm(x, y, cell.clone()), want, strict=True):
        assert torch.equal(a, b)
