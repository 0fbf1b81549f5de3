"""Triton source of attention over packed rows, from an ``Attend``: readable, and made for one layout of rows.

    grid (batch * groups, splits)     a program has the M query rows of a group of query heads and a stretch of tokens

    for blocks of tokens:
        keys      levels of rows -> scores with query latents, or tiles of y -> epilogue -> scores, piece by piece
        scores    the graph's own ops, with masks and biases loaded by block
        softmax   online, base e: running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867)
        values    weights times levels, summed up as latents, or weights times the epilogue's pieces
    partial maxima, sums and weighted sums are stored; ``combine`` merges the splits (flash decoding)

Query rows are [batch, query head, query] in order, so a group's are consecutive. Levels enter products less their
middle (exact in 16 bits); the scale of a token meets scores and weights, the step of a segment what is loaded or
stored once.
"""

from __future__ import annotations

from .attend import Attend
from .config import LATE, Config, Given, Kernel, Met, latent
from .expressions import NotGenerated
from .fixed_source import COMBINE, TANH
from .operand_source import OperandSource
from .row_source import padded
from .terms import ScoreWriter

MOST_ROWS = 64
"""Query rows of a program, at most, unless one query head has more: two tiles of 64 x 64 scores in fp32 are 32 KiB."""

MOST_SUMS = 16384
"""Numbers that a program sums up, about: 64 fp32 registers in each of 256 threads. Twice as many spill (sm_90)."""

WIDEST = 2048
"""Latents of a value, at most: 16 rows of sums of them are 128 registers in each of 256 threads."""


def generate(about: Attend, given: Given, config: Config) -> Kernel:
    """The kernel of a reader. Raises NotGenerated where it cannot be one."""
    groups = _groups(about, given)
    writer = _Writer(about, given, config, groups)
    tables = writer.key.epilogue.tables, writer.value.epilogue.tables
    return Kernel(writer.source(), groups, writer.rows, writer.value.width, tables)


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
    if padded(wide) > WIDEST:
        raise NotGenerated("values", f"sums of {wide} latents do not fit in registers")
    return found[0]


class _Writer:
    def __init__(self, about: Attend, given: Given, config: Config, groups: int) -> None:
        self.about, self.given, self.config, self.groups = about, given, config, groups
        self.rows = given.heads // groups * given.queries
        self.key = OperandSource("k", about.keys, given.keys, given, config, self.rows)
        self.value = OperandSource("v", about.values, given.values, given, config, self.rows)

    def source(self) -> str:
        """The module's text."""
        a, g, c = self.about, self.given, self.config
        self.key.write_keys()
        self.value.write_values()
        extras = [self._extra(i, met) for i, met in enumerate(g.extras)]
        scores = ScoreWriter(a.scores, [f"e{i}" for i in range(len(extras))])
        body = [
            *self.key.lines,
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
        loop = ["seen = at + i < stop", *extras, *self._unless_hidden(body)]
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
        text = [*begin, "for at in range(start, stop, BLOCK):", *("    " + line for line in loop), *end]
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
                *("    " + line for line in text),
                "",
                "",
                *([TANH, "", ""] if "tanh(" in "".join(loop) else []),
                COMBINE,
            ]
        )

    def _unless_hidden(self, body: list[str]) -> list[str]:
        """A block that a mask leaves out for all queries (a static cache's free end, what has left a window) is not
        read. Triton does not pipeline loads behind a condition, so there is none where there is no mask."""
        at = self.about.masks
        if at is None or not self.config.skips or not self.given.extras[at].token:
            return body
        visible = f"e{at}" if self.given.extras[at].kind == "bool" else f'(e{at} != float("-inf"))'
        return [f"if tl.max(tl.max({visible}.to(tl.int32), 1), 0) > 0:", *("    " + line for line in body)]

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
        none = 'float("-inf")' if i == self.about.masks and met.kind == "float" else "0"
        load = f"tl.load({where}, mask={' & '.join(mask)}, other={none})" if mask else f"tl.load({where})"
        return f"e{i} = {load}" + {"bool": " != 0", "float": ".to(tl.float32)", "int": ""}[met.kind]
