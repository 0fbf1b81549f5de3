"""The plot of a certificate: bounds and measured errors by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan_plot import BLUE, HEIGHT, ORANGE, WIDTH, paths, require, save

if TYPE_CHECKING:
    from .certify import Certificate

GREY = "#777777"


def draw(certificate: Certificate, path: Path) -> tuple[Path, Path]:
    """Write ``PATH.png`` and ``PATH.svg``, each replaced whole. Raises MissingExtra, or OSError."""
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.style.context("default"), matplotlib.rc_context({"font.size": 11, "svg.hashsalt": "lorc_fx"}):
        figure, axes = pyplot.subplots(2, 1, figsize=(WIDTH, 2 * HEIGHT), sharex=True)
        for kind, colour in (("key", BLUE), ("value", ORANGE)):
            sites = [(s.layer, s.error.line()) for s in certificate.sites if s.kind == kind]
            _pair(axes[0], sites, colour, f"{kind}s as read")
        for name, colour in (("alone", BLUE), ("network", GREY)):
            layers = [(x.layer, getattr(x, name).line()) for x in certificate.layers]
            _pair(axes[1], layers, colour, "attention, this layer coded" if name == "alone" else "attention, all coded")
        for axis in axes:
            axis.set_yscale("log")
            axis.set_ylabel("error, 2-norm")
            axis.grid(True, color="#d9d9d9", linewidth=0.6)
            axis.legend(frameon=False, fontsize=8)
        axes[1].set_xlabel("layer")
        figure.tight_layout()
        return save(figure, paths(path))


def _pair(axis: Any, lines: list[tuple[int, dict[str, float]]], colour: str, label: str) -> None:
    at = [layer for layer, _ in lines]
    axis.plot(at, [x["bound"] for _, x in lines], color=colour, marker="o", markersize=4, label=f"{label}: bound")
    axis.plot(at, [x["measured"] for _, x in lines], color=colour, marker="o", markersize=4, linestyle=":",
              label=f"{label}: measured")  # fmt: skip
