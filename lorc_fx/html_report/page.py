"""The page of ``lorc report``: one HTML file without scripts, and without anything from the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ..errors import BadOption
from ..plan_file import replaced
from .parts import parts, tiles

TEMPLATE = "report.html.j2"


def render(found: Mapping[str, Any]) -> str:
    """What ``gathered`` returned as HTML. Everything that is no figure of ours is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lorc_fx", "data"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(found=found, tiles=tiles(found), parts=parts(found))


def write(path: Path, html: str) -> None:
    """Write the page so that ``path`` is either the old file or the whole new one. Raises BadOption."""
    try:
        with replaced(path) as partial:
            partial.write_text(html, encoding="utf-8")
    except OSError as error:
        raise BadOption("output", str(path), f"a path that can be written ({error})") from error
