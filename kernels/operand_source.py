"""Triton source of one operand in a kernel: keys into scores, weights into sums of values."""

from __future__ import annotations

from .attend import Operand
from .config import Config, Given, latent
from .expressions import NotGenerated
from .numbered import Constant
from .row_source import RowSource, Stretch, padded
from .symbolic import Epilogue, Places, epilogue_of
from .terms import TermWriter

MOST_HELD = 16384
"""Numbers of query latents that a program keeps over its tokens, at most: 32 registers in each of 256 threads at 16
bits. More are loaded again for each block, from a cache."""


class OperandSource:
    """Writes keys or values: lines ``ahead`` of the loop over tokens, in it (``lines``), and ``after`` it; ``args``
    are the kernel's arguments for it. ``rows``: M query rows; ``width``: numbers of a weighted sum."""

    def __init__(
        self, name: str, operand: Operand, constants: tuple[Constant, ...], given: Given, config: Config, rows: int
    ) -> None:
        self.name, self.operand, self.rows = name, operand, rows
        self.dot = f"tl.{given.product}"
        self.exact = ', input_precision="ieee"' if given.product == "float32" else ""
        self.width = operand.latent_width if latent(operand) else operand.head_dim
        self.ahead: list[str] = []
        self.lines: list[str] = []
        self.after: list[str] = []
        self.latent = latent(operand)
        self.source = RowSource(name, operand.format, config.columns, self.dot)
        if self.source.further and not operand.decodes:
            raise NotGenerated("rows", "several means without a matrix")
        self.epilogue = Epilogue(()) if self.latent else epilogue_of(operand, constants)
        self.args = [f"{name}_rows", f"{name}_t", f"{name}_b", f"{name}_exact", f"{name}_half"]
        kinds = [*(c.dtype for c in constants), *(t.dtype for t in self.epilogue.tables)]
        self.floats = [kind.is_floating_point for kind in kinds]
        side = operand.decoder.side
        self.side = None if operand.absorbed else side
        if not self.latent:
            self.args += [f"{name}_decode", f"{name}_decode_k", f"{name}_decode_n"] if operand.decodes else []
            self.args += [f"{name}_mean"] if operand.has_mean else []
            self.args += [f"{name}_side", f"{name}_side_t", f"{name}_side_b"] if self.side is not None else []
            self.args += [f"{name}_const{i}" for i in range(len(self.floats))]

    # -- keys ---------------------------------------------------------------------------------------------------------

    def write_keys(self) -> None:
        self.lines += self.source.begin()
        if self.latent:
            self._latent_scores()
        else:
            self._piece_scores()

    def _latent_scores(self) -> None:
        n, o = self.name, self.operand
        held = self.ahead if padded(self.rows) * o.latent_width <= MOST_HELD else self.lines
        exact: list[str] = []
        scaled: list[str] = []
        for i, s in enumerate(self.source.stretches):
            for first in s.chunks:
                x = f"{n}{i}_{first}"
                self.ahead += self.source.columns(x, s, str(first))
                mask = f"asked[:, None] & {x}_live[None, :]"
                load = f"tl.load(q + row[:, None] * {o.latent_width} + {x}_c[None, :], mask={mask}, other=0.0)"
                step = f".to(tl.float32) * {s.step}" if s.bits else ""
                held.append(f"q_{x} = ({load}{step}).to({self.dot})")
                self.lines += self.source.chunk(x, s)
                (scaled if s.bits else exact).append(f"tl.dot(q_{x}, tl.trans({x}){self.exact})")
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
        dim = self.operand.head_dim
        self._features()
        terms = []
        for i, piece in enumerate(self.epilogue.pieces):
            f, size = piece.features, padded(piece.features.items)
            at = f"{f.base} + tl.arange(0, {size}) * {f.step}"
            mask = f"asked[:, None] & (tl.arange(0, {size}) < {f.items})[None, :]"
            load = f"tl.load(q + row[:, None] * {dim} + ({at})[None, :], mask={mask}, other=0.0)"
            self.ahead.append(f"q_{i} = {load}.to({self.dot})")
            terms.append(f"tl.dot(q_{i}, tl.trans(k_f{i}.to({self.dot})){self.exact})")
        self.lines.append("s = " + " + ".join(terms))

    # -- values -------------------------------------------------------------------------------------------------------

    def write_values(self) -> None:
        self.lines += self.source.begin()
        if self.latent:
            self._latent_sums()
        else:
            self._piece_sums()

    def _latent_sums(self) -> None:
        n = self.name
        rows = padded(self.rows)
        self.lines.append(f"p_plain = p.to({self.dot})")
        if self.operand.format.scaled:
            self.lines.append(f"p_scaled = (p * {n}_scale[None, :]).to({self.dot})")
        for i, s in enumerate(self.source.stretches):
            for first in s.chunks:
                x = f"{n}{i}_{first}"
                self.ahead += self.source.columns(x, s, str(first))
                self.ahead.append(f"sum_{x} = tl.zeros([{rows}, {s.items}], tl.float32)")
                self.lines += self.source.chunk(x, s)
                p = "p_scaled" if s.bits else "p_plain"
                self.lines.append(f"sum_{x} = sum_{x} * less[:, None] + tl.dot({p}, {x}{self.exact})")
                self._store(f"sum_{x}" + (f" * {s.step}" if s.bits else ""), f"{x}_c", f"{x}_live")
        for j in range(self.source.further):
            self.ahead.append(f"sum_more{j} = tl.zeros([{rows}], tl.float32)")
            self.lines.append(f"sum_more{j} = sum_more{j} * less + tl.sum(p * {n}_more{j}[None, :], 1)")
            at = f"sums + part * {self.width} + {self.operand.format.columns + j}"
            self.after.append(f"tl.store({at}, sum_more{j}, mask=asked)")

    def _piece_sums(self) -> None:
        self._features()
        self.lines.append(f"p_plain = p.to({self.dot})")
        for i, piece in enumerate(self.epilogue.pieces):
            f, size = piece.features, padded(piece.features.items)
            self.ahead.append(f"sum_{i} = tl.zeros([{padded(self.rows)}, {size}], tl.float32)")
            self.lines.append(f"sum_{i} = sum_{i} * less[:, None] + tl.dot(p_plain, v_f{i}.to({self.dot}){self.exact})")
            self._store(
                f"sum_{i}", f"({f.base} + tl.arange(0, {size}) * {f.step})", f"(tl.arange(0, {size}) < {f.items})"
            )

    def _store(self, value: str, column: str, live: str) -> None:
        at = f"sums + part[:, None] * {self.width} + {column}[None, :]"
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
                self.lines += self.source.direct(y, f"{y}_live")
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
        n = self.name
        body = [*self.source.columns(x, s, "first"), *self.source.chunk(x, s)]
        for y in tiles:
            at = f"{n}_decode + {x}_c[:, None] * {n}_decode_k + {y}_c[None, :] * {n}_decode_n"
            mask = f"{x}_live[:, None] & {y}_live[None, :]"
            body.append(f"{x}_d = tl.load({at}, mask={mask}, other=0.0).to({self.dot})")
            step = f" * {s.step}" if s.bits else ""
            body.append(f"{y}{kind} += tl.dot({x}, {x}_d{self.exact}){step}")
        if len(s.chunks) == 1:
            self.lines += [line.replace("first", "0") for line in body]
        else:
            self.lines.append(f"for first in range(0, {s.span}, {s.taken}):")
            self.lines += ["    " + line for line in body]
