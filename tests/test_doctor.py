"""``lorc doctor``: each finding, for what is there and for what is not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from lorc_fx import cli, doctor, models
from lorc_fx.doctor import FAIL, NOTE, OK, Finding

runner = CliRunner(env={"COLUMNS": "200"})


def by_name(found: Iterable[Finding]) -> dict[str, Finding]:
    return {f.what: f for f in found}


def test_versions_are_those_of_the_metadata() -> None:
    found = by_name(doctor.versions())
    for name in ("torch", "transformers", "sympy", "safetensors", "rich", "typer"):
        assert found[name].state == OK, found[name]
        assert found[name].found == metadata.version(name)
    assert found["Python"].state == OK
    assert found['backend="lorc"'].state == OK


@pytest.mark.parametrize(
    ("requirement", "state", "words"),
    [("torch<2", NOTE, "outside of <2"), ("torch>=2", OK, ""), ("no-such-package>=3", FAIL, "not installed")],
)
def test_a_version_is_judged(requirement: str, state: str, words: str) -> None:
    found = doctor._required(Requirement(requirement))
    assert found.state == state
    assert words in found.found
    assert bool(found.step) == (state != OK)


def test_extras_name_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "matplotlib" else version(name))
    found = by_name(doctor.extras())
    assert found["extra plot"] == Finding("extra plot", NOTE, "without matplotlib", "pip install 'lorc-fx[plot]'")
    assert {"extra demo", "extra test", "extra gpu"} <= set(found)


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-package")
    assert doctor._requirements() == []
    assert list(doctor.extras()) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("none")

    monkeypatch.setattr(doctor, "cpp_compiler", refuse)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    found = by_name(doctor.compilers())
    assert found["C++ compiler"].state == NOTE and "'inner': 'eager'" in found["C++ compiler"].step
    assert found["Triton"].state == NOTE
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert by_name(doctor.compilers())["Triton"].state == FAIL


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_devices(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(doctor.devices())
    assert found["CPU"].state == OK
    assert found["GPU"].state == NOTE
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    many = by_name(doctor.devices())["CPU"]
    assert many.state == NOTE and "OMP_NUM_THREADS=" in many.step
    about = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: about.name)
    gpu = by_name(doctor.devices())["GPU 0"]
    assert gpu.found == "NVIDIA H100 80GB HBM3, 80 GiB, sm_90; figures of its datasheet"


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORC_CACHE", str(tmp_path / "a" / "b"))
    found = by_name(doctor.folders())
    assert found["models and tuning"].state == OK and str(tmp_path) in found["models and tuning"].found
    monkeypatch.setenv("LORC_CACHE", "/proc/none")
    bad = by_name(doctor.folders())["models and tuning"]
    assert bad.state == NOTE and "LORC_CACHE" in bad.step
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "ROOM", 1 << 62)
    assert "more room" in by_name(doctor.folders())["models and tuning"].step
    monkeypatch.setattr(models, "DEMO_MODULE", "no_such_module")
    assert by_name(doctor.folders())["demo's model"].state == NOTE


@pytest.mark.parametrize(
    ("name", "value", "state", "words"),
    [
        ("LORC_DISABLE", "1", NOTE, "the backend is off"),
        ("LORC_DISABLE", "0", OK, "0"),
        ("LORC_DISABLE", "perhaps", FAIL, "perhaps"),
        ("TORCH_COMPILE_DISABLE", "1", NOTE, "caches stay dense"),
        ("TORCH_COMPILE_DISABLE", "true", OK, "true"),  # torch compares with 1
        ("TRITON_INTERPRET", "1", NOTE, "slower"),
        ("LORC_DUMP", "/tmp/x", OK, "/tmp/x"),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, state: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    found = by_name(doctor.environment())[f"${name}"]
    assert found.state == state
    assert words in found.found


def test_the_run(quiet: None) -> None:
    assert doctor._tried("eager", torch.device("cpu")).state == OK


def test_a_run_that_is_wrong_or_dense_or_breaks(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(doctor, "TOLERANCE", -1.0)
    wrong = doctor._tried("eager", cpu)
    assert wrong.state == FAIL and "off by" in wrong.found and "report" in wrong.step
    monkeypatch.setattr(doctor, "LatentKV", int)
    assert doctor._tried("eager", cpu).found == "its cache is dense"
    broken = doctor._tried("no such compiler", cpu)
    assert broken.state == FAIL and "UnknownBackend" in broken.found


@pytest.mark.parametrize(("state", "code"), [(OK, 0), (NOTE, 0), (FAIL, 1)])
def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, code: int) -> None:
    made: list[Any] = []

    def examined(show: Any, deep: bool) -> list[Finding]:
        made.append(deep)
        return [Finding("a [thing]", state, "so [much]", "do this")]

    monkeypatch.setattr(doctor, "examined", examined)
    out = tmp_path / "doctor.json"
    result = runner.invoke(cli.app, ["doctor", "--quick", "--json", str(out)])
    assert result.exit_code == code
    assert made == [False]
    for words in ("a [thing]", "so [much]", "do this", state):
        assert words in result.output
    assert json.loads(out.read_text()) == [
        {"what": "a [thing]", "state": state, "found": "so [much]", "step": "do this"}
    ]


def test_everything_quick(quiet: None, no_gpu: None) -> None:
    """Nothing of what is looked at here raises, and the run is among it."""
    stages: list[str] = []
    show: Any = SimpleNamespace(stage=stages.append)
    found = doctor.examined(show, deep=False)
    assert not [f for f in found if f.state == FAIL]
    assert len(stages) == 1
    assert found[-1].what == "a small Llama on cpu, inner='eager'"
