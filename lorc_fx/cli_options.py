"""Options that several commands have, each said once, and the examples below a command's help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorc_fx.console import DType, can_be_written
from lorc_fx.errors import BadOption

ModelPath = Annotated[
    Path | None,
    typer.Option(
        help="A folder, a GGUF file, or owner/name on the hub (default: the demo's Gemma 3 270M).", show_default=False
    ),
]
Ratio = Annotated[float | None, typer.Option(help="Cache bytes kept, as a fraction of the dense cache.")]
Ratios = Annotated[list[float] | None, typer.Option("--ratio", help="Cache bytes kept; may be given more than once.")]
BytesPerToken = Annotated[int | None, typer.Option(help="The same budget in bytes, instead of --ratio.")]
Scheduler = Annotated[str | None, typer.Option(help="progressive (LoRC), uniform, energy, loss.")]
Precision = Annotated[str | None, typer.Option(help="model (LoRC), int8, int4, auto.")]
Basis = Annotated[str | None, typer.Option(help="joint, grouped, identity, auto.")]
GroupSize = Annotated[int | None, typer.Option(help="Cached heads of a group, for --basis grouped.")]
Objective = Annotated[str | None, typer.Option(help="What --basis auto may trade: balanced, bytes, time.")]
Calibrated = Annotated[
    str | None, typer.Option(help="first-prompt (the default), none, or what `lorc calibrate` wrote.")
]
RunsIn = Annotated[DType, typer.Option(help="What the model runs in.")]
Where = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


def _writable(path: Path | None) -> Path | None:
    """Refused before anything slow starts."""
    try:
        if path is not None:
            can_be_written("json", path)
    except BadOption as error:
        raise typer.BadParameter(str(error)) from None
    return path


Json = Annotated[Path | None, typer.Option("--json", callback=_writable, help="Write all figures to this file.")]


def examples(*lines: str) -> str:
    """For ``epilog``: each example a paragraph of its own, since help is wrapped otherwise."""
    return "\n\n".join(["Examples:", *lines])


def numbers(option: str, text: str, kind: Any, default: str | None = None) -> list[Any]:
    """What stands between commas. Raises BadOption."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadOption(option, text, "a list of numbers with commas between", default) from None
