"""The matcher's rules as data: an op, its inputs, where the output has (batch, token), and where the inputs have them.

``ROWS`` holds (op, arguments, inputs, axes of the output, axes of each tensor input); None instead of the last: the
rule must say that the op mixes tokens.
"""

import operator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lorc_fx.compat import canonical_trace
from lorc_fx.passes.axes import Axes
from lorc_fx.passes.rules import ALIKE

aten = torch.ops.aten
B, T, H, D = 2, 3, 4, 6
R = torch.randn


def I(*size, high=5):  # noqa: E743
    return torch.randint(0, high, size)


def traced(fn, values, dynamic=()):
    """The canonical graph of ``fn`` on fakes; ``dynamic``: (input, dim) pairs of symbolic sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = []
    for i, value in enumerate(values):
        kinds = [DimDynamic.DYNAMIC if (i, d) in dynamic else DimDynamic.STATIC for d in range(value.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes.append(mode.from_tensor(value, symbolic_context=context, static_shapes=False))
    return canonical_trace(fn, fakes).graph


def node_of(op, arguments, values, dynamic=()):
    """The node of ``op`` in the trace; made by hand where tracing takes the op apart."""
    found = [n for n in traced(lambda *v: call(op, arguments, v), values, dynamic).nodes if n.target is op]
    if found:
        return found[-1]
    graph = Graph()
    holders = [graph.placeholder(f"x{i}") for i in range(len(values))]
    for holder, value in zip(holders, values, strict=True):
        holder.meta["val"] = value
    args, kwargs = arguments
    node = graph.call_function(op, tuple(holders[int(a)] if isinstance(a, str) else a for a in args), kwargs)
    node.meta["val"] = call(op, arguments, values)
    return node


def c(*args, **kwargs):
    """Arguments of the op: "0" and "1" stand for the inputs."""
    return args, kwargs


def call(op, arguments, values):
    def pick(a):
        return values[int(a)] if isinstance(a, str) else [pick(x) for x in a] if isinstance(a, list) else a

    args, kwargs = arguments
    if op is operator.getitem:
        return aten.split.Tensor(*map(pick, args))[1]
    return op(*map(pick, args), **kwargs)


ROWS: list[tuple] = []


def row(op, fn, inputs, at, *want):
    """One positive case (``want``: axes per tensor input) or, with ``want`` None, one negative case."""
    ROWS.append((op, fn, inputs, Axes(*at), None if want == (None,) else [Axes(*w) for w in want]))


BTHD, BHTD, BTn = R(B, T, H, D), R(B, H, T, D), R(B, T, H * D)
NO = (None, None)
row(aten.t.default, c("0"), [R(D, T)], (None, 0), (None, 1))
row(aten.transpose.int, c("0", 1, 2), [BTHD], (0, 2), (0, 1))
for op in (aten.swapaxes.default, aten.swapdims.default):
    row(op, c("0", 1, -2), [BTHD], (0, 2), (0, 1))
row(aten.mT.default, c("0"), [BHTD], (0, 3), (0, 2))
row(aten.mT.default, c("0"), [BHTD], (0, 2), (0, 3))
row(aten.numpy_T.default, c("0"), [R(D, T)], (None, 0), (None, 1))
row(aten.permute.default, c("0", [0, 2, 1, 3]), [BTHD], (0, 2), (0, 1))
row(aten.transpose.int, c("0", -1, -2), [BHTD], (0, 3), (0, 2))
row(aten.permute.default, c("0", [2, 0, -1, 1]), [BTHD], (1, 3), (0, 1))
row(aten.unsqueeze.default, c("0", -2), [BTn], (0, 1), (0, 1))
row(aten.unsqueeze.default, c("0", 0), [R(T, D)], (0, 1), (None, 0))
for op, args in ((aten.squeeze.dim, (1,)), (aten.squeeze.dims, ([1, 2],))):
    row(op, c("0", *args), [R(B, 1, T, D)], (0, 1), (0, 2))
row(aten.slice.Tensor, c("0", 3, 0, 3), [BHTD], (0, 2), (0, 2))
row(aten.slice.Tensor, c("0", 2, 0, 9), [BHTD], (0, 2), (0, 2))
row(aten.slice.Tensor, c("0", 2, 1), [BHTD], (0, 2), None)
row(aten.select.int, c("0", 1, 2), [BHTD], (0, 1), (0, 2))
SPLITS = {aten.split.Tensor: 2, aten.split_with_sizes.default: [1, 2], aten.chunk.default: 2, aten.split.sizes: [1, 2]}
for op, size in SPLITS.items():
    row(op, c("0", size, 2), [R(B, T, 3, D)], (0, 1), (0, 1))
    row(op, c("0", size, 1), [BTHD], (0, 1), None)
row(aten.unbind.int, c("0", 2), [BTHD], (0, 1), (0, 1))
row(aten.unbind.int, c("0", 0), [R(H, B, T, D)], (0, 1), (1, 2))
row(operator.getitem, c("0", 2, 3), [BHTD], (0, 2), (0, 2))
row(aten.repeat.default, c("0", [1, 2, 1, 1]), [BHTD], (0, 2), (0, 2))
row(aten.repeat.default, c("0", [1, 1, 2, 1]), [BHTD], (0, 2), None)
row(aten.repeat.default, c("0", [2, 1, 1, 1]), [BHTD], (0, 2), None)
row(aten.repeat_interleave.self_int, c("0", 2, 1), [BHTD], (0, 2), (0, 2))
row(aten.repeat_interleave.self_int, c("0", 2, 2), [BHTD], (0, 2), None)
row(aten.flip.default, c("0", [-1, 1]), [BHTD], (0, 2), (0, 2))
row(aten.flip.default, c("0", [2]), [BHTD], (0, 2), None)
row(aten.roll.default, c("0", [1], [3]), [BHTD], (0, 2), (0, 2))
row(aten.roll.default, c("0", [1], [2]), [BHTD], (0, 2), None)
row(aten.roll.default, c("0", [1], []), [BHTD], (0, 2), None)
for op in (aten.clone.default, aten.contiguous.default, aten.neg.default):
    row(op, c("0"), [BHTD], (0, 2), (0, 2))
for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default):
    row(op, c("0", [-1], True), [BHTD], (0, 2), (0, 2))
    row(op, c("0", [1]), [BHTD], (0, 1), (0, 2))
    row(op, c("0", [2], True), [BHTD], (0, 2), None)
    row(op, c("0", [], True), [BHTD], (0, 2), None)
row(aten.linalg_vector_norm.default, c("0", 2, [-1], True), [BHTD], (0, 2), (0, 2))
row(aten.linalg_vector_norm.default, c("0", 2, [2], True), [BHTD], (0, 2), None)
row(aten.norm.ScalarOpt_dim, c("0", 2, [-1], True), [BHTD], (0, 2), (0, 2))
row(aten.norm.ScalarOpt_dim, c("0", 2, [2], True), [BHTD], (0, 2), None)
row(aten.var.dim, c("0", [-1], False, True), [BHTD], (0, 2), (0, 2))
row(aten.var.dim, c("0", [1], False), [BHTD], (0, 1), (0, 2))
row(aten.var.dim, c("0", [2], False, True), [BHTD], (0, 2), None)
row(aten.var.correction, c("0", [-1], correction=0, keepdim=True), [BHTD], (0, 2), (0, 2))
row(aten.var.correction, c("0", [1], correction=0), [BHTD], (0, 1), (0, 2))
row(aten.var.correction, c("0", [2], correction=0, keepdim=True), [BHTD], (0, 2), None)
row(aten.cat.default, c(["0", "1"], -1), [BHTD, BHTD + 1], (0, 2), (0, 2), (0, 2))
row(aten.cat.default, c(["0", "1"], 2), [BHTD, BHTD + 1], (0, 2), None)
row(aten.slice_scatter.default, c("0", "1", 3, 1, 6, 2), [BHTD, R(B, H, T, 3)], (0, 2), (0, 2), (0, 2))
row(aten.slice_scatter.default, c("0", "1", 2, 0, 2), [BHTD, R(B, H, 2, D)], (0, 2), None)
row(aten.select_scatter.default, c("0", "1", 1, 3), [BHTD, R(B, T, D)], (0, 2), (0, 2), (0, 1))
row(aten.select_scatter.default, c("0", "1", -1, 0), [BHTD, R(B, H, T)], (0, 2), (0, 2), (0, 2))
row(aten.select_scatter.default, c("0", "1", 2, 1), [BHTD, R(B, H, D)], (0, 2), None)
row(aten.stack.default, c(["0", "1"], -1), [BHTD, BHTD + 1], (0, 2), (0, 2), (0, 2))
row(aten.stack.default, c(["0", "1"]), [BHTD, BHTD + 1], (1, 3), (0, 2), (0, 2))
row(aten.linear.default, c("0", "1", "2"), [BTn, R(5, H * D), R(5)], (0, 1), (0, 1), NO, NO)
row(aten.linear.default, c("0", "1"), [BTn, R(5, H * D)], (0, 2), None)
row(aten.addmm.default, c("0", "1", "2"), [R(5), R(B * T, D), R(D, 5)], (0, 0), NO, (0, 0), NO)
row(aten.addmm.default, c("0", "1", "2"), [R(T), R(5, D), R(D, T)], (None, 1), None)
row(aten.mm.default, c("0", "1"), [R(T, D), R(D, 5)], (None, 0), (None, 0), NO)
row(aten.mm.default, c("0", "1"), [R(5, D), R(D, T)], (None, 1), NO, (None, 1))
row(aten.bmm.default, c("0", "1"), [R(B, T, D), R(B, D, 5)], (0, 1), (0, 1), (0, None))
row(aten.matmul.default, c("0", "1"), [BHTD, R(D, 5)], (0, 2), (0, 2), NO)
row(aten.matmul.default, c("0", "1"), [BHTD, R(B, H, D, 5)], (0, 2), (0, 2), (0, None))
row(aten.matmul.default, c("0", "1"), [R(B, H, 5, D), R(B, H, D, T)], (0, 3), (0, None), (0, 3))
row(aten.matmul.default, c("0", "1"), [BHTD, R(D)], (0, 2), None)
for op, more in ((aten.softmax.int, ()), (aten._softmax.default, (False,))):
    row(op, c("0", -1, *more), [BHTD], (0, 2), (0, 2))
    row(op, c("0", 2, *more), [BHTD], (0, 2), None)
row(aten.layer_norm.default, c("0", [D], "1", "2"), [BHTD, R(D), R(D)], (0, 2), (0, 2), NO, NO)
row(aten.layer_norm.default, c("0", [T, D]), [BHTD], (0, 2), None)
row(aten.rms_norm.default, c("0", [D], "1"), [BHTD, R(D)], (0, 2), (0, 2), NO)
row(aten.rms_norm.default, c("0", [H, D]), [R(B, T, H, D)], (0, 2), None)
row(aten.embedding.default, c("0", "1"), [R(5, D), I(B, T)], (0, 1), NO, (0, 1))
row(aten.embedding.default, c("0", "1"), [R(5, D), I(B, T)], (0, 2), None)
row(aten.index.Tensor, c("0", ["1"]), [R(5, D), I(B, T)], (0, 1), NO, (0, 1))
row(aten.index.Tensor, c("0", ["1"]), [R(5, D), I(B, T)], (0, 2), (None, 1), (0, None))
row(aten.index.Tensor, c("0", [None, "1"]), [BTn, I(T, high=3)], (0, 1), (0, None), (None, 0))
row(aten.index.Tensor, c("0", [None, None, "1"]), [BTn, I(7)], (0, 1), (0, 1), NO)
row(aten.index.Tensor, c("0", ["1"]), [R(5, B, T, D), I(H)], (1, 2), (1, 2), NO)
row(aten.index.Tensor, c("0", [None, "1"]), [R(D, 5), I(B, T)], (1, 2), NO, (0, 1))
row(aten.index.Tensor, c("0", [None, None, "1"]), [R(B, T, 5), I(H, D)], (0, 1), (0, 1), NO)
row(aten.index.Tensor, c("0", ["1", "2"]), [R(5, 5, D), I(T), I(T)], (None, 0), None)
row(aten.index_select.default, c("0", 0, "1"), [R(5, D), I(T)], (None, 0), NO, (None, 0))
row(aten.index_select.default, c("0", 3, "1"), [BHTD, I(4)], (0, 2), (0, 2), NO)
row(aten.index_select.default, c("0", 2, "1"), [BHTD, I(T, high=3)], (0, 2), None)
row(aten.view_as_complex.default, c("0"), [R(B, T, H, 2)], (0, 1), (0, 1))
row(aten.view_as_real.default, c("0"), [R(B, T, H, dtype=torch.complex64)], (0, 1), (0, 1))
row(aten.view_as_real.default, c("0"), [R(B, T, H, dtype=torch.complex64)], (0, 3), None)
for op in (aten.polar.default, aten.complex.default):
    row(op, c("0", "1"), [BHTD, BHTD + 1], (0, 2), (0, 2), (0, 2))
for op, more in zip(ALIKE, ((), (), (2.5,)), strict=True):
    row(op, c("0", *more), [BHTD], (0, 2), (0, 2))
row(aten.to.dtype, c("0", torch.float64), [BHTD], (0, 2), (0, 2))
row(aten.to.device, c("0", torch.device("cpu"), torch.float64), [BHTD], (0, 2), (0, 2))
for op in (aten.to.dtype_layout, aten._to_copy.default):
    row(op, c("0", dtype=torch.float64), [BHTD], (0, 2), (0, 2))
for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
    row(op, c("0", [B, T, H, D]), [BTn], (0, 1), (0, 1))
    row(op, c("0", [B, H, T, D]), [BTn], (0, 2), None)
row(aten.flatten.using_ints, c("0", 2, 3), [BTHD], (0, 1), (0, 1))
row(aten.flatten.using_ints, c("0", 1, 2), [BTHD], (0, 1), None)
row(aten.unflatten.int, c("0", 2, [H, D]), [BTn], (0, 1), (0, 1))
row(aten.unflatten.int, c("0", 1, [1, T]), [BTn], (0, 2), (0, 1))
row(aten.unflatten.int, c("0", 1, [T, H]), [R(B, T * H, D)], (0, 1), None)
for op in (aten.expand.default, aten.broadcast_to.default):
    row(op, c("0", [B, H, T, D]), [R(B, 1, T, D)], (0, 2), (0, 2))
    row(op, c("0", [H, B, T, D]), [R(B, T, D)], (1, 2), (0, 1))
    row(op, c("0", [B, T, D]), [R(B, 1, D)], (0, 1), (0, None))
    row(op, c("0", [B, T, D]), [R(T, D)], (0, 1), (None, 0))
for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
    row(op, c("0", "1"), [BHTD, R(T, D)], (0, 2), (0, 2), (None, 0))
    row(op, c("0", "1"), [BHTD, R(1, 1, D)], (0, 2), (0, 2), NO)
    row(op, c("0", "1"), [BHTD, R(1, 1, T, D)], (0, 2), (0, 2), (0, 2))
for op in (aten.mul.Scalar, aten.div.Scalar, aten.silu.default, aten.cos.default):
    row(op, c("0", *([2.5] if "Scalar" in str(op) else [])), [BHTD], (0, 2), (0, 2))

#: ops that mix nothing whatever their arguments are: for them, every axis of the output is tried instead
NEVER_MIX = {
    aten.mT.default, aten.numpy_T.default, aten.swapaxes.default, aten.swapdims.default,
    aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.select.int, aten.unbind.int, operator.getitem, aten.clone.default,
    aten.contiguous.default, aten.neg.default, aten.stack.default, aten.to.dtype, aten.to.device,
    aten.to.dtype_layout, aten._to_copy.default, aten.expand.default, aten.broadcast_to.default, aten.add.Tensor,
    aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.mm.default,
    aten.bmm.default, aten.view_as_complex.default, aten.polar.default, aten.complex.default, *ALIKE,
}  # fmt: skip


def name_of(case):
    op, (args, _), values, at, want = case
    what = "mixes" if want is None else "axes"
    sizes = " ".join(str(list(v.shape)) for v in values)
    return f"{getattr(op, '_qualname', op.__name__)} {args[1:]} of {sizes} {what} {tuple(at)}"
