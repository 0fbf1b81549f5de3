"""Coded caches in graphs that run as they are: decoded for reading, and what such a graph writes is there after it."""

import copy
import operator

import pytest
import torch
from families import FAMILIES
from torch.fx import Graph

from helpers import assert_close, compiled, latents, new_cache, piecewise, prompt
from lorc_fx import backend, errors
from lorc_fx.compat import is_in_place, may_be_written

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_step_that_cannot_be_read(implementation, monkeypatch):
    """A coded cache enters a graph that runs untouched: what that writes into a static cache is there afterwards."""
    model = FAMILIES["gemma3"].build()
    plain, ids = copy.deepcopy(model), prompt(2, 12)[0]
    compiled(model, ratio=1.0)
    cache, dense = (new_cache(m, implementation, 12) for m in (model, plain))
    got, want = piecewise(model, ids[:, :9], cache, [9]), piecewise(plain, ids[:, :9], dense, [9])
    assert_close("prompt", got, want, 1e-4)
    latents(cache)

    def unreadable(*given):
        raise RuntimeError("no")

    monkeypatch.setattr(backend, "normalise", unreadable)
    with pytest.warns(errors.LorcWarning, match="cannot be read: RuntimeError: no"):
        for end in (10, 11, 12):
            got, want = (piecewise(m, ids[:, :end][:, end - 1 :], c, [1]) for m, c in ((model, cache), (plain, dense)))
            assert_close(f"step {end}", got, want, 1e-4)


def test_gradients_after_a_static_prompt():
    model = FAMILIES["llama-gqa"].build()
    plain, ids = copy.deepcopy(model), prompt(2, 9)[0]
    compiled(model, ratio=1.0)
    cache, dense = (new_cache(m, "static", 12) for m in (model, plain))
    piecewise(model, ids[:, :7], cache, [7]), piecewise(plain, ids[:, :7], dense, [7])
    with pytest.warns(errors.LorcWarning, match="uncompressed"):
        model(ids[:, 7:8], past_key_values=cache)
    plain(ids[:, 7:8], past_key_values=dense)
    assert_close("step", piecewise(model, ids[:, 8:], cache, [1]), piecewise(plain, ids[:, 8:], dense, [1]), 1e-4)


@pytest.mark.parametrize(
    "target",
    [
        "add_",
        "__setitem__",
        "__iadd__",
        operator.setitem,
        operator.imul,
        torch.Tensor.copy_,
        torch.ops.aten.copy_.default,
        torch.relu_,
        torch.ops.higher_order.cond,
    ],
)
def test_writes_by_name(target):
    graph = Graph()
    node = graph.call_method if isinstance(target, str) else graph.call_function
    assert is_in_place(node(target, (graph.placeholder("x"),)))


@pytest.mark.parametrize(
    "target",
    ["add", "__getitem__", "__and__", "__invert__", operator.and_, operator.is_, operator.getitem, torch.relu]
    + [torch.ops.aten.add.Tensor, torch.nn.functional.scaled_dot_product_attention],
)
def test_reads_by_name(target):
    graph = Graph()
    node = graph.call_method if isinstance(target, str) else graph.call_function
    assert not is_in_place(node(target, (graph.placeholder("x"),)))


def test_which_inputs_may_be_written():
    """Also tensors in a list, and operands of a higher-order op, which may come by name alone."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    kernel = torch.ops.higher_order.cond
    assert may_be_written(graph.call_method("add_", (x, y))) == [x]
    assert may_be_written(graph.call_function(torch._foreach_add_, ([x, y], 1.0))) == [x, y]
    assert set(may_be_written(graph.call_function(torch.max, (y, 0), {"out": (x,)}))) == {x, y}
    assert may_be_written(graph.call_function(kernel, (), {"kwargs": {"a": x}})) == [x]
    assert may_be_written(graph.call_function(torch.add, (x, y))) == []
