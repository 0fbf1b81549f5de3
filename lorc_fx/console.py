"""What all commands share: typed errors as one message and an exit code, progress on stderr, files written whole."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from lorc_fx.errors import BadCertificate, BadModel, BadOption, BadWeight, LorcError

out, err = Console(), Console(stderr=True)

OF_MODELS = (BadModel, BadWeight, BadCertificate)
"""ValueErrors that are about a model, not about an option: exit code 1."""


class DType(StrEnum):
    """The dtype that a model runs in."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    def torch(self) -> Any:
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.value]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Typed errors (also those that Dynamo wrapped) and Ctrl-C as one message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("[red]Interrupted.[/red]")
        raise typer.Exit(130) from None
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        if not isinstance(cause, LorcError):
            raise
        err.print(f"[red]Error: {escape(str(cause))}[/red]", soft_wrap=True)
        raise typer.Exit(2 if isinstance(cause, ValueError) and not isinstance(cause, OF_MODELS) else 1) from None


class Show:
    """Progress on stderr: a bar on a terminal, one line per stage elsewhere."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=err, transient=True, redirect_stdout=False) if err.is_terminal else None
        self.task: Any = None
        self.start = time.perf_counter()

    def __enter__(self) -> Show:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self.bar:
            self.bar.stop()

    def stage(self, text: str) -> None:
        """A new stage of unknown length."""
        if self.bar is None:
            err.print(escape(f"[{time.perf_counter() - self.start:6.1f} s] {text}"), soft_wrap=True)
            return
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(escape(text), total=None)

    def progress(self, done: int, total: int) -> None:
        """How far the stage is."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total)


def can_be_written(option: str, path: Path) -> None:
    """Before anything slow starts. Raises BadOption of ``option`` where ``path`` is a folder or in none."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise BadOption(option, str(path), "a file in a folder that exists")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that ``path`` is either the old file or the whole new one; what is no finite number (a bound
    that says nothing, say) as null. Raises BadOption."""
    from lorc_fx.plan_file import replaced  # which imports torch

    text = json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    try:
        with replaced(path) as partial:
            partial.write_text(text)
    except OSError as error:
        raise BadOption("json", str(path), f"a path that can be written ({error})") from error


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null in their places."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_path(path: Path) -> None:
    """A file that was written, on a line of its own. Brackets in it are no markup."""
    out.print(escape(str(path)), soft_wrap=True)


def wide() -> Console:
    """Where tables go: the terminal, or as wide as they are."""
    return out if out.is_terminal else Console(width=140)
