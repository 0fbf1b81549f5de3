"""Runs generated kernels: the op where there is Triton. What gets no kernel runs in tiles, with one warning.

A kernel's source is kept in memory and in a folder (``cache_folder``) under a hash of all that it depends on, and
loaded as a module: Triton compiles functions from their files. Triton's own cache then keeps what it compiles.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lorc_fx.errors import KernelWarning
from lorc_fx.groups import expanded
from lorc_fx.logs import show
from lorc_fx.models import cache_root
from lorc_fx.plan_file import replaced

from . import (
    expressions,
    fallback,
    fixed_source,
    generator,
    numbered,
    operand_source,
    row_source,
    symbolic,
    terms,
    tiled,
    tuned,
    words,
)
from .attend import Attend, Operand
from .config import Config, Given, Kernel, Met, latent
from .expressions import NotGenerated
from .generator import generate
from .numbered import Constant
from .stored import Stored, by_head, strides, times

PROGRAMS = 2
"""Programs for each multiprocessor, about: the last wave then leaves few of them idle."""

FEWEST_BLOCKS = 4
"""Blocks of tokens in a split, at least: below that, merging costs more than it spreads."""

BLOCK_BYTES = 65536
"""Of latents in a block, about: twice that, for two stages, is less than the shared memory of any target but gfx942."""

_WRITERS = (expressions, fixed_source, generator, numbered, operand_source, row_source, symbolic, terms)
_Made = tuple[Kernel, ModuleType]
_Call = tuple[torch.Tensor, Stored, Stored, tuple[torch.Tensor, ...]]
_Key = tuple[Given, Config, str]
_made: MutableMapping[Attend, dict[_Key, _Made | None]] = WeakKeyDictionary()
_smaller: MutableMapping[Attend, dict[_Key, Config]] = WeakKeyDictionary()
"""What to take instead of a config that the device has too little room for."""
_seen: dict[Given, Given] = {}


def attend(
    about: Attend,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
    config: Config | None = None,
) -> torch.Tensor:
    """The op's result [B, H, S, D_v] in the query's dtype. (Of ``turned`` operands queries come as keys are stored, and
    results as values are: ``turned_queries``, ``turned_back``.) ``config``: what to use instead of what a tuner found
    best or, where none did, of the default.

    Where the device has too little room for a kernel, smaller ones are tried. Warns (``KernelWarning``), once per
    reader, where there is no kernel for it: then ``tiled`` computes it.
    """
    given = given_of(about, query, keys, values, extras)
    given = _seen.setdefault(given, given)  # then tables find it by identity
    tokens, batch, usual = keys.rows.shape[0], query.shape[0], default(about, given)
    if config is None:
        here = query.device
        found = tuned.chosen(
            about, tokens, batch, (given, here), lambda: (target(here), words.kernel_words(about, given))
        )
        config = found if isinstance(found, Config) else usual
    call = query, _whole(about.keys, keys), _whole(about.values, values), extras
    out = _tried(about, given, config, call, "" if config == usual else "the default")
    if out is None and config != usual:  # an entry of another reader of its kind, say
        out = _tried(about, given, usual, call, "")
    return tiled.attend(about, query, keys, values, extras) if out is None else out


def _tried(about: Attend, given: Given, config: Config, call: _Call, instead: str) -> torch.Tensor | None:
    """The result, or None (said once) where neither this config nor a smaller one gives a kernel. ``instead``: what
    runs then, "" for plain torch."""
    kernels, smaller = _made.setdefault(about, {}), _smaller.setdefault(about, {})
    while True:
        key = _key(given, config, call[0].device)
        if key in smaller:
            config = replace(smaller[key], splits=config.splits)
            continue
        if key in kernels and kernels[key] is None:
            return None
        try:
            return _kept(key, about, given, config, call)
        except Exception as error:  # Triton compiles at the first launch
            if not (isinstance(error, (NotGenerated, ImportError)) or fallback.of_compiling(error)):
                raise
            less = fallback.smaller(config) if fallback.too_large(error) else None
            made, kernels[key] = kernels.get(key), None
            if less is None:
                fallback.warn(about, error, config, instead, made[1].__file__ if made else None)
            else:
                smaller[key] = less


def exactly(
    about: Attend,
    given: Given,
    config: Config,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """The op's result by the kernel of this config and no other. Raises NotGenerated or ImportError where there is
    none, and what Triton raises (``fallback.of_compiling`` tells) where it does not compile."""
    key = _key(given, config, query.device)
    call = query, _whole(about.keys, keys), _whole(about.values, values), extras
    return _kept(key, about, given, config, call)


def _kept(key: _Key, about: Attend, given: Given, config: Config, call: _Call) -> torch.Tensor:
    """``exactly``, with a kernel that is made once for ``key``."""
    kernels, query = _made.setdefault(about, {}), call[0]
    made = kernels.get(key)
    if made is None:
        made = kernels[key] = _make(about, given, config)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        return _run(about, given, config, made, *call)


def _key(given: Given, config: Config, device: torch.device) -> _Key:
    return given, _source_of(config), device.type


def _source_of(config: Config) -> Config:
    """What of a config a kernel's source depends on: not the splits."""
    return replace(config, splits=0) if config.splits else config


def given_of(
    about: Attend, query: torch.Tensor, keys: Stored, values: Stored, extras: tuple[torch.Tensor, ...]
) -> Given:
    """What a kernel for these tensors is made for; sizes of batch and tokens are not in it."""
    batch, heads, queries, _ = query.shape
    kinds = {query.dtype, about.keys.format.dtype, about.values.format.dtype}
    product = kinds.pop() if len(kinds) == 1 else torch.float32
    if interpreted() and product == torch.bfloat16:
        product = torch.float32  # the interpreter multiplies the bits of bf16 numbers
    constants = [
        () if o.absorbed else tuple(Constant(tuple(c.shape), c.dtype) for c in s.parts(o)[2])
        for o, s in ((about.keys, keys), (about.values, values))
    ]
    met = []
    for e, extra in zip(extras, about.extras, strict=False):
        sizes = (1,) * (4 - e.dim()) + tuple(e.shape)
        kind = "bool" if e.dtype == torch.bool else "float" if e.is_floating_point() else "int"
        met.append(Met(sizes[0] > 1, sizes[1] > 1, sizes[2] > 1, extra.tokens, kind))
    return Given(heads, queries, str(product).removeprefix("torch."), constants[0], constants[1], tuple(met))


def default(about: Attend, given: Given) -> Config:
    """A config by sizes. With 64 tokens and 8 warps nothing spills for heads of 128 with rows of up to 384 latents
    (sm_90: 250 registers); at 4 warps 300 bytes do. Blocks of wide latents are small and not pipelined, as their rows
    lie in shared memory. Times are not measured yet."""
    wide = max(about.keys.head_dim, about.values.latent_width if latent(about.values) else about.values.head_dim)
    exact = given.product == "float32"
    row = sum(o.latent_width for o in (about.keys, about.values) if latent(o)) * (4 if exact else 2)
    tokens = 32 if wide >= 256 or exact else 64
    while tokens > 16 and tokens * row > BLOCK_BYTES:
        tokens //= 2
    stages = 2 if tokens * row <= BLOCK_BYTES else 1
    return Config(tokens=tokens, columns=32 if exact else 64, warps=8, stages=stages)


def interpreted() -> bool:
    """Whether Triton runs kernels as Python (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# -- from source to functions -----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where sources are kept: ``$LORC_KERNEL_CACHE``, else ``kernels`` in ``$LORC_CACHE``,
    ``$XDG_CACHE_HOME/lorc_fx`` or ``~/.cache/lorc_fx``."""
    own = os.environ.get("LORC_KERNEL_CACHE")
    return Path(own).expanduser() if own else cache_root() / "kernels"


def _make(about: Attend, given: Given, config: Config) -> _Made:
    config = _source_of(config)
    kernel = generate(about, given, config)
    show("kernel", f"{words.kernel_words(about, given)}; {about.digest[:12]}", lambda: kernel.source)
    return kernel, load(kernel.source, source_key(about, given, config))


def target(device: torch.device) -> tuned.Target:
    """What a tuner's entries for kernels on ``device`` are good for. (On a CPU Triton may interpret them; its entries
    for tiles are of other sources.)"""
    name = words.device_name(device)
    return tuned.Target(name if device.type == "cuda" else f"Triton on {name}", _sources(), _triton())


@functools.cache
def _sources() -> str:
    return words.hashed(Path(str(m.__file__)) for m in (*_WRITERS, sys.modules[__name__]))


@functools.cache
def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def source_key(about: Attend, given: Given, config: Config) -> str:
    """A hash of all that a kernel's source depends on."""
    import triton

    parts = [about.digest, repr(given), repr(config), _own(), triton.__version__]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


@functools.cache
def _own() -> str:
    """A hash of all that writes kernels."""
    return words.hashed(Path(str(m.__file__)) for m in _WRITERS)


def load(source: str, key: str, kind: str = "attend") -> ModuleType:
    """A module of generated source; its file is written where it is not there yet, and never half."""
    name, folder = f"{kind}_{key[:32]}.py", cache_folder()
    try:
        path = _written(folder / name, source)
    except OSError as error:
        path = _written(Path(_own_folder(str(folder), str(error))) / name, source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _written(path: Path, source: str) -> Path:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists() or path.read_text() != source:
        with replaced(path) as partial:
            partial.write_text(source)
    return path


@functools.cache
def _own_folder(folder: str, why: str) -> str:
    """Where this process keeps sources that the usual folder does not take; said once."""
    text = (
        f"generated kernels cannot be kept in {folder} ({why}): this process keeps its own in a temporary folder. "
        "Set LORC_KERNEL_CACHE to a folder that can be written."
    )
    warnings.warn(text, KernelWarning, stacklevel=2)
    return tempfile.mkdtemp(prefix="lorc_kernels_")


# -- a launch ---------------------------------------------------------------------------------------------------------


def _run(
    about: Attend,
    given: Given,
    config: Config,
    made: _Made,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    kernel, module = made
    batch, heads, queries, _ = query.shape
    total, rows = keys.rows.shape[0], batch * heads * queries
    parts = _splits(batch * kernel.groups, total, config, query.device)
    split = -(-total // parts)
    tops, weights = (query.new_empty((parts, rows), dtype=torch.float32) for _ in range(2))
    sums = query.new_empty((parts, rows, kernel.width), dtype=torch.float32)
    args = [*_queries(about.keys, keys, query), tops, weights, sums, *operands(about, kernel, keys, values, extras)]
    options = {} if interpreted() else {"num_warps": config.warps, "num_stages": config.stages}
    module.attend[(batch * kernel.groups, parts)](*args, rows, total, split, **options)
    found = query.new_empty((rows, kernel.width), dtype=torch.float32)
    share = query.new_empty((rows,), dtype=torch.float32)
    sink = extras[-1] if about.sink else tops
    sizes = combining(about, given, kernel)
    grid = (rows, -(-kernel.width // sizes[-1]))
    steps = strides(sink)[:3] if about.sink else [0, 0, 0]
    module.combine[grid](tops, weights, sums, sink, found, share, rows, parts, *sizes, *steps)
    return _finished(about.values, values, found, share, (batch, heads, queries)).to(query.dtype)


def combining(about: Attend, given: Given, kernel: Kernel) -> tuple[int, ...]:
    """What ``combine`` has compiled in, in its order; the last is how many columns a program merges."""
    columns = min(128, row_source.padded(kernel.width))
    return kernel.width, given.heads, given.queries, about.sink, about.blind, columns


def operands(
    about: Attend, kernel: Kernel, keys: Stored, values: Stored, extras: tuple[torch.Tensor, ...]
) -> list[Any]:
    """A kernel's arguments from rows to extras, in its order."""
    tables = _on(kernel, keys.rows.device)
    args = [*_operand(about.keys, keys), *tables[0], *_operand(about.values, values), *tables[1]]
    for e in extras[: len(about.extras)]:
        args += [e.view(torch.uint8) if e.dtype == torch.bool else e, *strides(e)]
    return args


def _splits(programs: int, total: int, config: Config, device: torch.device) -> int:
    """Stretches of tokens: as many as the config says, but none without a block."""
    if config.splits:
        return min(config.splits, -(-total // config.tokens))
    if device.type != "cuda":
        return 2 if total > FEWEST_BLOCKS * config.tokens else 1
    return splits(programs, total, config.tokens, _processors(device))


def splits(programs: int, total: int, tokens: int, processors: int) -> int:
    """Stretches of tokens, so that the device is full but each has a few blocks."""
    wanted = -(-PROGRAMS * processors // programs)
    return max(1, min(wanted, total // (FEWEST_BLOCKS * tokens)))


_tables: WeakKeyDictionary[Kernel, dict[torch.device, list[list[torch.Tensor]]]] = WeakKeyDictionary()


def _on(kernel: Kernel, device: torch.device) -> list[list[torch.Tensor]]:
    """A kernel's own tables for keys and for values."""
    held = _tables.setdefault(kernel, {})
    if device not in held:
        held[device] = [[t.to(device) for t in tables] for tables in kernel.tables]
    return held[device]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _whole(operand: Operand, stored: Stored) -> Stored:
    """With the matrix of an operand in groups as kernels take it, which multiply with every column of a row: those of
    other groups by zeros."""
    if operand.groups == 1 or not operand.decodes:
        return stored
    decode, *others = stored.codec
    return replace(stored, codec=(expanded(decode, operand.format.segments, operand.groups), *others))


def _queries(operand: Operand, stored: Stored, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query rows as the kernel takes them, and what each meets in every score (the mean's part)."""
    batch, heads, queries, dim = query.shape
    if not latent(operand):
        return query.contiguous(), query
    decode, mean, _ = stored.parts(operand)
    assert decode is not None
    grouped = query.reshape(batch, operand.heads, -1, dim)
    made = times(grouped, by_head(operand, decode).to(query.dtype).transpose(1, 2)).contiguous()
    if mean is None:
        return made, query
    return made, times(grouped.float(), by_head(operand, mean[None]).float().transpose(1, 2)).contiguous()


def _operand(operand: Operand, stored: Stored) -> list[Any]:
    """The kernel's arguments for keys or values, in its order."""
    rows, form = stored.rows, operand.format
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    unit = row_source.unit(form)
    args: list[Any] = [rows, rows.stride(0) // unit, rows.stride(1) // unit]
    exact = not form.plain and any(s.columns and not s.bits for s in form.segments)
    args.append(rows.view(form.dtype) if exact else rows)
    args.append(rows.view(torch.float16) if form.scaled else rows)
    if latent(operand):
        return args
    decode, mean, consts = stored.parts(operand)
    args += [] if decode is None else [decode, *decode.stride()]
    args += [] if mean is None else [mean]
    if not operand.absorbed:
        if operand.decoder.side is not None and stored.side is not None:
            side = stored.side if stored.side.dim() == 2 or stored.side.stride(2) == 1 else stored.side.contiguous()
            args += [side, side.stride(0), side.stride(1)]
        args += [c.contiguous() for c in consts]
    return args


def _finished(
    operand: Operand, stored: Stored, found: torch.Tensor, share: torch.Tensor, sizes: tuple[int, int, int]
) -> torch.Tensor:
    """[rows, width] weighted means of values, or of latents: then the matrix and the mean come now."""
    batch, heads, queries = sizes
    if not latent(operand):
        return found.view(*sizes, -1)
    decode, mean, _ = stored.parts(operand)
    assert decode is not None
    found = found.view(batch, operand.heads, -1, found.shape[1]).to(decode.dtype)
    made = times(found, by_head(operand, decode)).float()
    if mean is not None:
        made = made + share.view(batch, operand.heads, -1, 1) * by_head(operand, mean[None]).float()
    return made.reshape(*sizes, -1)
