"""What the tests said of each set of versions: a row of ``bench/results/versions.json`` from pytest's own XML report.

    pipx run nox                             runs the tests in every environment, and then this

    python bench/versions.py REPORT.xml SUITE [--out bench/results/versions.json]

A row is known by its versions and by what was run (``SUITE``), and replaces an older one of the same. Only Python is
needed, so that any environment can run it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

OUT = Path(__file__).parent / "results" / "versions.json"
COMMAND = "pipx run nox"
PACKAGES = ("torch", "triton", "transformers")
#: what a row is known by
KEY = ("python", *PACKAGES, "suite")


def installed() -> dict[str, str | None]:
    """Versions of this environment; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def counted(report: Path) -> dict[str, Any]:
    """Tests, failures, skips and seconds of pytest's ``--junitxml``, with the reason of every skip and how often."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "errors", "failures")}
    reasons: dict[str, int] = {}
    for skipped in (found for suite in suites for found in suite.iter("skipped")):
        if skipped.get("type") == "pytest.skip":  # the others are known failures, which pytest counts as skipped too
            reason = skipped.get("message", "")
            reasons[reason] = reasons.get(reason, 0) + 1
    known = sum(found.get("type") == "pytest.xfail" for suite in suites for found in suite.iter("skipped"))
    failed = total["errors"] + total["failures"]
    passed = total["tests"] - failed - known - sum(reasons.values())
    seconds = round(sum(float(suite.get("time", 0)) for suite in suites))
    return {"passed": passed, "failed": failed, "known_failures": known, "skipped": reasons, "seconds": seconds}


def added(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """``rows`` with this one instead of an older one of the same versions and tests, by version."""
    kept = [old for old in rows if any(old[name] != row[name] for name in KEY)]
    return sorted([*kept, row], key=lambda found: [_ordered(found[name] or "") for name in KEY])


def _ordered(version: str) -> list[tuple[int, str]]:
    """What sorts 2.9 before 2.11: numbers as numbers, and before words."""
    return [(int(part), "") if part.isdigit() else (10**9, part) for part in re.split(r"[.+ ]", version)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("suite", help="which tests these were, in a word")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(argv)
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    today = datetime.date.today().isoformat()
    row = {**installed(), "suite": given.suite, **counted(given.report), "system": platform.platform(), "date": today}
    given.out.write_text(json.dumps({"command": COMMAND, "rows": added(rows, row)}, indent=1) + "\n")
    if row["failed"]:
        raise SystemExit(f"{row['failed']} of these tests failed: {given.report}")


if __name__ == "__main__":
    main()
