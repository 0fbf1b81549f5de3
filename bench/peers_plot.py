"""Caches beside each other, from what ``bench.peers_run`` wrote: added loss against bytes, then time and memory.

python -m bench.peers_plot [--model gemma] [--out docs/figures/peers.svg]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.plots import RESULTS, panels

#: beginning of a peer's name -> its colour and marker; peers of one family differ by marker
COLOURS = {"DynamicCache": "#555555", "StaticCache": "#999999", "quanto": "#7570b3", "hqq": "#1f78b4"}
COLOURS |= {"kvpress": "#e6ab02", "LoRC": "#d95f02", "lorc": "#1b9e77"}
MARKERS = "os^Dv"


def looks(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """A colour per family, and a marker per peer of it."""
    found: dict[str, dict[str, str]] = {}
    counted: dict[str, int] = {}
    for name in names:
        family = next(f for f in COLOURS if name.startswith(f))
        found[name] = {"color": COLOURS[family], "marker": MARKERS[counted.get(family, 0) % len(MARKERS)]}
        counted[family] = counted.get(family, 0) + 1
    return found


def draw(result: dict[str, Any], model: str, path: Path) -> None:
    """One figure as SVG: three panels, and a legend beside them."""
    losses = [row for row in result["losses"] if row["model"] == model]
    style = looks([row["peer"] for row in losses])
    rows = [r for r in result["rows"] if r["model"] == model and r["when"] != "end" and r["peer"] in style]
    with panels(4, path, figsize=(14, 4.2), width_ratios=[1, 1, 1, 0.75]) as axes:
        for row in losses:
            if row["added"] is not None:
                added = 100 * max(row["added"], 0.0)
                axes[0].plot(row["fraction"], added, linestyle="", markersize=7, **style[row["peer"]])
        axes[0].set_yscale("symlog", linthresh=0.1)
        axes[0].set_ylim(bottom=-0.02)
        axes[0].set_title("added loss, %")
        axes[0].set_xlabel("bytes, of a 16-bit cache of the same tokens")
        for axis, key, unit, title in (
            (axes[1], "decode_ratio", 1, "decode step, of DynamicCache's"),
            (axes[2], "decode_peak_bytes", 2**20, "peak while decoding, MiB above the model"),
        ):
            for name in style:
                mine = sorted((r["context"], r[key]) for r in rows if r["peer"] == name and r[key] is not None)
                if mine:
                    x, y = zip(*mine, strict=True)
                    axis.plot(x, [v / unit for v in y], linewidth=1.4, markersize=5, **style[name])
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({r["context"] for r in rows}), sorted({r["context"] for r in rows}))
            axis.set_title(title)
            axis.set_xlabel("cached tokens")
            axis.set_ylim(bottom=0)
        for axis in axes[:3]:
            axis.grid(True, color="#dddddd", linewidth=0.6)
        for name, look in style.items():
            axes[3].plot([], [], label=name, **look)
        axes[3].axis("off")
        axes[3].legend(loc="center left", frameon=False, fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="gemma")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/peers.svg"))
    args = parser.parse_args(argv)
    draw(json.loads((RESULTS / "peers-run.json").read_text()), args.model, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
