"""How a decode step grows with context, batch, ratio and layers: one figure each, from what ``bench.decode`` wrote.

    python -m bench.plots [--out docs/figures]

Reads ``decode.json`` and ``decode-*.json`` in ``bench/results``; a figure has a panel per model. The commands that made
the files are in them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = ("llama", "gpt2")
COLOURS = {"inductor": "#555555", "inductor-static": "#999999", "eager": "#cccccc", "joint": "#d95f02"}
CYCLE = ("#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d")
Row = dict[str, Any]


def _own(row: Row) -> bool:
    return row["dtype"] == "float32" and row["layers"] is None


#: figure -> (what it grows with, label of that, which rows)
FIGURES: dict[str, tuple[Callable[[Row], float], str, Callable[[Row], bool]]] = {
    "tokens": (lambda r: r["tokens"], "cached tokens", lambda r: _own(r) and r["batch"] == 1),
    "batch": (lambda r: r["batch"], "rows of a batch, 8192 tokens each", lambda r: _own(r) and r["tokens"] == 8192),
    "layers": (
        lambda r: r["layers"],
        "layers, 8192 tokens",
        lambda r: r["layers"] is not None and r["tokens"] == 8192 and r["batch"] == 1,
    ),
    "ratio": (
        lambda r: r["ratio"],
        "bytes kept, of dense; 8192 tokens",
        lambda r: _own(r) and r["batch"] == 1 and r["tokens"] == 8192 and r.get("ratio") is not None,
    ),
}


def rows(folder: Path = RESULTS) -> list[Row]:
    """All rows; of a case that was measured twice the one of the file that comes first."""
    found: dict[tuple[Any, ...], Row] = {}
    for path in (folder / "decode.json", *sorted(folder.glob("decode-*.json"))):
        for row in json.loads(path.read_text())["rows"]:
            case = tuple(row[k] for k in ("model", "dtype", "layers", "batch", "tokens", "variant"))
            found.setdefault(case, row)
    return list(found.values())


@contextlib.contextmanager
def panels(columns: int, path: Path, **given: Any) -> Iterator[Any]:
    """``columns`` axes side by side, written to ``path`` as SVG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"font.size": 10, "svg.hashsalt": "lorc_fx", "axes.spines.top": False}
    with matplotlib.rc_context(style | {"axes.spines.right": False}):
        figure, axes = pyplot.subplots(1, columns, squeeze=False, **given)
        yield axes[0]
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def draw(name: str, found: Sequence[Row], path: Path) -> None:
    """One figure as SVG."""
    at, label, chosen = FIGURES[name]
    with panels(len(MODELS), path, figsize=(10, 4)) as axes:
        for model, axis in zip(MODELS, axes, strict=True):
            mine = [r for r in found if r["model"] == model and chosen(r)]
            lines: dict[str, list[Row]] = {}
            for row in mine:
                line = row["variant"] if name != "ratio" else row["kind"]
                lines.setdefault(line, []).append(row)
            for i, (line, points) in enumerate(lines.items()):
                points.sort(key=at)
                colour = COLOURS.get("joint" if line.endswith("joint") else line, CYCLE[i % len(CYCLE)])
                x, y = [at(p) for p in points], [1e3 * p["median_s"] for p in points]
                axis.plot(x, y, marker="o", markersize=4, linewidth=1.6, color=colour, label=line)
            axis.set_title(model)
            axis.set_xlabel(label)
            axis.set_ylabel("decode step, ms")
            axis.set_ylim(bottom=0)
            axis.grid(True, color="#dddddd", linewidth=0.6)
            if lines:
                axis.legend(frameon=False, fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args(argv)
    for name in FIGURES:
        draw(name, rows(), args.out / f"decode-{name}.svg")
        print(args.out / f"decode-{name}.svg")


if __name__ == "__main__":
    main()
