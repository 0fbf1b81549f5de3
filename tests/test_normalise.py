"""One spelling for what means the same: each rewrite gives the same values, and the old spelling is gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorc_fx.passes.normalise import normalise

aten = torch.ops.aten
R = torch.randn

#: name -> function, inputs, ops that are gone, ops that are there
CASES: dict[str, tuple[Any, list[Any], list[Any], list[Any]]] = {
    "narrow": (lambda x: x.narrow(1, 1, 2) * 1, [R(2, 4)], [aten.narrow.default], [aten.slice.Tensor]),
    "whole slice": (lambda x: torch.ops.aten.slice(x, 1, 0) * 1, [R(2, 4)], [aten.slice.Tensor], [aten.mul.Tensor]),
    "same cast": (lambda x: x.to(torch.float32) * 2, [R(3)], [aten.to.dtype], [aten.mul.Tensor]),
    "type_as": (lambda x, y: x.type_as(y), [R(3), R(3).double()], [aten.type_as.default], [aten.to.dtype]),
    "reshape_as": (
        lambda x, y: x.reshape_as(y) * 2, [R(6, 2), R(3, 4)], [aten.reshape_as.default], [aten.reshape.default],
    ),
    "expand_as": (lambda x, y: x.expand_as(y) + y, [R(1, 4), R(3, 4)], [aten.expand_as.default], [aten.expand.default]),
    "detach": (lambda x: x.detach() * 2, [R(3)], [aten.detach.default], [aten.mul.Tensor]),
    "copying cast": (lambda x: x.to(torch.float32, copy=True).add_(1), [R(3)], [], [aten.add_.Tensor]),
    "dropout in eval": (
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False) * 2, [R(3)], [aten.dropout.default], [],
    ),
    "baddbmm": (
        lambda a, x, y: torch.baddbmm(a, x, y, beta=0.5, alpha=2.0), [R(3, 2, 4), R(3, 2, 5), R(3, 5, 4)],
        [aten.baddbmm.default], [aten.bmm.default],
    ),
    "bmm of merged heads": (
        lambda x, y: x.reshape(6, 4, 5) @ y.reshape(6, 7, 5).transpose(1, 2), [R(2, 3, 4, 5), R(2, 3, 7, 5)],
        [aten.bmm.default], [aten.matmul.default],
    ),
    "movedim": (lambda x: x.movedim(0, -1) * 1, [R(2, 3, 4)], [aten.movedim.int], [aten.permute.default]),
    "moveaxis": (
        lambda x: torch.moveaxis(x, (0, 1), (1, 0)) * 1, [R(2, 3, 4)], [aten.moveaxis.intlist], [aten.permute.default],
    ),
    "concat": (lambda x, y: torch.concat([x, y], 1), [R(2, 3), R(2, 4)], [aten.concat.default], [aten.cat.default]),
    "hstack": (lambda x, y: torch.hstack([x, y]), [R(2, 3), R(2, 4)], [aten.hstack.default], [aten.cat.default]),
    "tensor_split": (
        lambda x: torch.tensor_split(x, 2, -1)[1] * 1, [R(2, 6)], [aten.tensor_split.sections], [aten.slice.Tensor],
    ),
    "tile": (lambda x: x.tile(1, 2) * 1, [R(2, 3)], [aten.tile.default], [aten.repeat.default]),
    "multiply": (lambda x: torch.multiply(x, x), [R(3)], [aten.multiply.Tensor], [aten.mul.Tensor]),
    "adjoint": (lambda x: x.adjoint() * 1, [R(3, 4)], [aten.adjoint.default], [aten.transpose.int]),
    "bmm of plain batches": (lambda x, y: torch.bmm(x, y), [R(3, 2, 5), R(3, 5, 4)], [], [aten.bmm.default]),
}  # fmt: skip


def clamped(x: Any, view: bool = False) -> Any:
    """Written into after it was read, perhaps with a view of it about."""
    y = x * 2
    seen = y[0] if view else (y + 1)[0]
    y.clamp_(-0.5, 0.5)
    return seen + y


HERE, THERE = [aten.clamp_.default], [aten.clamp.default]
CASES |= {
    "in place in a value of its own": (clamped, [R(3, 4)], HERE, THERE),
    "in place under a view": (lambda x: clamped(x, view=True), [R(3, 4)], THERE, HERE),
    "in place in an input": (lambda x: x.clamp_(-0.5, 0.5) + x, [R(3, 4)], THERE, HERE),
    "in place in another dtype": (lambda x, y: (x * 2).mul_(y), [R(3).double(), R(3)], [], [aten.mul_.Tensor]),
}


def normalised(fn: Any, inputs: list[Any]) -> Any:
    """What the backend makes of Dynamo's graph of ``fn``."""
    found = []

    def keep(gm: Any, examples: Any) -> Any:
        found.append(normalise(gm, examples))
        return found[-1].forward

    with torch.no_grad():
        got = torch.compile(fn, backend=keep, dynamic=False)(*[x.clone() for x in inputs])
    return found[0], got


@pytest.mark.parametrize("name", CASES)
def test_same_values_one_spelling(name: str, clean: None) -> None:
    fn, inputs, gone, there = CASES[name]
    graph, got = normalised(fn, inputs)
    torch.testing.assert_close(got, fn(*[x.clone() for x in inputs]))
    targets = {n.target for n in graph.graph.nodes}
    assert not targets & set(gone) and targets >= set(there), targets


@pytest.mark.parametrize("batch", [1, 2])
def test_setitem_keeps_the_axes_of_one(batch: int, clean: None) -> None:
    """At batch one Dynamo's setitem writes [H, 1, D]; all axes of the buffer come back."""

    def fn(buffer: Any, at: Any, new: Any) -> Any:
        buffer[:, :, at] = new
        return buffer

    graph, got = normalised(fn, [torch.zeros(batch, 3, 5, 4), torch.tensor([2]), R(batch, 3, 1, 4)])
    assert int((got != 0).sum()) == batch * 12
    (write,) = [n for n in graph.graph.nodes if n.target is aten.index_put_.default]
    assert write.args[2].meta["val"].shape == (batch, 3, 1, 4)
