"""Triton source of attention over packed rows, from an ``Attend``: readable, and made for one layout of rows.

    grid (batch * groups, splits)     a program has the M query rows of a group of query heads and a stretch of tokens

    for blocks of tokens:
        keys      levels of rows -> scores with query latents, or tiles of y -> epilogue -> scores, piece by piece
        scores    the graph's own ops, with masks and biases loaded by block
        softmax   online, base e: running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867)
        values    weights times levels, summed up as latents, or weights times the epilogue's pieces
    partial maxima, sums and weighted sums are stored; ``combine`` merges the splits (flash decoding)

Query rows are [batch, query head, query] in order, so a group's are consecutive. Levels enter products less their middle
(exact in 16 bits); the scale of a token meets scores and weights, the step of a segment what is loaded or stored once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attend import Attend, Operand
from .expressions import NotGenerated
from .numbered import Constant
from .row_source import RowSource, Stretch, padded
from .symbolic import Epilogue, Places, epilogue_of
from .terms import ScoreWriter, TermWriter

MOST_ROWS = 64
"""Query rows of a program, at most, unless one query head has more: two tiles of scores of 64 x 64 in fp32 are 32 KiB."""

MOST_SUMS = 32768
"""Numbers that a program sums up: 128 fp32 registers in each of 256 threads."""


LATE = ("rows", "T", "split")
"""Arguments that change from call to call: no kernel is compiled anew for their values."""


@dataclass(frozen=True)
class Config:
    """What a tuner may choose. tokens: of a block. columns: of a chunk of a row. splits: of all tokens, 0: by their number
    and the device. warps, stages: as Triton takes them."""

    tokens: int = 64
    columns: int = 64
    splits: int = 0
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Met:
    """An extra as it comes: which of batch, heads, queries and tokens it differs along, and its kind (``bool``, ``float``,
    ``int``)."""

    batch: bool
    head: bool
    query: bool
    token: bool
    kind: str


@dataclass(frozen=True)
class Given:
    """What a kernel is made for beside the ``Attend``. heads, queries: H_q and S. product: Triton's dtype of products, and
    of what they take (``float32``, ``bfloat16``, ``float16``)."""

    heads: int
    queries: int
    product: str
    keys: tuple[Constant, ...]
    values: tuple[Constant, ...]
    extras: tuple[Met, ...]


@dataclass(frozen=True)
class Kernel:
    """Generated source (a module with ``attend`` and ``combine``) and what its launch must know: ``groups`` programs per batch
    row and split, ``rows`` M of queries in each, ``width`` numbers of a weighted sum."""

    source: str
    groups: int
    rows: int
    width: int


def latent(operand: Operand) -> bool:
    """Whether products are taken with latents: the launcher multiplies queries and sums by the codec's matrix."""
    return operand.absorbed and operand.decodes


def generate(about: Attend, given: Given, config: Config) -> Kernel:
    """The kernel of a reader. Raises NotGenerated where it cannot be one."""
    groups = _groups(about, given)
    writer = _Writer(about, given, config, groups)
    return Kernel(writer.source(), groups, writer.rows, writer.width)


def _groups(about: Attend, given: Given) -> int:
    """Groups of query heads: the fewest that have few enough rows, each with one head of what is read head by head."""
    wide = max([o.latent_width for o in (about.values,) if latent(o)], default=0)
    most = max(min(MOST_ROWS, MOST_SUMS // padded(max(wide, 1))), 16)
    needed = [o.heads for o in (about.keys, about.values) if not latent(o)]
    found = [
        g
        for g in range(1, given.heads + 1)
        if given.heads % g == 0
        and all(g % n == 0 for n in needed)
        and (given.heads // g * given.queries <= most or g == given.heads)
    ]
    if not found:
        raise NotGenerated("heads", f"{needed} cached heads for {given.heads} query heads")
    if padded(wide) * 16 > MOST_SUMS:
        raise NotGenerated("values", f"sums of {wide} latents do not fit in registers")
    return found[0]


class _Writer:
    def __init__(self, about: Attend, given: Given, config: Config, groups: int) -> None:
        self.about, self.given, self.config, self.groups = about, given, config, groups
        self.rows = given.heads // groups * given.queries
        self.dot = f"tl.{given.product}"
        self.exact = ', input_precision="ieee"' if given.product == "float32" else ""
        self.key = _Side("k", about.keys, given.keys, self)
        self.value = _Side("v", about.values, given.values, self)
        self.width = about.values.latent_width if latent(about.values) else about.values.head_dim

    def source(self) -> str:
        """The module's text."""
        a, g, c = self.about, self.given, self.config
        self.key.write_keys()
        self.value.write_values()
        extras = [self._extra(i, met) for i, met in enumerate(g.extras)]
        scores = ScoreWriter(a.scores, [f"e{i}" for i in range(len(extras))])
        loop = [
            "seen = at + i < stop",
            *self.key.lines,
            *extras,
            *scores.lines,
            's = tl.where(seen[None, :], s, float("-inf"))',
            "higher = tl.maximum(top, tl.max(s, 1))",
            'shift = tl.where(higher == float("-inf"), 0.0, higher)',
            "p = tl.exp(s - shift[:, None])",
            "less = tl.exp(top - shift)",
            "weight = weight * less + tl.sum(p, 1)",
            "top = higher",
            *self.value.lines,
        ]
        begin = [
            "batch_group = tl.program_id(0)",
            f"b = (batch_group // {self.groups}).to(tl.int64)",
            f"g = batch_group % {self.groups}",
            f"m = tl.arange(0, {padded(self.rows)})",
            f"asked = m < {self.rows}",
            f"row = batch_group.to(tl.int64) * {self.rows} + m",
            f"head = g * {g.heads // self.groups} + m // {g.queries}",
            f"query = m % {g.queries}",
            f"k_head = g // {max(self.groups // a.keys.heads, 1)}",
            f"v_head = g // {max(self.groups // a.values.heads, 1)}",
            "i = tl.arange(0, BLOCK)",
            "start = tl.program_id(1) * split",
            "stop = tl.minimum(start + split, T)",
            *self.key.ahead,
            *self.value.ahead,
            f'top = tl.full([{padded(self.rows)}], float("-inf"), tl.float32)',
            f"weight = tl.zeros([{padded(self.rows)}], tl.float32)",
        ]
        end = [
            "part = tl.program_id(1).to(tl.int64) * rows + row",
            "tl.store(tops + part, top, mask=asked)",
            "tl.store(weights + part, weight, mask=asked)",
            *self.value.after,
        ]
        args = ["q", "constant", "tops", "weights", "sums", *self.key.args, *self.value.args]
        args += [x for i in range(len(extras)) for x in (f"extra{i}", *(f"extra{i}_{d}" for d in "bhst"))]
        body = [*begin, "for at in range(start, stop, BLOCK):", *("    " + line for line in loop), *end]
        return "\n".join(
            [
                '"""Attention over packed rows, generated by lorc_fx.',
                "",
                f"keys: {a.keys.words}",
                f"values: {a.values.words}",
                f"{g.heads} query heads, {g.queries} queries, products in {g.product}, {c}",
                f"{self.groups} groups of {self.rows} query rows",
                '"""',
                "",
                "import triton",
                "import triton.language as tl",
                "",
                f"BLOCK = tl.constexpr({c.tokens})",
                "",
                "",
                f"@triton.jit(do_not_specialize={list(LATE)})",
                f"def attend({', '.join([*args, *LATE])}):",
                *("    " + line for line in body),
                "",
                "",
                *([TANH, "", ""] if "tanh(" in "".join(loop) else []),
                COMBINE,
            ]
        )

    def _extra(self, i: int, met: Met) -> str:
        """Loads what scores meet, as [M or 1, tokens or 1]."""
        where, mask = f"extra{i}" + (f" + b * extra{i}_b" if met.batch else ""), []
        where += f" + tl.cast(at, tl.int64) * extra{i}_t" if met.token else ""
        if met.head or met.query:
            where += f" + (head * extra{i}_h + query * extra{i}_s)[:, None]"
            mask.append("asked[:, None]")
        if met.token:
            where += f" + (i * extra{i}_t)[None, :]"
            mask.append("seen[None, :]")
        load = f"tl.load({where}, mask={' & '.join(mask)}, other=0)" if mask else f"tl.load({where})"
        return f"e{i} = {load}" + {"bool": " != 0", "float": ".to(tl.float32)", "int": ""}[met.kind]


class _Side:
    """Writes keys or values: lines before the loop over tokens, in it, and behind it."""

    def __init__(self, name: str, operand: Operand, constants: tuple[Constant, ...], writer: _Writer) -> None:
        self.name, self.operand, self.writer = name, operand, writer
        self.ahead: list[str] = []
        self.lines: list[str] = []
        self.after: list[str] = []
        self.latent = latent(operand)
        self.source = RowSource(name, operand.format, writer.config.columns, writer.dot)
        if self.source.further and not operand.decodes:
            raise NotGenerated("rows", "several means without a matrix")
        self.epilogue = Epilogue(()) if self.latent else epilogue_of(operand, constants)
        self.args = [f"{name}_rows", f"{name}_t", f"{name}_b", f"{name}_exact", f"{name}_half"]
        self.floats = [c.dtype.is_floating_point for c in constants]
        side = operand.decoder.side
        self.side = None if operand.absorbed else side
        if not self.latent:
            self.args += [f"{name}_decode", f"{name}_decode_k", f"{name}_decode_n"] if operand.decodes else []
            self.args += [f"{name}_mean"] if operand.has_mean else []
            self.args += [f"{name}_side", f"{name}_side_t", f"{name}_side_b"] if self.side is not None else []
            self.args += [f"{name}_const{i}" for i in range(len(constants))]

    # -- keys ---------------------------------------------------------------------------------------------------------

    def write_keys(self) -> None:
        self.lines += self.source.begin()
        if self.latent:
            self._latent_scores()
        else:
            self._piece_scores()

    def _latent_scores(self) -> None:
        w, n, o = self.writer, self.name, self.operand
        exact: list[str] = []
        scaled: list[str] = []
        for i, s in enumerate(self.source.stretches):
            for first in s.chunks:
                x = f"{n}{i}_{first}"
                self.ahead += self.source.columns(x, s, str(first))
                mask = f"asked[:, None] & {x}_live[None, :]"
                load = f"tl.load(q + row[:, None] * {o.latent_width} + {x}_c[None, :], mask={mask}, other=0.0)"
                step = f".to(tl.float32) * {s.step}" if s.bits else ""
                self.ahead.append(f"q_{x} = ({load}{step}).to({w.dot})")
                self.lines += self.source.chunk(x, s)
                (scaled if s.bits else exact).append(f"tl.dot(q_{x}, tl.trans({x}){w.exact})")
        terms = [f"({' + '.join(scaled)}) * {n}_scale[None, :]"] if scaled else []
        terms += exact
        for j in range(self.source.further):
            at = f"q + row * {o.latent_width} + {o.format.columns + j}"
            self.ahead.append(f"q_more{j} = tl.load({at}, mask=asked, other=0.0).to(tl.float32)")
            terms.append(f"q_more{j}[:, None] * {n}_more{j}[None, :]")
        if o.has_mean:
            self.ahead.append("q_mean = tl.load(constant + row, mask=asked, other=0.0)")
            terms.append("q_mean[:, None]")
        self.lines.append("s = " + " + ".join(terms))

    def _piece_scores(self) -> None:
        w, dim = self.writer, self.operand.head_dim
        self._features()
        terms = []
        for i, piece in enumerate(self.epilogue.pieces):
            f, size = piece.features, padded(piece.features.items)
            at = f"{f.base} + tl.arange(0, {size}) * {f.step}"
            mask = f"asked[:, None] & (tl.arange(0, {size}) < {f.items})[None, :]"
            load = f"tl.load(q + row[:, None] * {dim} + ({at})[None, :], mask={mask}, other=0.0)"
            self.ahead.append(f"q_{i} = {load}.to({w.dot})")
            terms.append(f"tl.dot(q_{i}, tl.trans(k_f{i}.to({w.dot})){w.exact})")
        self.lines.append("s = " + " + ".join(terms))

    # -- values -------------------------------------------------------------------------------------------------------

    def write_values(self) -> None:
        self.lines += self.source.begin()
        if self.latent:
            self._latent_sums()
        else:
            self._piece_sums()

    def _latent_sums(self) -> None:
        w, n = self.writer, self.name
        rows = padded(w.rows)
        self.lines.append(f"p_plain = p.to({w.dot})")
        if self.operand.format.scaled:
            self.lines.append(f"p_scaled = (p * {n}_scale[None, :]).to({w.dot})")
        for i, s in enumerate(self.source.stretches):
            for first in s.chunks:
                x = f"{n}{i}_{first}"
                self.ahead += self.source.columns(x, s, str(first))
                self.ahead.append(f"sum_{x} = tl.zeros([{rows}, {s.items}], tl.float32)")
                self.lines += self.source.chunk(x, s)
                p = "p_scaled" if s.bits else "p_plain"
                self.lines.append(f"sum_{x} = sum_{x} * less[:, None] + tl.dot({p}, {x}{w.exact})")
                self._store(f"sum_{x}" + (f" * {s.step}" if s.bits else ""), f"{x}_c", f"{x}_live")
        for j in range(self.source.further):
            self.ahead.append(f"sum_more{j} = tl.zeros([{rows}], tl.float32)")
            self.lines.append(f"sum_more{j} = sum_more{j} * less + tl.sum(p * {n}_more{j}[None, :], 1)")
            at = f"sums + part * {w.width} + {self.operand.format.columns + j}"
            self.after.append(f"tl.store({at}, sum_more{j}, mask=asked)")

    def _piece_sums(self) -> None:
        w = self.writer
        self._features()
        self.lines.append(f"p_plain = p.to({w.dot})")
        for i, piece in enumerate(self.epilogue.pieces):
            f, size = piece.features, padded(piece.features.items)
            self.ahead.append(f"sum_{i} = tl.zeros([{padded(w.rows)}, {size}], tl.float32)")
            self.lines.append(f"sum_{i} = sum_{i} * less[:, None] + tl.dot(p_plain, v_f{i}.to({w.dot}){w.exact})")
            self._store(f"sum_{i}", f"({f.base} + tl.arange(0, {size}) * {f.step})", f"(tl.arange(0, {size}) < {f.items})")

    def _store(self, value: str, column: str, live: str) -> None:
        at = f"sums + part[:, None] * {self.writer.width} + {column}[None, :]"
        self.after.append(f"tl.store({at}, {value}, mask=asked[:, None] & {live}[None, :])")

    # -- tiles and pieces ---------------------------------------------------------------------------------------------

    def _features(self) -> None:
        """``{name}_f0`` .. [tokens, items] fp32: the pieces of the head."""
        n = self.name
        tiles = {places: f"{n}_y{i}" for i, places in enumerate(self.epilogue.tiles)}
        for places, y in tiles.items():
            self._tile(places, y)
        self._sum_tiles(tiles)
        if self.side is not None:
            batch = "" if self.operand.decoder.shared_positions else f" + b * {n}_side_b"
            self.lines.append(f"{n}_side_at = {n}_side + tl.cast(at, tl.int64) * {n}_side_t{batch}")
        integers = self.side is not None and not self.side.dtype.is_floating_point
        terms = TermWriter(n, tiles, integers, self.floats)
        for i, piece in enumerate(self.epilogue.pieces):
            found, size = terms.write(piece.term), padded(piece.features.items)
            keep = "" if n == "k" else "seen[:, None] & "
            live = f"{keep}(tl.arange(0, {size}) < {piece.features.items})[None, :]"
            terms.lines.append(f"{n}_f{i} = tl.where({live}, {found}, 0.0)")
        self.ahead += terms.ahead
        self.lines += terms.lines

    def _tile(self, places: Places, y: str) -> None:
        """What is known of a tile before the loop: its columns of y, and the rows of small matrices there."""
        n, size = self.name, padded(places.items)
        self.ahead.append(f"{y}_c = {places.base} + {n}_head * {places.head} + tl.arange(0, {size}) * {places.step}")
        self.ahead.append(f"{y}_live = tl.arange(0, {size}) < {places.items}")
        small = [(f"{y}_mean", f"{n}_mean + {y}_c")] if self.operand.has_mean else []
        for j in range(self.source.further):
            at = f"{n}_decode + {self.operand.format.columns + j} * {n}_decode_k + {y}_c * {n}_decode_n"
            small.append((f"{y}_more{j}", at))
        for name, at in small:
            self.ahead.append(f"{name} = tl.load({at}, mask={y}_live, other=0.0).to(tl.float32)")

    def _sum_tiles(self, tiles: dict[Places, str]) -> None:
        n = self.name
        if not self.operand.decodes:
            for y in tiles.values():
                self.lines += self.source.direct(y, Places(0, 0, 1, 0), f"{y}_live")
        else:
            for kind in (True, False):
                some = [(i, s) for i, s in enumerate(self.source.stretches) if bool(s.bits) == kind]
                for y in tiles.values() if some else ():
                    size = padded(next(p.items for p, name in tiles.items() if name == y))
                    self.lines.append(f"{y}{'q' if kind else 'e'} = tl.zeros([BLOCK, {size}], tl.float32)")
                for i, s in some:
                    self._decode(f"{n}{i}", s, list(tiles.values()), "q" if kind else "e")
            both = [k for k in "qe" if any(bool(s.bits) == (k == "q") for s in self.source.stretches)]
            for y in tiles.values():
                parts = [f"{y}q * {n}_scale[:, None]" if k == "q" else f"{y}e" for k in both]
                parts += [f"{n}_more{j}[:, None] * {y}_more{j}[None, :]" for j in range(self.source.further)]
                self.lines.append(f"{y} = " + " + ".join(parts))
        if self.operand.has_mean:
            self.lines += [f"{y} = {y} + {y}_mean[None, :]" for y in tiles.values()]

    def _decode(self, x: str, s: Stretch, tiles: list[str], kind: str) -> None:
        """Adds a stretch's columns times their rows of the matrix to all tiles, a chunk after the other."""
        n, w = self.name, self.writer
        body = [*self.source.columns(x, s, "first"), *self.source.chunk(x, s)]
        for y in tiles:
            at = f"{n}_decode + {x}_c[:, None] * {n}_decode_k + {y}_c[None, :] * {n}_decode_n"
            mask = f"{x}_live[:, None] & {y}_live[None, :]"
            body.append(f"{x}_d = tl.load({at}, mask={mask}, other=0.0).to({w.dot})")
            step = f" * {s.step}" if s.bits else ""
            body.append(f"{y}{kind} += tl.dot({x}, {x}_d{w.exact}){step}")
        if len(s.chunks) == 1:
            self.lines += [line.replace("first", "0") for line in body]
        else:
            self.lines.append(f"for first in range(0, {s.span}, {s.taken}):")
            self.lines += ["    " + line for line in body]


TANH = '''@triton.jit
def tanh(x):
    """Triton has none of its own on all devices; near 0 the series, where 1 - small would lose digits."""
    square = x * x
    series = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(square < 0.04, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)'''

COMBINE = '''@triton.jit(do_not_specialize=["rows", "splits"])
def combine(tops, weights, sums, sink, found, share, rows, splits, WIDTH: tl.constexpr, HEADS: tl.constexpr,
            QUERIES: tl.constexpr, SINK: tl.constexpr, BLIND: tl.constexpr, COLUMNS: tl.constexpr, sink_b, sink_h, sink_s):
    """Merges the splits of one query row: found [rows, WIDTH] fp32, the weighted means; share [rows], what of a row's
    weight is tokens' (the rest is a sink's)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.full([1], float("-inf"), tl.float32)
    for i in range(0, splits):
        top = tl.maximum(top, tl.load(tops + i * rows + row))
    if SINK:
        at = (row // (HEADS * QUERIES)) * sink_b + (row // QUERIES % HEADS) * sink_h + (row % QUERIES) * sink_s
        logit = tl.load(sink + at).to(tl.float32)
        top = tl.maximum(top, logit)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([COLUMNS], tl.float32)
    weight = tl.zeros([1], tl.float32)
    for i in range(0, splits):
        part = i * rows + row
        less = tl.exp(tl.load(tops + part) - shift)
        weight += tl.load(weights + part) * less
        total += tl.load(sums + part * WIDTH + c, mask=c < WIDTH, other=0.0) * less
    whole = weight
    if SINK:
        whole += tl.exp(logit - shift)
    if BLIND:
        whole = tl.where(whole == 0.0, 1.0, whole)
    tl.store(found + row * WIDTH + c, total / whole, mask=c < WIDTH)
    tl.store(share + row + tl.arange(0, 1), weight / whole)
'''
