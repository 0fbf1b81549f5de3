"""The plot of ``lorc plan --sweep --plot``: loss against bytes, as PNG and SVG. matplotlib is the extra ``plot``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import can_be_written
from .errors import MissingExtra
from .plan_file import replaced

BLUE, ORANGE = "#1f5fa8", "#c2570c"
"""Predicted, measured: apart in grey too."""

WIDTH, HEIGHT, DPI = 6.0, 3.6, 200
"""Inches per panel; 1200 pixels wide, so that half of that is still sharp."""


def require(what: str = "--plot") -> None:
    """Raises MissingExtra of ``what`` where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(what, "matplotlib", "plot")


def check(option: str, path: Path) -> None:
    """Before anything slow starts: raises what ``can_be_written`` and ``require`` raise."""
    for target in paths(path):
        can_be_written(option, target)
    require()


def paths(path: Path) -> tuple[Path, Path]:
    """``PATH.png`` and ``PATH.svg``; either ending may already be there."""
    name = path.name.removesuffix(".png").removesuffix(".svg")
    return path.with_name(name + ".png"), path.with_name(name + ".svg")


def draw(result: dict[str, Any], path: Path, unit: str) -> tuple[Path, Path]:
    """Write both files, each replaced whole. ``result``: what ``plan_command.figures`` returned; ``unit``: of
    the predicted loss.

    Predicted and measured loss share one panel where both are in nats, else each has its own over the same bytes.
    Raises MissingExtra, or OSError where nothing can be written.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = result["points"]
    shares = [100 * point["bytes_per_token"] / result["dense_bytes"] for point in points]
    predicted = [point["predicted"] for point in points]
    added = [point["nats"] - result["dense_nats"] for point in points] if "dense_nats" in result else None
    together = added is None or result["nats"]
    style: dict[Any, Any] = {"font.size": 11, "svg.hashsalt": "lorc_fx", "axes.spines.top": False}
    style["axes.spines.right"] = False
    with pyplot.style.context("default"), matplotlib.rc_context(style):
        count = 1 if together else 2
        figure, axes = pyplot.subplots(count, 1, figsize=(WIDTH, HEIGHT * count), sharex=True, squeeze=False)
        top, bottom = axes[0, 0], axes[-1, 0]
        line(top, shares, predicted, BLUE, "o", "predicted")
        top.set_ylabel(f"predicted loss\n({unit})")
        if added is not None:
            line(bottom, shares, added, ORANGE, "s", f"measured, {result['tokens']:,} tokens")
            bottom.set_ylabel("added loss\n(nats per token)")
        for axis in axes[:, 0]:
            axis.grid(True, which="major", color="#d9d9d9", linewidth=0.6)
            axis.legend(frameon=False)
        bottom.set_xlabel(f"cache bytes per token, % of dense ({result['dense_bytes']:,} bytes)")
        figure.align_ylabels()
        figure.tight_layout()
        return save(figure, paths(path))


def save(figure: Any, targets: tuple[Path, Path]) -> tuple[Path, Path]:
    """Write a figure as ``targets`` (PNG and SVG), each replaced whole, and close it. Raises OSError."""
    from matplotlib import pyplot

    for target, kind in zip(targets, ("png", "svg"), strict=True):
        with replaced(target) as partial:
            about = {"Date": None} if kind == "svg" else None  # equal figures give equal files
            figure.savefig(partial, format=kind, dpi=DPI, facecolor="white", metadata=about)
    pyplot.close(figure)
    return targets


def line(axis: Any, x: Sequence[float], y: Sequence[float], colour: str, marker: str, label: str) -> None:
    """On a logarithmic scale where all losses are positive (a measured one may be below the dense model's)."""
    axis.plot(x, y, color=colour, marker=marker, linewidth=1.8, markersize=5, label=label)
    if min(y) > 0 and (not axis.lines[:-1] or axis.get_yscale() == "log"):
        axis.set_yscale("log")
    elif min(y) <= 0:
        axis.set_yscale("symlog", linthresh=1e-3)
