"""Resident memory of this process, in bytes (Linux). Unlike ``ru_maxrss``, the peak here can begin anew, and it is not
inherited from the process that started this one."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since ``reset_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> int:
    """Bytes now, from which a new peak counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def give_back() -> None:
    """What was freed goes back to the system, else later allocations would fill it without showing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
