"""What is written in C++, for torch: built when first used, by the compiler that inductor uses on a CPU. From then on
the ops ``lorc::attend`` and ``lorc::pack`` are C++ on a CPU: of calls that they do not know they ask Python."""

from __future__ import annotations

import ctypes
import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorc_fx.compat import compile_cpp
from lorc_fx.errors import KernelWarning
from lorc_fx.groups import split
from lorc_fx.packing import MODEL, SCALE_BYTES, Format, level_constants, planes, segment_bytes

if TYPE_CHECKING:
    from .attend import Operand

PAD = 16
"""Floats that each run of weights is padded to: the widest vector of ``rows.cpp``."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FIELD = 8
"""A plane of fields of b bits has kind 8 + b (``rows.cpp``)."""


SOURCES = (
    "headers.cpp", "vectors.cpp", "rows.cpp", "heads.cpp", "runs.cpp", "turn.cpp", "attend.cpp", "attend_op.cpp",
    "pack.cpp", "pack_op.cpp",
)  # fmt: skip


class Matrix(ctypes.Structure):
    """A codec's matrix, and the mean, for ``heads.cpp``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "row")),
        ("mean", ctypes.c_void_p),
        ("mean_kind", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "dim", "rows", "apart", "across")),
    ]


class _Plane(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("kind", "offset", "step", "beside", "count", "fields", "at")]


def source() -> str:
    """What is compiled, one behind the other."""
    return "\n".join((Path(__file__).parent / name).read_text() for name in SOURCES)


@functools.cache
def library() -> Any:
    """The compiled functions, or None (said once) where nothing compiles them: attention over rows and
    the packing of new ones then run in torch."""
    try:
        made = compile_cpp(source())
    except Exception as error:  # whatever the compiler or its absence raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        text = (
            f"the C++ of lorc_fx cannot be built or loaded ({reason}); attention over stored rows and the packing of "
            "new ones run in torch ops: as right, but slower. Any C++ compiler that inductor takes will do: install "
            "g++ or clang++, or set CXX, and start again."
        )
        warnings.warn(text, KernelWarning, stacklevel=2)
        return None
    number, address, name = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    about = [address, *[number] * 5, ctypes.POINTER(_Plane), *[number] * 4]  # rows .. scale, planes, n .. width
    for function in (made.lorc_scores, made.lorc_sums):
        function.argtypes, function.restype = [*about, *[address] * 4, number], None
    for function, given in (
        (made.lorc_unpack, [address, *[number] * 4, address, address, number]),
        (made.lorc_know, [name, address]),
        (made.lorc_forget, [name, address]),
        (made.lorc_choose, [name, address, address]),
        (made.lorc_ask_again, []),
        (made.lorc_know_formats, [name, address, number]),
    ):
        function.argtypes, function.restype = given, None
    return made


def ask_again() -> None:
    """Calls of the op ``lorc::attend`` go by Python again, each kind of them once."""
    if library.cache_info().currsize and (made := library()) is not None:
        made.lorc_ask_again()


@dataclass(frozen=True)
class Layout:
    """Where a row's columns are, plane by plane. ``width``: floats of one weight vector; ``pieces``: for each run of
    columns [first, last) of the row, the places of their weights, and what their fields count."""

    planes: Any
    count: int
    width: int
    scale: int
    pieces: tuple[tuple[int, int, torch.Tensor, float], ...]

    @functools.cached_property
    def straight(self) -> bool:
        """Whether the weights of columns lie as the columns do, without a gap, and each is in one plane."""
        places = torch.cat([places for _, _, places, _ in self.pieces])
        whole = len(places) == self.width and torch.equal(places, torch.arange(self.width))
        return whole and all(worth == 1 for *_, worth in self.pieces)

    @functools.cached_property
    def places(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Of each column: where it is, and where its upper bits are and what they count (None: no column has any)."""
        columns = max(last for _, last, *_ in self.pieces)
        at, above = (torch.zeros(columns, dtype=torch.int64) for _ in range(2))
        worth = torch.zeros(columns)
        for first, last, places, factor in self.pieces:
            (at if factor == 1 else above)[first:last] = places
            if factor != 1:
                worth[first:last] = factor
        return at, (above, worth) if bool(worth.any()) else None


@functools.lru_cache(maxsize=256)
def layout(form: Format, blocks: int) -> Layout | None:
    """None where ``rows.cpp`` does not know such rows: more than two means, or blocks that begin within a run of bytes
    and end in another field. Of several segments a block has its part of each."""
    if form.choices > 2 or (form.choices == 2 and not form.scaled) or form.dtype not in KINDS:
        return None
    if any(s.columns % blocks for s in form.segments):
        return None
    found: list[_Plane] = []
    pieces = []
    offset = first = at = 0
    scale = -1
    for columns, bits in form.segments:
        if bits != MODEL and scale < 0:
            scale, offset = offset, offset + SCALE_BYTES
        each, weight = columns // blocks, 1.0
        if bits == MODEL:
            size = form.dtype.itemsize
            found.append(_Plane(KINDS[form.dtype], offset, each * size, blocks, each, 1, at))
            pieces.append((first, first + each, at + torch.arange(each), weight))
            at += padded(each)
        begin = offset
        for plane in planes(bits) if bits != MODEL else ():
            whole = -(-columns * plane // 8)  # bytes of all blocks
            if whole % each and each % whole:
                return None
            count, fields, beside = min(each, whole), -(-each // whole), max(whole // each, 1)
            found.append(_Plane(_FIELD + plane, begin, each, beside, count, fields, at))
            column = torch.arange(each)
            pieces.append((first, first + each, at + column // count * padded(count) + column % count, weight))
            at, begin, weight = at + fields * padded(count), begin + whole, weight * (1 << plane)
        offset, first = offset + segment_bytes(columns, bits, form.dtype.itemsize), first + each
    return Layout((_Plane * len(found))(*found), len(found), at, scale, tuple(pieces))


def reads(operand: Operand) -> bool:
    """Whether ``rows.cpp`` knows an operand's rows."""
    return layout(operand.format, blocks(operand)) is not None


def padded(count: int) -> int:
    """``count`` rounded up to whole runs of weights."""
    return -(-count // PAD) * PAD


def laid_out(weights: torch.Tensor, about: Layout) -> torch.Tensor:
    """weights [.., columns] fp32 -> [.., width], plane by plane."""
    if about.straight:
        return weights.contiguous()
    found = weights.new_zeros((*weights.shape[:-1], about.width))
    for first, last, places, factor in about.pieces:
        part = weights[..., first:last]
        found[..., places] = part if factor == 1 else part * factor
    return found


def gathered(sums: torch.Tensor, about: Layout) -> torch.Tensor:
    """Inverse of ``laid_out`` for sums of what planes hold: [.., width] -> [.., columns]."""
    if about.straight:
        return sums
    at, upper = about.places
    found = sums.index_select(-1, at)
    return found if upper is None else found.addcmul_(sums.index_select(-1, upper[0]), upper[1])


def scores(
    rows: torch.Tensor, about: Layout, weights: torch.Tensor, shift: torch.Tensor, further: torch.Tensor
) -> torch.Tensor:
    """rows [t, B, ..], weights [B, blocks, M, width], shift and further [B, blocks, M] -> [B, blocks, M, t], all fp32
    and contiguous but for the rows' strides along t and B."""
    batch, blocks, m, width = weights.shape
    assert rows.shape[1] == batch, f"{rows.shape[1]} rows of a batch for {batch} of queries"
    out = weights.new_empty((batch, blocks, m, rows.shape[0]))
    given = (weights.data_ptr(), shift.data_ptr(), further.data_ptr(), out.data_ptr())
    loaded().lorc_scores(*where(rows), *_which(about), blocks, m, width, *given, torch.get_num_threads())
    return out


def sums(rows: torch.Tensor, about: Layout, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows [t, B, ..], p [B, blocks, M, t] contiguous fp32 -> sums over tokens: of what planes hold, [B, blocks, M,
    width]; of p times the token's scale, and of p where it has the second mean, [B, blocks, M]."""
    threads = torch.get_num_threads()
    batch, blocks, m, _ = p.shape
    assert rows.shape[1] == batch, f"{rows.shape[1]} rows of a batch for {batch} of queries"
    acc = p.new_zeros((threads, batch, blocks, m, about.width))
    few = p.new_zeros((2, threads, batch, blocks, m))
    given = (p.data_ptr(), acc.data_ptr(), few[0].data_ptr(), few[1].data_ptr())
    loaded().lorc_sums(*where(rows), *_which(about), blocks, m, about.width, *given, threads)
    few = few[:, 0] if threads == 1 else few.sum(1)
    return acc[0] if threads == 1 else acc.sum(0), few[0], few[1]


@functools.lru_cache(maxsize=256)
def constants(form: Format, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``level_constants`` of a block's quantised columns, for levels as ``rows.cpp`` has them: those of a whole byte
    are less by 128."""
    step, half = block_constants(form, blocks, torch.device("cpu"))
    bits = torch.cat([torch.full((s.columns // blocks,), s.bits) for s in form.segments if s.bits != MODEL])
    return step, torch.where(bits == 8, half - 128, half)


def block_constants(form: Format, blocks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``level_constants`` of the quantised columns of one block; they are the same for all."""
    step, half = level_constants(form, device)
    quantised = [s for s in form.segments if s.bits != MODEL]
    return split(step, quantised, blocks)[0], split(half, quantised, blocks)[0]


def blocks(operand: Operand) -> int:
    """Blocks of a row that are read apart: groups, or heads where nothing is projected."""
    return operand.groups if operand.decodes else operand.heads


def loaded() -> Any:
    """The library, known to be there."""
    found = library()
    assert found is not None
    return found


def where(rows: torch.Tensor) -> tuple[int, ...]:
    """Rows [T, B, ..] for C++: the address, T, B, and both strides in bytes."""
    size = rows.element_size()
    return (rows.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0) * size, rows.stride(1) * size)


def _which(about: Layout) -> tuple[Any, ...]:
    return about.scale, about.planes, about.count
