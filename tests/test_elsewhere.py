"""Decoders of other packages: right at full rank and at half the bytes, and coded where their caches are born in the
compiled region. Needs pip, and minutes: ``pytest -m elsewhere``; ``test_hand_written`` has the forms that they write.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from bench import elsewhere, elsewhere_zoo, environments, verdicts
from lorc_fx import models

FOLDER = Path(models.cache_root()) / "elsewhere"


@pytest.mark.elsewhere
@pytest.mark.parametrize("package", elsewhere.PACKAGES)
def test_decoders_of_a_package(package: str) -> None:
    try:
        elsewhere.made(package, FOLDER)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"no environment for {package} can be made in {FOLDER}: {error}")
    rows = elsewhere.measured(package, FOLDER)
    families = [family for family in elsewhere_zoo.FAMILIES if family.package == package]
    assert [row["class"] for row in rows] == [family.cls for family in families]
    for row in rows:
        said = verdicts.verdict(row)
        assert row["ways"] and not said.startswith(("WRONG", "DIED")), (row["class"], said)
        for name, way in row["ways"].items():
            assert "cached" in way, (row["class"], name, way)
            assert not verdicts.silent(way), (row["class"], name)
            whole = way["coded"] == way["cached"]
            assert whole == (name in _coded(row)), (row["class"], name, way["dense"], way["said"])


def _coded(row: verdicts.Row) -> set[str]:
    """The ways in which a model's caches must be coded."""
    if row["class"] in ("Gemma-2", "Gemma-3"):  # litgpt's sliding windows ask for a number in the middle of attention
        return set()
    return {"use_cache", "born in the graph", "born in the graph, positions per row"}


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again where what it needs has changed, or where pip failed."""
    asked: list[list[str]] = []
    fails = [True]

    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").touch()

    def pip(command: list[str], check: bool) -> None:
        asked.append(command[6:])
        if fails.pop() if fails else False:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.setattr(environments.subprocess, "run", pip)
    with pytest.raises(subprocess.CalledProcessError):
        environments.environment(tmp_path, ["a==1"])
    for _ in range(2):
        environments.environment(tmp_path, ["a==1"])
    environments.environment(tmp_path, ["a==2"])
    assert [names[1:] for names in asked] == [["a==1"], ["a==1"], ["a==2"]]
    assert all(names[0].startswith("torch==") for names in asked)


def test_a_borrowing_environment_sees_what_this_one_has(tmp_path: Path) -> None:
    python = environments.environment(tmp_path / "env", [], borrow=True)
    code = "import torch, sys; print(torch.__file__, sys.prefix)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    where, prefix = found.stdout.split()
    assert where == torch.__file__ and Path(prefix) == tmp_path / "env"
