"""Tests of the C++ that reads rows, with fewer instructions than this machine has (``test_instructions`` runs it, in a
process of its own): python tests/instructions.py WIDTH FLAG [pytest's arguments]."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch._inductor.config
from torch._inductor.codecache import CppCodeCache


def restricted(width: int, flag: str) -> None:
    """From now on the library is compiled for vectors of ``width`` bits (1: none) and with one more flag."""
    torch._inductor.config.cpp.simdlen = width
    load = CppCodeCache.load

    def load_with(source: str, *given: Any, extra_flags: tuple[str, ...] = (), **more: Any) -> Any:
        return load(source, *given, extra_flags=(*extra_flags, flag), **more)

    CppCodeCache.load = load_with


def main() -> int:
    width, flag, *given = sys.argv[1:]
    restricted(int(width), flag)
    from lorc_fx.kernels import native

    assert native.library() is not None
    code = subprocess.run(["objdump", "-d", native.library()._name], capture_output=True, text=True, check=True).stdout
    print("widest registers:", next((name for name in ("zmm", "ymm", "xmm") if f"%{name}" in code), "none"))
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:randomly", *given]))


if __name__ == "__main__":
    sys.exit(main())
