"""Builds generated kernels for a device that is not there: that they compile, and what they need of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorc_fx.packing import Format

from . import encode, encode_source
from .attend import Attend
from .config import LATE, Config
from .generator import generate
from .launch import combining, given_of, load, operands, source_key
from .stored import Stored

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """shared: bytes of shared memory. source: the kernel's text. binary: ``cubin`` or ``hsaco``."""

    shared: int
    source: str
    binary: bytes


def build(
    about: Attend,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
    config: Config,
    target: Any,
) -> Built:
    """Compiles the kernel that ``launch.attend`` would run on these tensors (whatever device they are on) for
    ``target``, a ``triton.backends.compiler.GPUTarget``. Raises NotGenerated where there is none, and what Triton
    raises."""
    given = given_of(about, query, keys, values, extras)
    kernel = generate(about, given, config)
    module = load(kernel.source, source_key(about, given, config))
    f32 = torch.empty(16)
    args = [query, f32, f32, f32, f32, *operands(about, kernel, keys, values, extras), 1, 1, 1]
    made = _compiled(module.attend, args, LATE, {"num_warps": config.warps, "num_stages": config.stages}, target)
    args = [f32, f32, f32, f32, f32, f32, 1, 1, *combining(about, given, kernel), 0, 1, 0]
    merged = _compiled(module.combine, args, ("rows", "splits", "sink_b", "sink_h", "sink_s"), {}, target)
    binary = made.asm.get("cubin") or made.asm["hsaco"]
    return Built(max(made.metadata.shared, merged.metadata.shared), kernel.source, binary)


def build_encode(
    x: torch.Tensor,
    matrix: torch.Tensor,
    shift: torch.Tensor | None,
    offsets: torch.Tensor | None,
    spread: torch.Tensor | None,
    form: Format,
    target: Any,
) -> Built:
    """Compiles the kernels that ``encode.encode`` would run on x [S, B, d]; ``binary`` is that of the one that packs.
    Raises what Triton raises."""
    tokens, batch, depth = x.shape
    width = matrix.shape[0]
    module = encode.module(form, matrix.dtype, width, shift is not None, spread is not None)
    splits, each = encode.stretches(depth)
    parts = torch.empty(splits, tokens * batch, width)
    sizes = (tokens * batch, batch, each, width, depth, encode.ROWS, encode.COLUMNS, encode.DEPTH)
    args = [x, matrix, parts, *x.stride(), *matrix.stride(), *sizes]
    projected = _compiled(module.project, args, encode_source.LATE, {}, target)
    out = torch.empty(tokens, batch, form.width, dtype=form.storage)
    args = [*encode.packing(parts, shift, offsets, spread, form, out), tokens * batch, batch, splits, 0]
    packed = _compiled(module.pack, args, encode_source.LATE, {}, target)
    binary = packed.asm.get("cubin") or packed.asm["hsaco"]
    shared = max(projected.metadata.shared, packed.metadata.shared)
    return Built(shared, Path(module.__file__ or "").read_text(), binary)


def _compiled(function: Any, args: list[Any], late: tuple[str, ...], options: dict[str, int], target: Any) -> Any:
    """As at a launch: a 1 is compiled in, multiples of 16 are known as such, unless an argument is ``late``."""
    import triton
    from triton.compiler import ASTSource

    signature, fixed, aligned = {}, {}, {}
    for i, (name, a) in enumerate(zip(function.arg_names, args, strict=True)):
        if isinstance(a, torch.Tensor):
            signature[name] = _POINTERS[a.dtype]
        elif name.isupper() or (name not in late and a == 1):
            signature[name], fixed[name] = "constexpr", a
        else:
            signature[name] = "i32"
        if isinstance(a, torch.Tensor) or (name not in late and name not in fixed and a % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=target, options=options)
