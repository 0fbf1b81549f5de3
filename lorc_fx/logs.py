"""What lorc_fx generates, to be looked at: by torch's own log switch, and as files.

    TORCH_LOGS="+lorc"    each rewritten graph and each kernel's source at level debug, on stderr as torch's own logs
    LORC_DUMP=folder      the same as files, ``graph-<sites>-<digest>.py`` and ``kernel-<reader>-<digest>.py``

torch reads ``TORCH_LOGS`` while it is imported, before this package can be, and refuses names that are neither its own
nor a module that can be found: hence the module ``lorc`` beside this package.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from .errors import LorcWarning

log = logging.getLogger("lorc")
LONGEST_NAME = 200
"""Characters of a file's name that say what is in it; file systems take 255 with the rest."""


def show(kind: str, about: str, text: Callable[[], str]) -> None:
    """Logs and dumps a generated text, where either is asked for (``text`` is not called elsewhere). ``kind``: the
    first word of its file's name. A folder that cannot be written is said once, and work goes on."""
    folder = os.environ.get("LORC_DUMP")
    logged = log.isEnabledFor(logging.DEBUG)
    if not folder and not logged:
        return
    source = text()
    if logged:
        log.debug("%s of %s\n%s", kind, about, source)
    if folder:
        _dump(Path(folder).expanduser(), f"{_named(kind, about)}-{_digest(source)}.py", source)


def _named(kind: str, about: str) -> str:
    return f"{kind}-{re.sub(r'[^A-Za-z0-9.+]+', '_', about).strip('_')}"[:LONGEST_NAME]


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _dump(folder: Path, name: str, source: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    except OSError as error:
        _warn(str(folder), str(error))


@functools.cache
def _warn(folder: str, why: str) -> None:
    text = f"LORC_DUMP={folder!r} cannot be written ({why}): generated sources are not kept. Give a folder that can be."
    warnings.warn(text, LorcWarning, stacklevel=5)
