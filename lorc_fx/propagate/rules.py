"""One rule per op: what is known of its result, from what is known of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lorc_fx.bounds.pointwise import ACTIVATIONS

from . import entrywise, layouts, products, tags
from .known import Known, Tag, known

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """An op of which some argument is not exact: arguments by their names in the schema, and the dense result.
    ``dtype``: in which a machine computes it (None: exactly)."""

    target: Any
    given: dict[str, Any]
    value: Any
    run: Callable[..., Any]
    dtype: torch.dtype | None = None

    def first(self) -> Known:
        return next(v for v in self.given.values() if isinstance(v, Known))


Rule = Callable[[Call], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def scalar(value: Any) -> float | None:
    """A plain number, or an exact tensor of one."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Known) and value.exact and value.value.numel() == 1 and value.value.dim() == 0:
        return float(value.value)
    return None


def as_known(value: Any) -> Known:
    return value if isinstance(value, Known) else Known(torch.as_tensor(value, dtype=torch.float64))


# -- moves ------------------------------------------------------------------------------------------------------

COPIES = {
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.dropout.default,
    aten.lift_fresh_copy.default,
}  # fmt: skip
"""What changes no number."""

CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default, aten.to.device}
"""Neither do casts between floating dtypes, but for a machine's rounding, which is counted apart."""

VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
"""What keeps entries in their order."""

MOVES = (
    *VIEWS, aten.transpose.int, aten.permute.default,
    aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.slice.Tensor, aten.select.int, aten.expand.default, aten.broadcast_to.default, aten.repeat.default,
    aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.movedim.int, aten.movedim.intlist, aten.repeat_interleave.self_int, aten.flip.default, aten.roll.default,
    aten.index.Tensor, aten.index_select.default, aten.swapaxes.default, aten.narrow.default,
)  # fmt: skip


@rule(*COPIES, *CASTS)
def _same(call: Call) -> Known:
    x = call.first()
    return replace(x, value=call.value) if call.value.dtype != x.value.dtype else x


@rule(*MOVES)
def _moves(call: Call) -> Any:
    x = call.first()
    others = (v for v in tree_leaves(list(call.given.values())) if isinstance(v, Known) and v is not x)
    if x.exact or not all(v.exact for v in others):  # what is picked depends on errors
        return None
    made = layouts.moved(x, call.run, call.value, call.target in VIEWS)
    if isinstance(made, tuple):
        return tuple(_linear_part(call, x, m, i) for i, m in enumerate(made))
    return tags.as_matrices(_linear(call, x, made))


def _linear(call: Call, x: Known, made: Known) -> Known:
    rest = tuple(_plain(v) for v in call.given.values() if v is not x)
    return made.tagged(*tags.linear_of(x, call.run, (str(call.target), rest)))


def _linear_part(call: Call, x: Known, made: Known, i: int) -> Known:
    rest = tuple(_plain(v) for v in call.given.values() if v is not x)
    return made.tagged(*tags.linear_of(x, lambda t: call.run(t)[i], (str(call.target), rest, i)))


def _plain(value: Any) -> Any:
    if isinstance(value, Known):
        return value.value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


@rule(operator.getitem)
def _getitem(call: Call) -> Any:
    return call.given["self"][call.given["item"]]


@rule(aten.cat.default, aten.concat.default)
def _cat(call: Call) -> Known:
    parts = list(call.given["tensors"])
    made = layouts.joined(parts, call.given["dim"], call.value)
    dim = call.given["dim"]
    return tags.as_matrices(made.tagged(*tags.added(parts, lambda ts: torch.cat(ts, dim), ("cat", dim))))


@rule(aten.stack.default)
def _stack(call: Call) -> Known:
    parts, dim = list(call.given["tensors"]), call.given["dim"]
    zeros = [torch.zeros_like(p.value) if p.each is None else p.each for p in parts]
    made = known(call.value, torch.stack(zeros, dim))
    return made.tagged(*tags.added(parts, lambda ts: torch.stack(ts, dim), ("stack", dim)))


@rule(aten.view_as_complex.default, aten.view_as_real.default)
def _complex(call: Call) -> Known:
    x = call.first()
    assert x.each is not None
    pairs = x.each.norm(dim=-1) if call.target is aten.view_as_complex.default else x.each[..., None].expand(
        call.value.shape
    )  # fmt: skip
    return _linear(call, x, known(call.value, pairs))


@rule(aten.neg.default)
def _neg(call: Call) -> Known:
    x = call.first()
    assert x.each is not None
    return _linear(call, x, known(call.value, x.each, x.norm, x.axis))


# -- sums and products --------------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
def _add(call: Call) -> Known | None:
    a, b = as_known(call.given["self"]), as_known(call.given["other"])
    factor = float(call.given.get("alpha", 1)) * (1 if "add" in str(call.target) else -1)
    if call.target is aten.rsub.Scalar and factor != -1:  # there it is x that alpha multiplies
        return None
    made = entrywise.plus(a, b, factor, call.value)
    number = scalar(call.given["other"])
    if number is not None:
        return made.tagged(*_shifted(call, a, factor * number))
    if not a.exact and not b.exact:
        lines = tags.added([a, b], lambda ts: ts[0] + factor * ts[1], ("add", factor))
        function = tags.combined(a, b, lambda s, t: s + factor * t, f"add {factor}")
        return tags.as_matrices(made.tagged(*lines, *([] if function is None else [function])))
    return made


def _shifted(call: Call, x: Known, number: float) -> list[Tag]:
    """Tags of x + number (of number - x, each with its sign turned, for ``rsub``)."""
    found = [tags.function_of(x, call.run, (str(call.target), number))]
    square = x.tag(tags.MEAN_SQUARE)
    if square is not None and call.target in (aten.add.Tensor, aten.add.Scalar):
        found.append(replace(square, number=square.number + number))
    return found


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(call: Call) -> Known:
    a, b = as_known(call.given["self"]), as_known(call.given["other"])
    whole = _normed(a, b, call) or _normed(b, a, call)
    if whole is not None:
        return whole
    made = entrywise.times(a, b, call.value)
    if a.exact or b.exact:
        x, other = (b, a) if a.exact else (a, b)
        if other.value.numel() == 1:
            tag = tags.function_of(x, lambda t: t * float(other.value), ("mul", float(other.value)))
            made = made.tagged(tag)
        made = made.tagged(*tags.linear_of(x, lambda t: t * other.value, ("mul", other.value)))
    function = tags.combined(a, b, lambda s, t: s * t, "mul") or made.tag(tags.FUNCTION)
    if function is None:
        return made
    activation = tags.named(function) if len(function.key) > 1 else None
    if activation is not None:
        return entrywise.activation(function.of, activation, call.value)
    if a is b:
        return replace(made, tags=(Tag(tags.SQUARE, a), function))
    return made if made.tag(tags.FUNCTION) is function else made.tagged(function)


def _normed(x: Known, factor: Known, call: Call) -> Known | None:
    """x * (1 / rms(x))."""
    tag = factor.tag(tags.INVERSE_RMS)
    if tag is None or tag.of is not x or call.value.shape != x.value.shape:
        return None
    return entrywise.normed(x, tag.number, None, call.value, False)


@rule(aten.div.Tensor, aten.div.Scalar)
def _div(call: Call) -> Known:
    a, b = as_known(call.given["self"]), as_known(call.given["other"])
    tag = b.tag(tags.RMS)
    if tag is not None and tag.of is a:
        return entrywise.normed(a, tag.number, None, call.value, False)
    if b.exact:
        made = entrywise.times(a, Known(b.value.double().reciprocal()), call.value)
        number = scalar(call.given["other"])
        if number is not None:
            made = made.tagged(tags.function_of(a, lambda t: t / number, ("div", number)))
        return made
    return entrywise.quotient(a, b, call.value)


@rule(aten.pow.Tensor_Scalar, aten.square.default)
def _pow(call: Call) -> Known:
    x, exponent = call.first(), float(call.given.get("exponent", 2))
    made = entrywise.power(x, exponent, call.value).tagged(tags.function_of(x, call.run, ("pow", exponent)))
    if exponent == 2:
        return made.tagged(Tag(tags.SQUARE, x))
    square = x.tag(tags.MEAN_SQUARE)
    return made if square is None or exponent != -0.5 else made.tagged(replace(square, kind=tags.INVERSE_RMS))


@rule(aten.mean.dim)
def _mean(call: Call) -> Known:
    x, dims = call.first(), [d % call.first().value.dim() for d in call.given["dim"] or range(call.first().value.dim())]
    assert x.each is not None
    made = known(call.value, x.each.mean(dims, call.given["keepdim"]))
    square, last = x.tag(tags.SQUARE), dims == [x.value.dim() - 1]
    return made.tagged(replace(square, kind=tags.MEAN_SQUARE)) if square is not None and last else made


@rule(aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default)
def _root(call: Call) -> Known:
    x = call.first()
    assert x.each is not None
    made = entrywise.rising(x, lambda t: call.run(t.clamp_min(1e-300)), call.value)
    assert made.each is not None
    made = known(call.value, torch.where(x.value > x.each, made.each, torch.inf))
    square = x.tag(tags.MEAN_SQUARE)
    if square is None or call.target is aten.reciprocal.default:
        return made
    return made.tagged(replace(square, kind=tags.INVERSE_RMS if call.target is aten.rsqrt.default else tags.RMS))


@rule(aten.sum.dim_IntList, aten.cumsum.default, aten.amax.default, aten.amin.default)
def _reduced(call: Call) -> Known:
    x = call.first()
    assert x.each is not None
    if call.target in (aten.amax.default, aten.amin.default):
        return known(call.value, x.each.amax(call.given["dim"], call.given["keepdim"]))
    return known(call.value, call.run(x.each))


@rule(aten.linear.default)
def _linear_layer(call: Call) -> Known | None:
    x, weight = as_known(call.given["input"]), as_known(call.given["weight"])
    if not weight.exact or call.given["bias"] is not None and not as_known(call.given["bias"]).exact:
        return None
    return products.linear(x, weight.value, call.value)


@rule(aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default)
def _product(call: Call) -> Known | None:
    g = call.given
    if call.target is aten.addmm.default:
        if not as_known(g["self"]).exact or g["alpha"] != 1:
            return None
        a, b = as_known(g["mat1"]), as_known(g["mat2"])
    else:
        a, b = as_known(g["self"]), as_known(g.get("other", g.get("mat2")))
    if b.exact and b.value.dim() == 2 and a.varied is None:
        return products.linear(a, b.value.T, call.value)
    return products.matmul(a, b, call.value)


@rule(aten.scaled_dot_product_attention.default)
def _attention(call: Call) -> Known:
    given = dict(call.given)
    for name in ("query", "key", "value"):
        given[name] = as_known(given[name])
    return products.attention(given, call.value, call.dtype)


# -- entry by entry ------------------------------------------------------------------------------------------------


@rule(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def _softmax(call: Call) -> Known:
    return products.softmax(call.first(), call.given["dim"], call.value)


_NAMED = {
    aten.relu.default: "relu", aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid", aten.silu.default: "silu"
}  # fmt: skip


@rule(*_NAMED, aten.gelu.default)
def _activation(call: Call) -> Known:
    x = call.first()
    exact = call.given.get("approximate", "none") == "none"
    name = _NAMED.get(call.target, "gelu" if exact else "gelu_tanh")
    made = entrywise.activation(x, ACTIVATIONS[name], call.value)
    return made.tagged(tags.function_of(x, ACTIVATIONS[name].function, (name,)))


@rule(aten.exp.default, aten.log.default, aten.softplus.default, aten.clamp.default, aten.clamp_min.default,
      aten.clamp_max.default, aten.leaky_relu.default, aten.elu.default, aten.erf.default, aten.log1p.default,
      aten.hardtanh.default)  # fmt: skip
def _rising(call: Call) -> Known:
    return entrywise.rising(call.first(), call.run, call.value).tagged(
        tags.function_of(call.first(), call.run, (str(call.target), str(list(call.given.values())[1:])))
    )


@rule(aten.abs.default, aten.sin.default, aten.cos.default)
def _slope_one(call: Call) -> Known:
    x = call.first()
    assert x.each is not None
    return known(call.value, x.each, x.norm, x.axis)


@rule(aten.maximum.default, aten.minimum.default)
def _extreme(call: Call) -> Known:
    a, b = as_known(call.given["self"]), as_known(call.given["other"])
    zero = torch.zeros_like(call.value)
    return known(call.value, torch.maximum(zero if a.each is None else a.each, zero if b.each is None else b.each))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _where(call: Call) -> Known | None:
    g = call.given
    if "condition" in g:
        mask, yes, no = g["condition"], as_known(g["self"]), as_known(g["other"])
    else:
        mask, yes, no = g["mask"], as_known(g["value"]), as_known(g["self"])
    if not mask.exact:
        return None
    each = [torch.zeros((), dtype=torch.float64) if x.each is None else x.each for x in (yes, no)]
    return known(call.value, torch.where(mask.value, each[0], each[1]))


# -- norms ---------------------------------------------------------------------------------------------------------


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _norm(call: Call) -> Known | None:
    x, gain = call.first(), call.given["weight"]
    affine = [p for p in (gain, call.given.get("bias")) if p is not None]
    if len(call.given["normalized_shape"]) != 1 or not all(as_known(p).exact for p in affine):
        return None
    centred = call.target is aten.layer_norm.default
    factor = None if gain is None else as_known(gain).value
    return entrywise.normed(x, float(call.given["eps"]), factor, call.value, centred)


@rule(aten.linalg_vector_norm.default)
def _vector_norm(call: Call) -> Known | None:
    x, dims = call.first(), call.given["dim"]
    if float(call.given["ord"]) != 2 or dims is None or len(dims) != 1:
        return None
    dim = dims[0] if dims[0] < 0 else dims[0] - x.value.dim()
    size = x.along(dim)
    return known(call.value, size if call.given["keepdim"] else size.squeeze(dim))
