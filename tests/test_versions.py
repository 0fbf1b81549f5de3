"""What a run of the tests says of versions is counted from pytest's report, and replaces what was said before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import summaries, versions

TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
@pytest.mark.parametrize("n", [1, 2])
def test_skipped(n): pytest.skip("no device")
@pytest.mark.xfail
def test_known(): assert False
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of pytest with one of everything, and two skips."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_of_everything.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "--rootdir=."]
    subprocess.run([*command, "test_of_everything.py"], cwd=folder, capture_output=True, check=False)
    return folder / "report.xml"


def test_every_outcome_is_counted(report: Path) -> None:
    found = versions.counted(report)
    assert {key: found[key] for key in ("passed", "failed", "known_failures")} == {
        "passed": 1,
        "failed": 2,
        "known_failures": 1,
    }
    assert found["skipped"] == {"no device": 2}


def test_a_row_replaces_that_of_the_same_versions_and_tests(report: Path, tmp_path: Path) -> None:
    out = tmp_path / "versions.json"
    for suite in ("quick", "all", "quick"):
        with pytest.raises(SystemExit, match="2 of these tests failed"):
            versions.main([str(report), suite, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["suite"] for row in rows] == ["all", "quick"]
    assert "| 1 | 2 (1 known) | 2 |" in summaries.supported({"rows": rows})


def test_versions_sort_as_versions() -> None:
    rows: list[dict[str, Any]] = []
    for torch in ("2.13.0", "2.9.0", "2.11.0"):
        row = {"python": "3.11.7", "torch": torch, "triton": None, "transformers": "5.17.0", "suite": "quick"}
        rows = versions.added(rows, row)
    assert [row["torch"] for row in rows] == ["2.9.0", "2.11.0", "2.13.0"]
