"""The one place that touches private torch APIs, so that a torch release breaks at most this file."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta


def example_value(node: Node) -> Any:
    """The fake tensor, SymInt or constant that Dynamo attached to a placeholder."""
    return node.meta.get("example_value", node.meta.get("val"))


def recompile_limit() -> int:
    """How many graphs Dynamo makes of one piece of code before it gives up."""
    return int(torch._dynamo.config.recompile_limit)


def compile_limits(limit: int) -> dict[str, int]:
    """Keywords for ``torch.compile`` under which Dynamo makes up to ``limit`` graphs of one piece of code. torch 2.11
    has none: there the limit of all that is compiled is raised to that."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": limit}
    torch._dynamo.config.recompile_limit = max(limit, recompile_limit())
    return {}


_OPERATORS = frozenset(
    "setitem iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor".split()
)


def is_in_place(node: Node) -> bool:
    """Whether a node of a Dynamo graph may write into an argument: by its name or schema."""
    if "out" in node.kwargs or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(getattr(node.target, name)._schema.is_mutable for name in node.target.overloads())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.strip("_") in _OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not node.target


def may_be_written(node: Node) -> list[Node]:
    """The inputs that a node of a Dynamo graph may write into: what its schema says; else, where ``is_in_place``, the
    first argument and named ones (also tensors in lists of them), and all inputs of a higher-order op or of one whose
    overload is not chosen yet, whose operands come in any place."""
    if isinstance(node.target, torch._ops.OpOverload):
        return written_nodes(node)
    if not is_in_place(node):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator | torch._ops.OpOverloadPacket):
        return node.all_input_nodes
    found: list[Node] = []
    map_arg((node.args[:1], node.kwargs), found.append)
    return found


def written_arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call of an op writes into by its schema, in any place, by name, in a list or as ``out``; [] of anything
    that has no schema."""
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = (args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments))
    pairs = zip(schema.arguments, given, strict=True)
    return [value for a, value in pairs if a.alias_info is not None and a.alias_info.is_write and value is not None]


def written_nodes(node: Node) -> list[Node]:
    """The nodes that a node of a canonical graph writes into: ``written_arguments``, and all of a user's own kernel."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes if node.target.name().endswith("_mutation") else []
    found: list[Node] = []
    map_arg(written_arguments(node.target, node.args, node.kwargs), found.append)
    return found


def backends() -> list[str]:
    """The names that torch.compile knows."""
    return list(torch._dynamo.list_backends(exclude_tags=()))


def backend(name: str) -> Callable[..., Any]:
    """A backend of torch.compile by name."""
    return torch._dynamo.lookup_backend(name)  # type: ignore[no-any-return]


def inductor_modes() -> tuple[str, ...]:
    """The names of inductor's modes."""
    import torch._inductor

    return tuple(torch._inductor.list_mode_options())


def is_module_state(node: Node, example: Any) -> bool:
    """Whether a Dynamo placeholder is a parameter or a buffer of a module (and not an input of this call)."""
    if isinstance(example, torch.nn.Parameter):
        return True
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return bool(node.meta.get("lorc_module_state", False))
    from torch._dynamo import source as sources

    test = getattr(sources, "is_from_unspecialized_param_buffer_source", None)
    return bool(test is not None and test(source))


def is_held(node: Node) -> bool:
    """Whether a Dynamo placeholder is reached from a module: an attribute of it, or of something that it has."""
    kind = getattr(getattr(node, "_dynamo_source", None), "guard_source", None)
    tests = ("is_unspecialized_nn_module", "is_unspecialized_builtin_nn_module", "is_specialized_nn_module")
    return any(bool(test()) for name in tests if (test := getattr(kind, name, None)) is not None)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no data because Dynamo (or a FakeTensorMode) is only propagating shapes."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def is_functional(tensor: torch.Tensor) -> bool:
    """Whether a tensor is being traced by AOTAutograd, that is, for a compiler which does not know latents."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, FunctionalTensor) or torch._is_functional_tensor(tensor)


def copied(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A Dynamo graph to change: the same nodes over the same module, with all that is known of them, and which became
    which."""
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copies)).meta = dict(gm.graph.output_node().meta)
    made = GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):  # where an input comes from is no part of ``meta``
            new._dynamo_source = old._dynamo_source
    return made, copies


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """The fake mode that Dynamo traced with; a fresh one where no value is fake."""
    mode = detect_fake_mode(list(values))
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)


_COMPOSED = (
    "movedim", "moveaxis", "ravel", "tensor_split", "hsplit", "vsplit", "dsplit", "adjoint", "mH", "concat",
    "concatenate", "hstack", "vstack", "dstack", "column_stack", "tile", "multiply", "divide", "true_divide",
    "subtract", "negative", "absolute", "clip", "square",
)  # fmt: skip
"""Ops that only say in other words what others do: the trace has those."""


@functools.cache
def _spellings() -> dict[Any, Callable[..., Any]]:
    """Each overload of those ops that torch itself composes of others -> what it is composed of."""
    found: dict[Any, Callable[..., Any]] = {}
    for name in _COMPOSED:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            try:
                composed = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
            except RuntimeError:  # an overload for TorchScript alone
                continue
            if composed and not op._schema.is_mutable:
                found[op] = op.decompose
    return found


def canonical_trace(gm: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    """Trace ``gm`` on fake ``values`` to ATen before decompositions (``linear`` and SDPA stay whole).

    Constants in the graph (``torch.tensor([])`` of an empty cache) are real tensors, hence allow_non_fake_inputs.
    Nodes keep the ``stack_trace`` of the user's line that they come from. Raises RuntimeError where the trace has
    a hole: a value that no op of it makes (under ``vmap``) has become a constant without data.

    A subclass that has only ``__torch_dispatch__`` (a shard) cannot run before decompositions. A graph with
    weights in parts (``parts.in_parts``) is then traced after them."""
    try:
        return _traced(gm, values, pre_dispatch=True)
    except Exception:
        if not (isinstance(gm, GraphModule) and gm.meta.get("in_parts")):
            raise
        return _traced(gm, values, pre_dispatch=False)


def _traced(gm: Callable[..., Any], values: Sequence[Any], pre_dispatch: bool) -> GraphModule:
    mode = fake_mode_of(values)
    with batched_execution(mode), torch.no_grad(), preserve_node_meta():
        run = Interpreter(gm).run if isinstance(gm, GraphModule) else gm
        traced = make_fx(lambda *given: run(*given), _spellings(), pre_dispatch=pre_dispatch)(*values)
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(traced, node.target, None), FakeTensor):
            users = ", ".join(str(user.target) for user in node.users)
            raise RuntimeError(f"what {users} reads was not traced (torch.vmap?)")
    return traced


@contextlib.contextmanager
def fake_execution(mode: FakeTensorMode) -> Iterator[None]:
    """Run tensor code on fakes of ``mode`` (also constants that are real)."""
    with mock.patch.object(mode, "allow_non_fake_inputs", True), mode:
        yield


@contextlib.contextmanager
def batched_execution(mode: FakeTensorMode) -> Iterator[None]:
    """``fake_execution`` of symbolic sizes too (make_fx does without after decompositions), and of code under
    ``vmap``: levels left open by an exception are closed."""
    level = torch._C._functorch.maybe_current_level() or 0
    try:
        with fake_execution(mode), enable_python_dispatcher():
            yield
    finally:
        while (torch._C._functorch.maybe_current_level() or 0) > level:
            torch._C._functorch._vmap_decrement_nesting()


def size_expr(size: Any) -> sympy.Expr:
    """A dimension as a SymPy expression (an Integer where it is static); reading it adds no guard."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


_ONE_DIM = {dim: {dim} for dim in range(8)}  # shared: marking happens at each decode step, and nobody adds to them


def mark_weak_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Ask Dynamo to treat one dimension as dynamic from the first trace on, without an error if it specialises."""
    tensor._dynamo_weak_dynamic_indices = _ONE_DIM[dim]  # type: ignore[attr-defined]


@contextlib.contextmanager
def tracing_context(mode: FakeTensorMode) -> Iterator[None]:
    """A tracing context for inductor where none is active (outside of Dynamo's call of the backend)."""
    from torch._guards import TracingContext, tracing

    if TracingContext.try_get() is not None:
        yield
    else:
        with tracing(TracingContext(mode)):
            yield


def compile_with_inductor(gm: GraphModule, inputs: Sequence[Any], mode: str | None) -> Any:
    """Compile a plain ATen graph with inductor; ``inputs`` are fakes of Dynamo's own fake mode."""
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode else {}
    with config.patch(patches):
        return compile_fx(gm, list(inputs), config_patches=patches or None)


def building() -> Any:
    """The lock under which codecs and graphs are made: Dynamo's own (reentrant), so that a thread which it makes
    compile and one that builds in the middle of a call cannot wait for each other."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def to_fake(value: Any, mode: FakeTensorMode) -> Any:
    """A real codec tensor as a fake of static shape; fakes as they are. A symbolic int by the symbol that it was
    found to be equal to: inductor takes inputs by the symbol that they had at first, and finds the other one in a
    tensor's size, which a graph over rows may not have."""
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    if isinstance(value, torch.SymInt) and value.node.expr != value.node._expr:
        return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)
    return value


def apart(examples: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """``examples`` with a fake of its own wherever a tensor comes again: AOTAutograd would take two inputs for
    one, and refuse a call in which they are not (two caches that shared their positions when a graph was traced
    get copies before it writes into them)."""
    seen: set[int] = set()
    found: list[Any] = []
    for value in examples:
        if isinstance(value, torch.Tensor) and id(value) in seen:
            with mode:
                value = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        elif isinstance(value, torch.Tensor):
            seen.add(id(value))
        found.append(value)
    return found


def process_group(name: Any) -> Any:
    """The process group that a collective's last argument stands for (its name, or itself)."""
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group
    return resolve(name) if isinstance(name, str) else name


def traced_by_another_backend() -> str | None:
    """The name of the backend that Dynamo is tracing for; None where it is lorc, or where Dynamo is not tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        compiler: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return None
    seen = 0
    while compiler is not None and seen < 8:
        name = getattr(compiler, "__name__", None) or getattr(compiler, "compiler_name", None)
        if name == "lorc" or getattr(compiler, "reads_latents", False):
            return None
        inner = getattr(compiler, "compiler_fn", None) or getattr(compiler, "_torchdynamo_orig_backend", None)
        if inner is None:
            return str(name or compiler)
        compiler, seen = inner, seen + 1
    return str(compiler)


def compiled_with(model: torch.nn.Module) -> tuple[Any, str | None] | None:
    """``options`` and ``mode`` of the ``model.compile(backend="lorc")`` (or ``torch.compile``) that made ``model``
    what it is; None where there was none, or this torch keeps them elsewhere."""
    context: Any = getattr(model, "dynamo_ctx", None)
    call = getattr(model, "_compiled_call_impl", None)
    if context is None and call is not None:
        names = getattr(getattr(call, "__code__", None), "co_freevars", ())
        cells = getattr(call, "__closure__", None) or ()
        context = next((c.cell_contents for n, c in zip(names, cells, strict=True) if n == "self"), None)
    backend, seen = getattr(context, "callback", None), 0
    while backend is not None and seen < 8:
        given = getattr(backend, "kwargs", None)
        if getattr(backend, "compiler_name", None) == "lorc" and isinstance(given, dict):
            return given.get("options"), given.get("mode")
        backend, seen = getattr(backend, "_torchdynamo_orig_backend", None), seen + 1
    return None


def is_static_address(tensor: torch.Tensor) -> bool:
    """Whether ``torch._dynamo.mark_static_address`` was called on a tensor, which compiled graphs guard."""
    return getattr(tensor, "_dynamo_static_input_type", None) is not None


def skip_frame(reason: str) -> None:
    """Make Dynamo leave the frame that it is tracing to Python (frames that it calls may still be compiled)."""
    from torch._dynamo.exc import SkipFrame

    raise SkipFrame(reason)


def compile_cpp(source: str) -> Any:
    """A ctypes library of ``extern "C"`` functions, built by inductor's C++ compiler with its flags (OpenMP, the
    CPU's own instructions) and kept in inductor's cache on disk. Raises what the compiler, or its absence, raises."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpp_builder import is_gcc

    # inductor's own flags forbid to fuse a product and a sum, and to reorder sums: both are what these loops are made
    # of
    fast = ["-ffp-contract=fast", "-fassociative-math", "-fno-signed-zeros"]
    fast += ["-ftree-loop-vectorize"] if is_gcc() else []
    asked = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters  # torch 2.11 always takes it
    return CppCodeCache.load(source, extra_flags=tuple(fast), **({"needs_vec_isa": True} if asked else {}))


def cpp_compiler() -> str:
    """The C++ compiler that inductor uses. Raises what it raises where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return str(get_cpp_compiler())
