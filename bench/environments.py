"""Environments for packages that cannot be installed beside this project, made when they are first needed."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import torch


def environment(folder: Path, requirements: Sequence[str], alone: Sequence[str] = (), borrow: bool = False) -> Path:
    """The Python of an environment in ``folder`` with these packages and this torch, made now if it is not there.

    ``alone``: packages that come without what they ask for. ``borrow``: whatever this environment has is there too, so
    that neither torch nor transformers is installed again.
    """
    python, stamp = folder / "bin" / "python", folder / "requirements"
    if not borrow:
        requirements = [f"torch=={torch.__version__.partition('+')[0]}", *requirements]
    wanted = "\n".join([*requirements, *alone, str(borrow)])
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True)
    if borrow:
        paths = {"base": str(folder), "platbase": str(folder)}
        lent = Path(sysconfig.get_path("purelib", "venv", vars=paths)) / "borrowed.pth"
        lent.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for packages in (["--no-deps", *alone] if alone else [], requirements):
        if packages:
            command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            subprocess.run(command, check=True)
    stamp.write_text(wanted)
    return python
