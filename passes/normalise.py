"""Dynamo graph -> canonical ATen graph: one spelling for what means the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorc_fx.compat import canonical_trace, example_value, is_held, is_module_state, size_expr, written_nodes
from lorc_fx.latent import LatentKV

from .axes import is_end
from .einsum import expand_einsum
from .readers import ALLOCATIONS, CACHE_OPS, viewed
from .vmapped import expand_vmap

aten = torch.ops.aten


def placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def logical(value: Any) -> Any:
    """A fake LatentKV as the dense fake tensor that it stands for; anything else as it is."""
    if isinstance(value, LatentKV):
        return value.codes.new_empty(value.shape, dtype=value.dtype)
    return value


def normalise(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Trace to ATen on Dynamo's own fakes (``movedim``, ``concat`` and the like as what torch composes them of) and
    remove what does nothing.

    1. ``to(x, dtype of x)``, ``type_as`` of the same dtype, ``dropout`` in eval, ``detach``, a slice of all  ->  x
    2. ``type_as(x, y)``  ->  ``to.dtype(x, dtype of y)``
       ``narrow(x, dim, start, n)``  ->  ``slice(x, dim, start, start + n)``
    3. ``baddbmm(a, x, y)``  ->  ``beta * a + alpha * bmm(x, y)``, without ``a`` (which may be anything) where beta is 0
    4. ``bmm`` of [B*H, ..] views of [B, H, ..]  ->  ``matmul`` in four dims, viewed as [B*H, ..]
    5. ``index_put_(x, .., view(v))`` that only drops leading axes of one  ->  ``index_put_(x, .., v)``
       ``squeeze(x)``  ->  ``squeeze(x, dims)``, so that no other axis is dropped where the ops run on one token
       ``reshape_as(x, y)``, ``view_as``, ``expand_as``  ->  the op with the sizes of y
       ``einsum`` of two values  ->  ``matmul`` (``einsum.py``)
    6. ``clamp_(x)`` and other writes feature by feature into a value that nothing else sees  ->  ``clamp(x)``
    7. ``x[..., a:b] = y`` and the like in a value that the graph makes, by no cache op  ->  ``slice_scatter(x, y, ..)``
    8. equal slices of an input that nothing writes to (each layer its last cosines)  ->  the first of them

    Each placeholder keeps, in ``meta``: ``val`` (the dense fake of the logical shape), ``latent`` (the fake LatentKV,
    where the input is one), ``decode`` (True for a LatentKV with dense tokens at its end: it goes in decoded) and
    ``state`` (True for parameters, buffers, and tables of angles that a module has otherwise). Other in-place writes
    stay in place.
    """
    sources = placeholders(gm)
    values = [example_value(p) for p in sources]
    canonical = canonical_trace(expand_vmap(gm), [logical(v) for v in values])
    for node, source, value, example in zip(placeholders(canonical), sources, values, example_inputs, strict=True):
        node.meta["state"] = is_module_state(source, example) or (is_held(source) and _is_table(node))
        node.meta["latent"] = value if isinstance(value, LatentKV) and value.tail is None else None
        node.meta["decode"] = isinstance(value, LatentKV) and value.tail is not None
    for node in list(canonical.graph.nodes):
        if node.target is aten.narrow.default:
            _slice_of_narrow(node)
        elif node.target is aten.squeeze.default:
            _name_dims(node)
        elif node.target is aten.einsum.default:
            expand_einsum(node, _replace)
        elif node.target in _AS:
            _sizes_of_other(node)
        elif node.target is aten.index_put_.default:
            _keep_leading_ones(node)
        else:
            _simplify(node)
    _out_of_place(canonical)
    _scattered(canonical)
    for source in placeholders(canonical):
        _unite_slices(source)
    for node in list(canonical.graph.nodes):
        if node.target is aten.baddbmm.default:
            node = _split_baddbmm(node)
        if node.target is aten.bmm.default:
            _unmerge(node)
    canonical.graph.eliminate_dead_code(is_impure)
    canonical.graph.lint()
    canonical.recompile()
    return canonical


def _out_of_place(gm: GraphModule) -> None:
    """Case 6. The value must own its storage, and no view of it may be about when it is written."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        target = _functional(node)
        source = node.args[0] if target is not None else None
        if target is None or not isinstance(source, Node) or not _fresh(source):
            continue
        if any(order[user] < order[node] and not _fresh(user) for user in source.users):
            continue
        with gm.graph.inserting_before(node):
            made = gm.graph.call_function(target, node.args, node.kwargs)
        made.meta = dict(node.meta)
        order[made] = order[node]
        later = {user for user in source.users if order[user] > order[node]}
        source.replace_all_uses_with(made, delete_user_cb=later.__contains__)
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)


def _scattered(gm: GraphModule) -> None:
    """Case 7: a write into slices and selections becomes a new value of what they are views of, and whoever reads that,
    or a view of it, after the write reads the new one. (Models compose angles of several axes of positions so.)"""
    for write in list(gm.graph.nodes):
        view, written = (*write.args, None, None)[:2]
        functional = aten.copy_.default if write.target is aten.copy_.default else _functional(write)
        if functional is None or not isinstance(view, Node):
            continue
        chain = list(viewed(view))
        kinds = [node.target for node in chain]
        known = len(chain) > 1 and _fresh(chain[-1]) and kinds[-1] not in CACHE_OPS | ALLOCATIONS
        if not known or not _SCATTERS.keys() >= set(kinds[:-1]):
            continue
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        seen = [node for node in gm.graph.nodes if order[node] < order[write] and chain[-1] in viewed(node)]
        if any(map(written_nodes, seen)):
            continue
        with gm.graph.inserting_before(write):
            if functional is aten.copy_.default:
                made = written
                if not isinstance(made, Node) or made.meta["val"].shape != view.meta["val"].shape:
                    continue
                if made.meta["val"].dtype != view.meta["val"].dtype:
                    made = gm.graph.call_function(aten.to.dtype, (made, view.meta["val"].dtype))
            else:
                made = gm.graph.call_function(functional, write.args, write.kwargs)
            made.meta.setdefault("val", view.meta["val"])
            for node, parent in zip(chain, chain[1:], strict=False):
                made = gm.graph.call_function(_SCATTERS[node.target], (parent, made, *node.args[1:]), node.kwargs)
                made.meta = dict(parent.meta)
            fresh = {chain[-1]: made}
            for node in seen[1:]:
                fresh[node] = gm.graph.node_copy(node, partial(_of, fresh))
        for old, new in fresh.items():
            later = {user for user in old.users if order.get(user, -1) > order[write]}
            old.replace_all_uses_with(new, delete_user_cb=later.__contains__)
        write.replace_all_uses_with(fresh[view])
        gm.graph.erase_node(write)


def _of(found: dict[Node, Node], node: Node) -> Node:
    return found.get(node, node)


_SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


def _functional(node: Node) -> Any:
    """The op that returns what this one writes into its first argument, where it works feature by feature in one
    dtype; else None."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable or not schema.name.endswith("_"):
        return None
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    found = getattr(packet, schema.overload_name or "default", None)
    values = [a.meta.get("val") for a in node.all_input_nodes]
    same = all(isinstance(v, torch.Tensor) and v.dtype == values[0].dtype for v in values)
    return found if found is not None and same and torch.Tag.pointwise in found.tags else None


def _fresh(node: Node) -> bool:
    """Whether an op makes a new value, which is no view of another."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and all(r.alias_info is None for r in schema.returns)


_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default}
_NOTHING = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default}


def _simplify(node: Node) -> None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return
    same = before.dtype == after.dtype and before.device == after.device
    if node.target is aten.type_as.default and not same:
        with node.graph.inserting_before(node):
            cast = node.graph.call_function(aten.to.dtype, (source, after.dtype))
        cast.meta["val"] = after
        node.replace_all_uses_with(cast)
        node.graph.erase_node(node)
        return
    nothing = node.target in _NOTHING or node.target is aten.type_as.default
    nothing |= node.target in _CASTS and same and node.target is not aten._to_copy.default and not _copies(node)
    nothing |= node.target is aten.slice.Tensor and _takes_all(*node.args[1:])
    nothing |= node.target is aten.dropout.default and (not node.args[2] or node.args[1] == 0)
    if nothing:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _takes_all(dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Whether a slice takes everything, whatever the size: ``x[:, :, -5:]`` begins with one where the batch is
    symbolic."""
    return start in (None, 0) and is_end(end) and step == 1


def _copies(node: Node) -> bool:
    """``to(..., copy=True)``: positional in the overloads that have it, or by name."""
    flags = {aten.to.dtype: 3, aten.to.device: 4}.get(node.target)
    return bool(node.kwargs.get("copy") or (flags is not None and len(node.args) > flags and node.args[flags]))


def is_impure(node: Node) -> bool:
    """What dead-code elimination must keep: inputs, the output and every op that writes in place."""
    return node.op in ("placeholder", "output") or node.is_impure() or _writes(node)


def _replace(node: Node, target: Any, args: tuple[Any, ...], value: Any) -> Node:
    """Insert an op before ``node`` with the fake value that it has."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args)
    made.meta |= {"val": value, "stack_trace": node.meta.get("stack_trace")}
    return made


_LOOKUPS = {aten.index.Tensor, aten.index_select.default, aten.embedding.default}


def _is_table(node: Node) -> bool:
    """Whether all that is done with a value is to look rows of it up: no call changes it."""
    return bool(node.users) and all(user.target in _LOOKUPS and user.args[0] is node for user in node.users)


def _slice_of_narrow(node: Node) -> None:
    source, dim, start, length = node.args
    if isinstance(start, Node) and isinstance(start.meta.get("val"), torch.Tensor):
        return
    first, extent = (a.meta["val"] if isinstance(a, Node) else a for a in (start, length))
    end: Any = first + extent
    if size_expr(end) == 0 and size_expr(extent) != 0:
        end = None  # a start that is counted from the end, and all from there on: a slice to 0 would be empty
    elif isinstance(start, Node) or isinstance(length, Node):
        end = _replace(node, operator.add, (start, length), end)
    node.replace_all_uses_with(_replace(node, aten.slice.Tensor, (source, dim, start, end), node.meta["val"]))
    node.graph.erase_node(node)


def _name_dims(node: Node) -> None:
    source = node.args[0]
    ones = [i for i, size in enumerate(source.meta["val"].shape) if size_expr(size) == 1]
    node.replace_all_uses_with(_replace(node, aten.squeeze.dims, (source, ones), node.meta["val"]))
    node.graph.erase_node(node)


def _unite_slices(source: Node) -> None:
    """Case 7."""
    pieces = [user for user in source.users if user.target is aten.slice.Tensor and user.args[0] is source]
    if source.meta["latent"] is not None or any(map(_writes, (*source.users, *(u for p in pieces for u in p.users)))):
        return
    first: dict[Any, Node] = {}
    for node in pieces:
        numbers = [size_expr(a.meta["val"]) if isinstance(a, Node) else a for a in node.args[1:]]
        kept = first.setdefault(tuple(numbers), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            node.graph.erase_node(node)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


_AS = {
    aten.reshape_as.default: aten.reshape.default,
    aten.view_as.default: aten.view.default,
    aten.expand_as.default: aten.expand.default,
}


def _sizes_of_other(node: Node) -> None:
    source, other = node.args
    sizes: list[Any] = []
    for dim, size in enumerate(other.meta["val"].shape):
        known = size_expr(size)
        sizes.append(int(known) if known.is_number else _replace(node, aten.sym_size.int, (other, dim), size))
    node.replace_all_uses_with(_replace(node, _AS[node.target], (source, sizes), node.meta["val"]))
    node.graph.erase_node(node)


def _keep_leading_ones(node: Node) -> None:
    """Case 5: setitem drops the leading axes of one of what it writes; the value before has all axes of the target."""
    target, value = node.args[0], node.args[2]
    if value.target not in (aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.select.int):
        return
    source = value.args[0]
    full, kept = source.meta["val"].shape, value.meta["val"].shape
    lost = len(full) - len(kept)
    ones = all(size_expr(s) == 1 for s in full[:lost])
    same = [size_expr(s) for s in full[lost:]] == [size_expr(s) for s in kept]
    if lost > 0 and ones and same and len(full) == len(target.meta["val"].shape):
        node.update_arg(2, source)


def _split_baddbmm(node: Node) -> Node:
    """Case 3; returns the ``bmm``."""
    added, left, right = node.args[:3]
    value = node.meta["val"]
    bmm = _replace(node, aten.bmm.default, (left, right), value)
    found, beta = _replace(node, aten.mul.Tensor, (bmm, node.kwargs.get("alpha", 1)), value), node.kwargs.get("beta", 1)
    if isinstance(beta, Node) or beta != 0:
        shift = _replace(node, aten.mul.Tensor, (added, beta), added.meta["val"])
        found = _replace(node, aten.add.Tensor, (shift, found), value)
    node.replace_all_uses_with(found)
    node.graph.erase_node(node)
    return bmm


def _unmerge(node: Node) -> None:
    """Case 4: batch and heads apart, so that a cached operand keeps its batch axis."""
    left, right = (_four_dims(a) for a in node.args[:2])
    if left is None or right is None:
        return
    a, b = left.meta["val"], right.meta["val"]
    if [size_expr(s) for s in a.shape[:2]] != [size_expr(s) for s in b.shape[:2]]:
        return
    sizes = [*a.shape[:2], *node.meta["val"].shape[1:]]
    product = _replace(node, aten.matmul.default, (left, right), node.meta["val"].new_empty(sizes))
    static = [int(e) if (e := size_expr(s)).is_number else None for s in node.meta["val"].shape]
    if static.count(None) > 1:
        return
    merged = _replace(node, aten.reshape.default, (product, [-1 if s is None else s for s in static]), node.meta["val"])
    node.replace_all_uses_with(merged)
    node.graph.erase_node(node)


def _four_dims(node: Any) -> Node | None:
    """The [B, H, X, Y] value of which ``node`` is a [B*H, X, Y] view, perhaps with X and Y swapped."""
    if node.target is aten.transpose.int and {d % 3 for d in node.args[1:3]} == {1, 2}:
        inner = _four_dims(node.args[0])
        if inner is None:
            return None
        with node.graph.inserting_before(node):
            made = node.graph.call_function(aten.transpose.int, (inner, 2, 3))
        made.meta["val"] = inner.meta["val"].transpose(2, 3)
        return made
    if node.target not in (aten.view.default, aten.reshape.default):
        return None
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if len(before) != 4 or len(after) != 3:
        return None
    same = [size_expr(s) for s in before[2:]] == [size_expr(s) for s in after[1:]]
    return source if same else None
