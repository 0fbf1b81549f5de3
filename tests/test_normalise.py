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
    "slice of all": (
        lambda x: aten.slice.Tensor(x, 0, 0, (1 << 63) - 1) * aten.slice.Tensor(x, 0), [R(3)], [aten.slice.Tensor], [],
    ),
    "slice of some": (lambda x: aten.slice.Tensor(x, 0, 0, 2) * x[1:], [R(3)], [], [aten.slice.Tensor]),
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


def masked(x: Any) -> Any:
    """As masks are built from functions of indices: one vmap within another, and a lookup by both."""
    rows, columns = torch.arange(x.shape[0]), torch.arange(x.shape[1])
    return torch.vmap(torch.vmap(lambda i, j: (x[i, j] > 0) & (j <= i), (None, 0)), (0, None))(rows, columns)


def sliced(x: Any, write: bool = False) -> Any:
    """Equal slices of an input, and another; perhaps with a write between, which both would see."""
    seen = x[1:] * 2
    if write:
        x.add_(1)
    return seen + x[1:] + x[:-1]


def test_slices_of_two_values_at_one_place_stay_two(clean: None) -> None:
    def fn(x: Any, y: Any, n: int) -> Any:
        return x[n:] + y[n:]

    found = []

    def keep(gm: Any, examples: Any) -> Any:
        found.append(normalise(gm, examples))
        return found[-1].forward

    x, y = R(9, 2), R(9, 2)
    call = torch.compile(fn, backend=keep, dynamic=True)
    for n in (3, 4):
        torch.testing.assert_close(call(x, y, n), fn(x, y, n))


CASES |= {
    "equal slices": (sliced, [R(3, 4)], [], [aten.slice.Tensor]),
    "equal slices and a write": (lambda x: sliced(x, write=True), [R(3, 4)], [], [aten.add_.Tensor]),
    "vmap": (lambda x, y: torch.vmap(lambda a, b: a * 2 + b)(x, y) + 1, [R(3, 4), R(3, 4)], [], [aten.mul.Tensor]),
    "vmap twice": (masked, [R(3, 4)], [], [aten.index.Tensor]),
    "vmap with a constant": (
        lambda x: torch.vmap(lambda a: a * torch.tensor([1.0, 2.0]))(x) * x, [R(3, 2)], [], [aten.mul.Tensor],
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("write", [False, True])
def test_equal_slices_are_one_unless_something_is_written(write: bool, clean: None) -> None:
    graph, _ = normalised(lambda x: sliced(x, write), [R(3, 4)])
    assert len([n for n in graph.graph.nodes if n.target is aten.slice.Tensor]) == 2 + write


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


def test_vmap_over_sizes_that_vary(clean: None) -> None:
    found = []

    def keep(gm: Any, examples: Any) -> Any:
        found.append(normalise(gm, examples))
        return found[-1].forward

    call = torch.compile(masked, backend=keep, dynamic=True)
    for sizes in ((3, 4), (5, 7)):
        x = R(*sizes)
        torch.testing.assert_close(call(x), masked(x))
    assert len(found) == 1


def test_a_region_that_cannot_be_traced_leaves_no_vmap_open(clean: None, monkeypatch: Any) -> None:
    from lorc_fx.passes import vmapped

    def halfway(run: Any) -> Any:
        def trace(*given: Any) -> Any:
            torch._C._functorch._vmap_increment_nesting(3, "error")
            raise RuntimeError("halfway")

        return trace

    monkeypatch.setattr(vmapped, "make_fx", halfway)
    with pytest.raises(Exception, match="halfway"):
        normalised(masked, [R(3, 4)])
    assert not torch._C._functorch.maybe_current_level()
