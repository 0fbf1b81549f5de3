"""Figures as SVG that stands inside of a page: its text is text, and its colours are the page's, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..factors import CONDITION_FLOOR
from ..plan_plot import BLUE, ORANGE, line

WIDTH, HEIGHT = 5.0, 3.3
"""Inches: 360 units of a viewBox, so that text has about its own size on a phone and half more on a wide screen."""

INK, GRID = "#010203", "#040506"
"""Stand for the page's text and rules until ``inlined`` puts its colours in."""

THEME = {INK: "currentColor", GRID: "var(--grid)", BLUE: "var(--key)", ORANGE: "var(--value)"}
"""Keys and coded are blue, values and measured orange. The page says what that is, in light and in dark."""

DEPTH = ("#2f6fd0", "#7a5fc0", "#c0508a", "#d9622b")
"""First layer to last, each with a contrast of 3 to 1 on white and on the dark page."""

WRONG, RIGHT = "#b4500b", "#20609a"
"""Of a cell of which no needle was found, and all: white text is readable on both, and between them. They are none of
``THEME``'s, which turn light where the page is dark."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "lorc_fx", "font.size": 10.5,
    "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "legend.fontsize": 9.5,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.linewidth": 0.8, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip

MOST_POINTS = 96
"""Of a spectrum: more cannot be told apart at this width."""

SMALL = 0.01
"""Added losses, some of them negative, that are all below this are drawn on a linear scale."""

Points = Sequence[Mapping[str, Any]]


def drawn(name: str, alt: str, paint: Callable[[Any], None], height: float = HEIGHT) -> str:
    """One figure. ``name`` makes its ids unique in the page; ``alt``: what is said of it where it is not seen."""
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"), matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return inlined(out.getvalue(), name, alt)


def inlined(svg: str, name: str, alt: str) -> str:
    """matplotlib's SVG file as an element of a page: no prolog, no metadata (both have URLs), no size but its viewBox,
    ids of its own, and the page's colours."""
    opening = re.search(r"<svg[^>]*>", svg)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert opening is not None and box is not None, "matplotlib wrote no SVG"
    body = svg[opening.end() :].strip()
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, themed in THEME.items():
        body = body.replace(colour, themed)
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">{body}'


# ----------------------------------------------------------------------------------------------------------- spectra


def spectra(name: str, alt: str, lines: Sequence[tuple[int, Sequence[float]]], label: str) -> str:
    """One line per layer (number, values that fall), each relative to its largest; the colour is the depth."""

    def paint(axis: Any) -> None:
        named = {0, len(lines) // 2, len(lines) - 1}
        for i, (layer, values) in enumerate(lines):
            at = _thinned(len(values))
            top = max(values[0], 1e-300)
            shown = [max(values[k] / top, CONDITION_FLOOR) for k in at]
            colour = _between(DEPTH, i / max(len(lines) - 1, 1))
            words = f"layer {layer}" if i in named else None
            axis.plot([k + 1 for k in at], shown, color=colour, linewidth=1.1, label=words)
        axis.set_yscale("log")
        axis.set_xlabel("index, by size")
        axis.set_ylabel(label)
        axis.legend()

    return drawn(name, alt, paint)


def _thinned(count: int) -> list[int]:
    """Indices of at most ``MOST_POINTS`` of ``count`` values, first and last among them."""
    if count <= MOST_POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]


def _between(stops: Sequence[str], share: float) -> str:
    """The colour at ``share`` (0 to 1) of the way through ``stops``."""
    at = share * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    ends = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops[low : low + 2]]
    mixed = [round(a + (b - a) * (at - low)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


# -------------------------------------------------------------------------------------------------------- by layer


def conditions(name: str, alt: str, kinds: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Condition numbers of keys and values (layer, number) on a logarithmic scale."""

    def paint(axis: Any) -> None:
        for kind, colour, marker in (("key", BLUE, "o"), ("value", ORANGE, "s")):
            if points := kinds.get(kind):
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, label=f"{kind}s")
        axis.set_yscale("log")
        axis.set_ylabel("condition number")
        _by_layer(axis)
        axis.legend()

    return drawn(name, alt, paint)


def cumulative(name: str, alt: str, points: Points) -> str:
    """log10 of the cumulative condition number of each layer."""

    def paint(axis: Any) -> None:
        x, y = [p["layer"] for p in points], [p["log10"] for p in points]
        axis.plot(x, y, color=INK, marker="o", markersize=4, linewidth=1.4)
        axis.set_ylabel("cumulative condition number, log10")
        axis.set_ylim(bottom=0)
        _by_layer(axis)

    return drawn(name, alt, paint)


def bytes_by_layer(name: str, alt: str, sites: Points) -> str:
    """Bars of bytes per token: coded filled, dense an outline around it, keys and values side by side."""

    def paint(axis: Any) -> None:
        for kind, colour, shift in (("key", BLUE, -0.21), ("value", ORANGE, 0.21)):
            mine = [s for s in sites if s["kind"] == kind]
            at = [s["layer"] + shift for s in mine]
            axis.bar(at, [s["bytes"] for s in mine], 0.36, color=colour, label=f"{kind}s, coded")
            dense = [s["dense_bytes"] for s in mine]
            outline = "dense" if kind == "value" else None
            axis.bar(at, dense, 0.36, facecolor="none", edgecolor=INK, linewidth=0.6, label=outline)
        axis.set_ylabel("bytes per token")
        _by_layer(axis)
        axis.grid(False, axis="x")
        axis.margins(x=0.01)
        axis.figure.legend(loc="outside upper center", ncols=3)

    return drawn(name, alt, paint)


def _by_layer(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


# ------------------------------------------------------------------------------------------- loss, retrieval, time


def losses(name: str, alt: str, shares: Sequence[float], series: Points, label: str, here: float) -> str:
    """Loss against bytes in % of dense. ``series``: "label", "loss" and "measured" of each line; ``here``: where the
    budget of the page is."""

    def paint(axis: Any) -> None:
        for one in series:
            colour, marker = (ORANGE, "s") if one["measured"] else (BLUE, "o")
            line(axis, shares, one["loss"], colour, marker, one["label"])
        if axis.get_yscale() == "symlog" and max(abs(y) for one in series for y in one["loss"]) < SMALL:
            axis.set_yscale("linear")
        axis.axvline(here, color=INK, linewidth=0.8, linestyle=":", label="this page's budget")
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:g}")
        axis.set_xlabel("cache bytes per token, % of dense")
        axis.set_ylabel(label)
        axis.legend()

    return drawn(name, alt, paint)


def needles(name: str, alt: str, trials: Points) -> str:
    """A cell per length and depth: how many needles of how many were found."""
    lengths, depths = sorted({t["length"] for t in trials}), sorted({t["depth"] for t in trials})

    def paint(axis: Any) -> None:
        for x, length in enumerate(lengths):
            for y, depth in enumerate(depths):
                cell = [t["right"] for t in trials if (t["length"], t["depth"]) == (length, depth)]
                colour = _between((WRONG, RIGHT), sum(cell) / len(cell))
                axis.bar(x, 0.96, 0.96, bottom=y - 0.48, color=colour)
                axis.text(x, y, f"{sum(cell)}/{len(cell)}", color="#ffffff", ha="center", va="center")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
        axis.set_xlabel("tokens of the prompt")
        axis.set_ylabel("depth of the needle")
        axis.set_ylim(len(depths) - 0.5, -0.5)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)

    return drawn(name, alt, paint)


def steps(name: str, alt: str, points: Points, label: str, log: bool) -> str:
    """Milliseconds of a decode step against cached tokens, dense and coded; ``log``: on a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def paint(axis: Any) -> None:
        x = [p["tokens"] for p in points]
        for key, colour, marker, words in (("dense_s", INK, "s", "dense"), ("coded_s", BLUE, "o", "coded")):
            y = [1e3 * p[key] for p in points]
            axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, label=words)
        axis.set_xscale("log", base=2)
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1e3 * max(max(p["dense_s"], p["coded_s"]) for p in points))
        axis.set_xticks(x[:: 1 + (len(x) - 1) // 5])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.set_xlabel("cached tokens")
        axis.set_ylabel(label)
        axis.legend()

    return drawn(name, alt, paint)
