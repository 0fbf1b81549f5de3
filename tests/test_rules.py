"""Each rule of the matcher on real tensors: change one token of an input, and that token of the output changes only."""

import operator

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import BTHD, NEVER_MIX, NO, ROWS, B, BTn, D, R, T, c, call, name_of, node_of, traced

from lorc_fx.errors import AlreadyRegistered, BadOption
from lorc_fx.passes.axes import Axes, Mixes, groups, shape, tensors
from lorc_fx.passes.rules import ALIKE, RULES, register_rule, rule_of

aten = torch.ops.aten


def nudged(value, axes, b, t, rows):
    """``value`` with its one token (b, t) changed."""
    changed = value.clone()
    at = [slice(None)] * value.dim()
    if axes.batch is not None and axes.batch == axes.token:
        at[axes.token] = b * rows + t
    else:
        if axes.token is not None:
            at[axes.token] = t
        if axes.batch is not None and value.shape[axes.batch] > 1:
            at[axes.batch] = b
    part = value[tuple(at)]
    changed[tuple(at)] = (part + 1) % 3 if value.dtype == torch.int64 else torch.randn(part.shape) * 3
    return changed


def check_tokens(fn, values, at, demand, batch, tokens, constant=False):
    """Changing token (b, t) of one input where the rule says it is changes token (b, t) of the output and no other."""
    before = fn(values)
    for i, axes in enumerate(demand):
        if axes.token is None:
            continue
        for b, t in {(0, 0), (batch - 1, tokens - 1), (0, tokens - 1)}:
            after = fn([nudged(v, axes, b, t, tokens) if j == i else v for j, v in enumerate(values)])
            moved = before != after
            allowed = torch.zeros_like(moved)
            place = [slice(None)] * moved.dim()
            if at.batch is not None and at.batch == at.token:
                place[at.token] = b * tokens + t
            else:
                place[at.token] = t
                if at.batch is not None and axes.batch is not None and values[i].shape[axes.batch] > 1:
                    place[at.batch] = b
            allowed[tuple(place)] = True
            assert moved.any() != constant, "the token had no effect" if not constant else "the token had an effect"
            assert not (moved & ~allowed).any(), f"other tokens changed: input {i}, token {(b, t)}"


def extents(out, at):
    if at.batch is not None and at.batch == at.token:
        return B, T
    return 1 if at.batch is None else out.shape[at.batch], out.shape[at.token]


@pytest.mark.parametrize("case", ROWS, ids=name_of)
def test_rule(case):
    op, arguments, values, at, want = case
    node = node_of(op, arguments, values)
    if want is None:
        with pytest.raises(Mixes):
            rule_of(node).back(node, at)
        return
    demand = rule_of(node).back(node, at)
    assert [n for n, _ in demand] == tensors(node)
    assert [a for _, a in demand] == want
    if op in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, aten.unbind.int):
        run = lambda v: call(op, arguments, v)[0]  # noqa: E731
    else:
        run = lambda v: call(op, arguments, v)  # noqa: E731
    check_tokens(run, values, at, want, *extents(run(values), at), op in ALIKE)


@pytest.mark.parametrize("case", [r for r in ROWS if r[0] in NEVER_MIX], ids=name_of)
def test_rule_on_every_axis(case):
    """Ops that cannot mix: whichever axis holds the tokens, the rule finds it, or says that no input has it."""
    op, arguments, values, _, _ = case
    node = node_of(op, arguments, values)
    first = lambda v: v[0] if isinstance(v, (list, tuple)) else v  # noqa: E731
    run = lambda v: first(call(op, arguments, v))  # noqa: E731
    out = run(values)
    for axis in range(out.dim()):
        at = Axes(None, axis)
        if op is operator.getitem and axis == 3:  # the axis that the list was cut along: the cut itself refuses it
            continue
        demand = [a for _, a in rule_of(node).back(node, at)]
        check_tokens(run, values, at, demand, 1, out.shape[axis], op in ALIKE)
        if all(a.token is None for a in demand):
            assert out.shape[axis] == 1 or op in (aten.stack.default, aten.expand.default, aten.broadcast_to.default)


def test_no_row_lacks_a_case():
    positive = {op for op, *_, want in ROWS if want is not None}
    negative = {op for op, *_, want in ROWS if want is None} | NEVER_MIX
    assert set(RULES) - positive == set(), "no positive case"
    assert set(RULES) - negative == set(), "no negative case"
    assert not NEVER_MIX & {op for op, *_, want in ROWS if want is None}


def test_what_has_no_row():
    graph = traced(lambda x: torch.sort(x.cumsum(1), 1)[0], [BTn])
    found = {n.target: rule_of(n) for n in graph.nodes if n.op == "call_function"}
    assert found[aten.cumsum.default] is None and found[aten.sort.default] is None
    assert rule_of(next(iter(graph.nodes))) is None


# -- views ------------------------------------------------------------------------------------------------------------

#: before, after, (batch, token) after, where they were before (None: cannot be followed)
VIEWS = [
    ([2, 3, 24], [2, 3, 4, 6], (0, 1), (0, 1)),
    ([6, 24], [2, 3, 24], (0, 1), (0, 0)),
    ([2, 3, 24], [6, 24], (0, 0), (0, 1)),
    ([6, 24], [6, 4, 6], (0, 0), (0, 0)),
    ([6, 24], [2, 3, 4, 6], (0, 1), (0, 0)),
    ([2, 4, 3, 6], [8, 3, 6], (None, 1), (None, 2)),
    ([2, 1, 24], [2, 1, 4, 6], (0, 1), (0, 1)),
    ([1, 3, 24], [1, 3, 4, 6], (0, 1), (0, 1)),
    ([1, 1, 24], [1, 1, 4, 6], (0, 1), (0, 1)),
    ([2, 24], [2, 1, 4, 6], (0, 1), (0, 0)),
    ([1, 1, 24], [1, 24], (0, 0), (0, 1)),
    ([2, 3, 4, 6], [2, 3, 24], (0, 1), (0, 1)),
    ([2, 3, 24], [2, 12, 6], (0, 1), None),
    ([2, 3, 24], [6, 24], (None, 0), None),
    ([3, 4, 6], [12, 6], (None, 0), None),
]


@pytest.mark.parametrize(("before", "after", "at", "want"), VIEWS)
def test_views(before, after, at, want):
    node = node_of(aten.view.default, c("0", after), [R(*before)])
    if want is None:
        with pytest.raises(Mixes):
            rule_of(node).back(node, Axes(*at))
        return
    assert [a for _, a in rule_of(node).back(node, Axes(*at))] == [Axes(*want)]


@st.composite
def regroupings(draw):
    """A value [B, S, ...] with sizes of one in odd places, and a view of it that keeps or moves group borders."""
    b, s = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    features = draw(st.lists(st.sampled_from([1, 4, 6]), max_size=2))
    before = draw(st.sampled_from([[b, s, *features], [s, b, *features], [b * s, *features], [b, 4, s, *features]]))
    atoms = [a for size in before for a in ([2, 2] if size == 4 else [2, 3] if size == 6 else [size])]
    after = []
    for atom in atoms:
        if after and draw(st.booleans()):
            after[-1] *= atom
        else:
            after.append(atom)
    for _ in range(draw(st.integers(0, 2))):
        after.insert(draw(st.integers(0, len(after))), 1)
    return before, after


@settings(max_examples=150)
@given(shapes=regroupings(), seed=st.integers(0, 2**31), data=st.data())
def test_views_are_sound(shapes, seed, data):
    """Whatever axes the rule gives, they hold on real tensors."""
    before, after = shapes
    value = torch.randn(before, generator=torch.Generator().manual_seed(seed))
    node = node_of(aten.view.default, c("0", after), [value])
    axis = st.integers(0, len(after) - 1)
    at = Axes(data.draw(st.one_of(st.none(), axis)), data.draw(axis))
    try:
        ((_, found),) = rule_of(node).back(node, at)
    except Mixes:
        return
    if at.batch == at.token or found.batch == found.token:  # merged: sizes of each are not in the shape
        return
    if found.token is not None:
        batch = 1 if at.batch is None or found.batch is None else after[at.batch]
        check_tokens(lambda v: v[0].reshape(after), [value], at, [found], batch, after[at.token])


@settings(max_examples=150)
@given(shapes=regroupings())
def test_groups_are_the_finest_split(shapes):
    before, after = shapes
    runs = groups([sympy.Integer(x) for x in before], [sympy.Integer(x) for x in after])
    assert [i for left, _ in runs for i in left] == list(range(len(before)))
    assert [j for _, right in runs for j in right] == list(range(len(after)))
    for left, right in runs:
        assert torch.tensor([before[i] for i in left]).prod() == torch.tensor([after[j] for j in right]).prod()


@pytest.mark.parametrize("merged", [False, True])
def test_symbolic_sizes(merged):
    """A dynamic number of tokens (and of batch rows merged with them) is followed by its symbol."""
    fn = (lambda x: x.reshape(-1, 24).reshape(-1, 4, 6)) if merged else (lambda x: x.view(x.shape[0], x.shape[1], 4, 6))
    graph = traced(fn, [R(5, 7, 24)], dynamic={(0, 0), (0, 1)})
    nodes = [n for n in graph.nodes if n.target in (aten.view.default, aten.reshape.default)]
    assert str(shape(nodes[0])[0]) != "5"
    at = Axes(0, 0) if merged else Axes(0, 1)
    for node in reversed(nodes):
        ((_, at),) = rule_of(node).back(node, at)
    assert at == Axes(0, 1)


# -- rules of one's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def own_op():
    @torch.library.custom_op("lorc_test::scaled", mutates_args=())
    def scaled(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return x * by

    scaled.register_fake(lambda x, by: torch.empty_like(x))
    op = torch.ops.lorc_test.scaled.default
    yield op
    RULES.pop(op, None)


def test_register_rule(own_op):
    values = [BTHD, R(D)]
    node = node_of(own_op, c("0", "1"), values)
    assert node.target is own_op and rule_of(node) is None

    @register_rule(own_op, role="scale", words="scales by a vector")
    def rule(node, axis):
        if axis == 3:
            raise Mixes("has its tokens among the features")
        return [(node.args[0], axis), (node.args[1], None)]

    assert rule_of(node).role == "scale" and rule_of(node).words == "scales by a vector"
    assert [a for _, a in rule_of(node).back(node, Axes(0, 1))] == [Axes(0, 1), Axes(*NO)]
    check_tokens(lambda v: own_op(*v), values, Axes(0, 1), [Axes(0, 1), Axes(*NO)], B, T)
    with pytest.raises(Mixes):
        rule_of(node).back(node, Axes(0, 3))
    with pytest.raises(AlreadyRegistered, match="scaled"):
        register_rule(own_op)(rule)


def test_a_role_that_there_is_not_is_refused(own_op):
    with pytest.raises(BadOption, match=r"role='pointwize'.*scale.*Did you mean 'pointwise'"):
        register_rule(own_op, role="pointwize")
    assert own_op not in RULES


def test_built_in_rules_are_not_replaced():
    with pytest.raises(AlreadyRegistered):
        register_rule(aten.linear.default)(lambda node, axis: [])
