"""Text to calibrate on and to score: the English pages of the Debian handbook, from its Debian package.

apt-get download debian-handbook && dpkg -x debian-handbook_*.deb FOLDER
"""

from __future__ import annotations

import html.parser
import os
from pathlib import Path

PAGES = "usr/share/doc/debian-handbook/html/en-US"


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
    """All English pages as plain text, in order of their names. ``folder``: where the package was unpacked (default:
    ``$LORC_HANDBOOK``, else ``/``). Raises FileNotFoundError, saying how to get it."""
    root = Path(folder or os.environ.get("LORC_HANDBOOK", "/")) / PAGES
    pages = sorted(root.glob("*.html"))
    if not pages:
        raise FileNotFoundError(f"no pages under {root}: {(__doc__ or '').splitlines()[2].strip()}")
    texts = []
    for page in pages:
        parser = _Prose()
        parser.feed(page.read_text(encoding="utf-8"))
        lines = "".join(parser.parts).splitlines()
        texts.append("\n".join(line.strip() for line in lines if line.strip()))
    return "\n".join(texts)
