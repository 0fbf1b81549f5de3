"""Text to calibrate on, to score and to train on: the Debian handbook in English, and Python's documentation.

apt-get download debian-handbook python3.11-doc && for deb in *.deb; do dpkg -x $deb FOLDER; done
"""

from __future__ import annotations

import html.parser
import os
from pathlib import Path

PAGES = "usr/share/doc/debian-handbook/html/en-US"
PYTHON = "usr/share/doc/python3.11/html/_sources"


class _Prose(html.parser.HTMLParser):
    """The text of paragraphs and headings."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.open = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open += tag in ("p", "h1", "h2", "h3", "li")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "h1", "h2", "h3", "li") and self.open:
            self.open -= 1
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.parts.append(" ".join(data.split()) + " ")


def handbook(folder: str | os.PathLike[str] | None = None) -> str:
    """All English pages of the handbook as plain text, in order of their names. ``folder``: where the package was
    unpacked (default: ``$LORC_HANDBOOK``, else ``/``). Raises FileNotFoundError, saying how to get it."""
    return "\n".join(handbook_pages(folder))


def handbook_pages(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """The pages of ``handbook``, one by one."""
    texts = []
    for page in _files(folder, PAGES, "*.html"):
        parser = _Prose()
        parser.feed(page.read_text(encoding="utf-8"))
        lines = "".join(parser.parts).splitlines()
        texts.append("\n".join(line.strip() for line in lines if line.strip()))
    return texts


def python_pages(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """The pages of Python's documentation as they were written (reStructuredText), in order of their names; ``folder``
    and errors as in ``handbook``."""
    return [page.read_text(encoding="utf-8") for page in _files(folder, PYTHON, "**/*.rst.txt")]


def _files(folder: str | os.PathLike[str] | None, under: str, pattern: str) -> list[Path]:
    root = Path(folder or os.environ.get("LORC_HANDBOOK", "/")) / under
    found = sorted(root.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} under {root}: {(__doc__ or '').splitlines()[2].strip()}")
    return found
