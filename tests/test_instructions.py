"""The C++ that reads rows is right on machines with fewer instructions than this one."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = ["test_turn.py::test_it_is_the_reference", "test_attend.py::test_tiles_are_the_reference", "test_pack_op.py"]
TESTS += ["test_sums_op.py", "test_from_y.py::test_rows_of_y_are_those_of_its_latents"]

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or shutil.which("objdump") is None,
    reason="the flags are those of x86, and objdump shows what they did",
)


@pytest.mark.parametrize(("width", "flag", "widest"), [(256, "-mno-avx512f", "ymm"), (1, "-mno-avx", "xmm")])
def test_fewer_instructions(width: int, flag: str, widest: str, tmp_path: Path) -> None:
    tests = [str(HERE / name) for name in TESTS]
    command = [sys.executable, str(HERE / "instructions.py"), str(width), flag, *tests]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"widest registers: {widest}" in done.stdout
