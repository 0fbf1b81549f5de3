"""Triton source that reads packed rows: chunks of columns as numbers for a product, scales, indices of means.

A chunk is a power of two of columns that one load brings. Of a segment in one plane of w bits, m bytes long, a chunk
takes bytes j .. j + n of the plane and all 8 / w columns in each: column i m + j is in byte j at bit i w, so a byte's
columns come out as [8 / w, n] without a single byte read twice. Segments of several planes are read column by column,
plane by plane.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorc_fx.packing import MODEL, SCALE_BYTES, STEPS, Format, index_bytes, planes, segment_bytes

from .expressions import NotGenerated

LEAST = 16
"""The least size of a side of a product on tensor cores."""

MOST_MEANS = 9
"""Means of a codec, at most: each further one is written out."""


def padded(size: int) -> int:
    """The next power of two, ``LEAST`` at least."""
    return max(LEAST, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class Stretch:
    """A segment as chunks. ``at``: its first byte in a row (of an exact segment: its first element). ``start``: its
    first column; ``groups`` columns in each of ``span`` bytes (elements), ``taken`` of which are in a chunk."""

    bits: int
    at: int
    start: int
    columns: int
    groups: int
    span: int
    taken: int

    @property
    def items(self) -> int:
        """Columns of a chunk, padding included."""
        return self.groups * self.taken

    @property
    def step(self) -> float:
        return 1.0 if self.bits == MODEL else STEPS[self.bits]

    @property
    def chunks(self) -> range:
        """Where chunks begin, in bytes (elements) of the span."""
        return range(0, self.span, self.taken)


def stretches(form: Format, columns: int) -> tuple[Stretch, ...]:
    """The segments of a row, in chunks of about ``columns`` columns."""
    found, start = [], 0
    quantised_at = sum(s.columns for s in form.segments if s.bits == MODEL) * form.dtype.itemsize + SCALE_BYTES
    for count, bits in form.segments:
        if not count:
            continue
        own = planes(bits) if bits != MODEL else (8,)
        groups = 8 // own[0] if len(own) == 1 else 1
        span = -(-count // groups)
        taken = _taken(span, max(columns // groups, 1), LEAST // groups)
        found.append(Stretch(bits, start if bits == MODEL else quantised_at, start, count, groups, span, taken))
        start += count
        if bits != MODEL:
            quantised_at += segment_bytes(count, bits, 0)
    return tuple(found)


def _taken(span: int, most: int, least: int) -> int:
    """The power of two that covers ``span`` in steps with the least padding, the larger of two as good."""
    sizes = [1 << i for i in range(12) if max(least, 1) <= 1 << i <= max(most, least, 1)]
    return min(sizes, key=lambda n: (-(-span // n) * n, -n))


class RowSource:
    """Writes reads of one operand's rows. ``name``: the prefix of its variables (``k`` or ``v``); kernels have
    ``{name}_rows`` (bytes, or the model's dtype where rows are plain), ``{name}_exact`` and ``{name}_half`` (the same
    memory as the model's dtype and as fp16), strides ``{name}_t`` and ``{name}_b`` in units of ``unit``, a block of
    tokens ``at + i`` that are ``seen``, and the batch row ``b``. A block begins at one 64-bit place; within
    it 32 bits do.
    """

    def __init__(self, name: str, form: Format, columns: int, dot: str) -> None:
        self.name, self.form, self.dot = name, form, dot
        self.stretches = stretches(form, columns)
        self.further = form.choices - 1
        self.unit = unit(form)
        if form.choices > MOST_MEANS:
            raise NotGenerated("rows", f"a codec with {form.choices} means, {MOST_MEANS} at most are taken")

    def begin(self) -> list[str]:
        """Lines in the loop over tokens, before chunks: ``{name}_at`` and what a token has once."""
        n, form = self.name, self.form
        times = f" * {self.unit}" if self.unit > 1 else ""
        lines = [
            f"{n}_block = tl.cast(at, tl.int64) * ({n}_t{times}) + b * ({n}_b{times})",
            f"{n}_at = i * ({n}_t{times})",
        ]
        exact = sum(s.columns for s in form.segments if s.bits == MODEL) * form.dtype.itemsize
        if form.scaled:
            where = f"{n}_half + {n}_block // 2 + ({n}_at // 2 + {exact // 2})"
            lines.append(f"{n}_scale = tl.load({where}, mask=seen, other=0.0).to(tl.float32)")
        if form.choices == 2 and form.scaled:
            lines.append(f"{n}_more0 = ({n}_scale < 0).to(tl.float32)")
            lines.append(f"{n}_scale = tl.abs({n}_scale)")
        elif self.further:
            place = form_end(form) - index_bytes(form.choices, form.scaled)
            where = f"{n}_rows + {n}_block + ({n}_at + {place})"
            lines.append(f"{n}_index = tl.load({where}, mask=seen, other=0).to(tl.int32)")
            lines += [f"{n}_more{j} = ({n}_index == {j + 2}).to(tl.float32)" for j in range(self.further)]
        return lines

    def columns(self, name: str, stretch: Stretch, first: str) -> list[str]:
        """``{name}_j`` bytes of a chunk; ``{name}_c`` its columns in a row, ``{name}_live`` which of its items are
        any."""
        g, n, m = stretch.groups, stretch.taken, stretch.span
        lines = [f"{name}_j = {first} + tl.arange(0, {n})"]
        if g == 1:
            inside, live = f"{name}_j", f"{name}_j < {m}"
        else:
            lines.append(f"{name}_i = tl.arange(0, {g * n})")
            inside = f"({name}_i // {n}) * {m} + {first} + {name}_i % {n}"
            live = f"({first} + {name}_i % {n} < {m}) & ({name}_c < {stretch.start + stretch.columns})"
        return [*lines, f"{name}_c = {stretch.start} + {inside}", f"{name}_live = {live}"]

    def chunk(self, name: str, stretch: Stretch) -> list[str]:
        """``{name}`` [tokens, items] in the product's dtype, of columns that ``columns`` has named: exact numbers, or
        levels less their middle (of which a scale and the stretch's step make numbers)."""
        n, bits = self.name, stretch.bits
        if bits == MODEL:
            rows, at = self._exact()
            mask = f"seen[:, None] & {name}_live[None, :]"
            where = f"{rows} + ({at}[:, None] + {name}_c[None, :])"
            return [f"{name} = tl.load({where}, mask={mask}, other=0.0).to({self.dot})"]
        half = (1 << (bits - 1)) - 0.5
        if len(planes(bits)) > 1:
            found = self._planes(name, stretch, f"{name}_c - {stretch.start}", f"{name}_live")
            return [*found, f"{name} = ({name}.to(tl.float32) - {half}).to({self.dot})"]
        mask = f"seen[:, None] & ({name}_j < {stretch.span})[None, :]"
        where = f"{n}_rows + {n}_block + ({n}_at[:, None] + ({stretch.at} + {name}_j)[None, :])"
        lines = [f"{name} = tl.load({where}, mask={mask}, other=0)"]
        if stretch.groups > 1:
            shift = f"(tl.arange(0, {stretch.groups}) * {bits}).to(tl.uint8)"
            lines.append(f"{name} = ({name}[:, None, :] >> {shift}[None, :, None]) & {(1 << bits) - 1}")
            lines.append(f"{name} = tl.reshape({name}, (BLOCK, {stretch.items}))")
        return [*lines, f"{name} = ({name}.to(tl.float32) - {half}).to({self.dot})"]

    def direct(self, name: str, live: str) -> list[str]:
        """``{name}`` [tokens, items] fp32: the numbers of columns ``{name}_c``, as they are; ``live`` [items]."""
        found = []
        for i, s in enumerate(self.stretches):
            here = f"{name}{i}"
            inside = f"{live} & ({name}_c >= {s.start}) & ({name}_c < {s.start + s.columns})"
            lines = [f"{here}_live = {live if len(self.stretches) == 1 else inside}"]
            if s.bits == MODEL:
                rows, at = self._exact()
                mask = f"seen[:, None] & {here}_live[None, :]"
                lines.append(f"{here} = tl.load({rows} + ({at}[:, None] + {name}_c[None, :]), mask={mask}, other=0.0)")
                lines.append(f"{here} = {here}.to(tl.float32)")
            else:
                lines += self._planes(here, s, f"{name}_c - {s.start}", f"{here}_live")
                half = (1 << (s.bits - 1)) - 0.5
                lines.append(f"{here} = ({here}.to(tl.float32) - {half}) * ({s.step} * {self.name}_scale)[:, None]")
                if len(self.stretches) > 1:
                    lines.append(f"{here} = tl.where({here}_live[None, :], {here}, 0.0)")
            found += lines
        return [*found, f"{name} = " + " + ".join(f"{name}{i}" for i in range(len(self.stretches)))]

    def _exact(self) -> tuple[str, str]:
        if self.form.plain:
            return f"{self.name}_rows + {self.name}_block", f"{self.name}_at"
        size = self.form.dtype.itemsize
        return f"{self.name}_exact + {self.name}_block // {size}", f"({self.name}_at // {size})"

    def _planes(self, name: str, s: Stretch, column: str, live: str) -> list[str]:
        """Levels of columns (of the segment), each from its own byte of each plane."""
        n, at, shift, parts = self.name, s.at, 0, []
        lines = [f"{name}_p = {column}"]
        for i, plane in enumerate(planes(s.bits)):
            span = -(-s.columns * plane // 8)
            byte = f"{name}_p % {span}" if plane < 8 else f"{name}_p"
            where = f"{n}_rows + {n}_block + ({n}_at[:, None] + ({at} + {byte})[None, :])"
            lines.append(f"{name}_b{i} = tl.load({where}, mask=seen[:, None] & {live}[None, :], other=0).to(tl.int32)")
            part = f"{name}_b{i}"
            if plane < 8:
                part = f"(({part} >> (({name}_p // {span}) * {plane})[None, :]) & {(1 << plane) - 1})"
            parts.append(f"({part} << {shift})" if shift else part)
            at, shift = at + span, shift + plane
        return [*lines, f"{name} = " + " | ".join(parts)]


def unit(form: Format) -> int:
    """Elements of which all strides of rows are multiples. A kernel that multiplies by it knows so, and loads as many
    bytes at once."""
    return 1 if form.plain else form.alignment


def form_end(form: Format) -> int:
    """Bytes of a row before its padding."""
    total = sum(segment_bytes(s.columns, s.bits, form.dtype.itemsize) for s in form.segments)
    return total + SCALE_BYTES * form.scaled + index_bytes(form.choices, form.scaled)
