"""What the sections of the page are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """``svg`` may stand in the page as it is; ``title`` and ``caption`` are plain text."""

    name: str
    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Plain text in cells; the first ``words`` columns are text, the others are numbers."""

    about: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 0


@dataclass(frozen=True)
class Part:
    """A section. ``absent``: what was not asked for, and how to get it, one line each."""

    name: str
    title: str
    lines: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    absent: tuple[str, ...] = ()


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count % 1 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
