"""The two files of a saved plan: readable JSON, one site per line, and the tensors that its codecs need beside it.

A plan that knows nothing of the data (the paper's) is the JSON alone. The JSON holds a checksum of the tensors, so
files of two different plans are never taken for one. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import BadPlan

VERSION = 4
READABLE = (2, 3, VERSION)
"""Version 2 had neither tensors nor predicted losses, version 3 no sites that are cached as they are."""


def tensor_path(path: Path) -> Path:
    """``NAME.safetensors`` beside ``NAME.json``."""
    return path.with_name(path.name.removesuffix(".json") + ".safetensors")


def write(path: Path, lines: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one line of JSON per site and, where there are any, the tensors.

    Both files are replaced whole, the tensors first: after a crash in between, the old JSON does not fit the new
    tensors, which ``read`` says. Raises OSError.
    """
    about = "null"
    if tensors:
        beside = tensor_path(path)
        write_tensors(beside, tensors, {"lorc_fx_plan": str(VERSION)})
        about = json.dumps({"file": beside.name, "sha256": checksum(tensors)}, sort_keys=True)
    body = ",\n".join(json.dumps(line, sort_keys=True) for line in lines)
    with replaced(path) as partial:
        partial.write_text(f'{{\n"lorc_fx_plan": {VERSION},\n"sites": [\n{body}\n],\n"tensors": {about}\n}}\n')


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The lines, and the tensors (none where the plan has none). Raises BadPlan for files that are missing, of another
    version, cut off, or not of one plan."""
    try:
        data = json.loads(path.read_text())
        if data.get("lorc_fx_plan") not in READABLE:
            allowed = " or ".join(map(str, READABLE))
            raise BadPlan(str(path), f"it is of version {data.get('lorc_fx_plan')!r}, not {allowed}")
        about = data.get("tensors")
        tensors = {} if about is None else _tensors(path, str(about["file"]), about["sha256"])
        return [dict(line) for line in data["sites"]], tensors
    except BadPlan:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as why:
        raise BadPlan(str(path), f"it cannot be read as a plan ({why})") from None


def _tensors(path: Path, name: str, wanted: object) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = path.with_name(Path(name).name)  # wherever both were moved to
    if not beside.is_file():
        raise BadPlan(str(path), f"its tensor file {beside} is missing; keep the two together")
    try:
        tensors = {name: t.clone() for name, t in load_file(beside).items()}  # not mapped: the file may be replaced
    except (OSError, SafetensorError) as why:
        raise BadPlan(str(path), f"its tensor file {beside} cannot be read ({why})") from None
    if checksum(tensors) != wanted:
        raise BadPlan(str(path), f"its tensor file {beside} is of another plan (the checksum differs)")
    return tensors


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and contents, in hex."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new file to write to, which becomes ``path`` if the block ends without an error and is removed if not."""
    partial = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.part"
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file, which is replaced whole; ``about`` goes into its header. Raises OSError."""
    from safetensors.torch import save_file

    with replaced(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(dict(tensors), partial, metadata=dict(about))
        partial.chmod(mode)  # save_file makes it readable by its owner only
