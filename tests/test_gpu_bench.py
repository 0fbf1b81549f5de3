"""``bench.gpu`` without a GPU: the same code at tiny sizes, and what it does when time is short or a process ends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_cases, gpu_op, kernel_runs
from bench.gpu_report import Jobs, Report
from bench.gpu_timing import Clock
from lorc_fx.kernels import reference, tiled

TRITON = importlib.util.find_spec("triton") is not None
CPU = torch.device("cpu")


def script(out: Path, *args: str, **env: str) -> dict[str, Any]:
    """What ``python -m bench.gpu --device cpu --quick`` writes, in a process of its own."""
    root = Path(__file__).parents[1]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LORC_KERNEL_CACHE": str(out.parent / "kernels")}
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", str(out), *args]
    done = subprocess.run(command, cwd=root, env={**os.environ, **own, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def test_the_whole_script_runs(tmp_path):
    found = script(tmp_path / "gpu.json", "--seconds", "3000", TRITON_INTERPRET="1")
    left_out = {s["what"] for s in found["skipped"]}
    assert found["failed"] == []
    assert left_out == {"model: full rank, static, CUDA graphs"} | (set() if TRITON else {"values", "op", "encode"})
    assert {name: c["right"] for name, c in found["checks"]["models"].items()} == {"full rank, static": True}
    assert set(found["steps"]["ms"]) == set(gpu.QUICK.variants)
    assert set(found["steps"]["prompt_ms"]) == {"dense", "int8 rows"}
    sizes = found["steps"]["cache_bytes"]
    assert sizes["int8 rows"] < 0.3 * sizes["dense"], "fp32 numbers as bytes"
    assert found["machine"]["torch"] == torch.__version__ and found["took_s"]["all"] > 0
    if TRITON:
        assert found["checks"]["values"]["right"] == len(gpu.QUICK.names) and found["checks"]["values"]["wrong"] == []
        assert [t["out"] for t in found["tuned"]] == [{}] * len(gpu_cases.QUICK)
        (row,) = found["op"]
        assert [w["way"] for w in row["ways"]] == list(gpu_cases.QUICK) and "flash" in row["dense_ms"]
        assert all(w["ms"] <= w["default_ms"] for w in row["ways"])
        assert found["encode"][0]["equal_rows"] == 1.0
    assert {g["met"] for g in found["goals"].values()} == {None}, "nothing was measured at the sizes of the goals"


def test_without_time_everything_is_left_out_and_said(tmp_path):
    report = Report(tmp_path / "gpu.json", 0.0, {})
    gpu.run(report, gpu.QUICK, CPU, gpu.PARTS)
    report.data["goals"] = gpu.goals(report.data)
    report.write()
    found = json.loads((tmp_path / "gpu.json").read_text())
    said = {s["what"] for s in found["skipped"]}
    assert {"model: full rank, static", "model of steps"} <= said and found["steps"] is None and found["op"] == []


def test_goals_are_judged_by_the_worst():
    def row(tokens: int, **times: float) -> dict[str, Any]:
        ways = [{"way": w, "share_of_copy": t / 2, "times_dense": t} for w, t in times.items()]
        return {"tokens": tokens, "ways": ways}

    ms = {"dense": 3.0, "dense, static": 2.0, "int8 rows": 1.25, "4-bit rows": 1.0}
    steps = {"tokens": 32768, "batch": 16, "ms": ms}
    op = [row(16384, int8=1.9, **{"4 bits": 3.0}), row(32768, int8=1.8), row(2048, int8=1.0)]
    found = gpu.goals({"op": op, "steps": steps})
    assert found["bandwidth"] == {"wanted": 0.9, "worst": 0.9, "met": True}
    assert found["half"]["worst"] == 1.8 and found["half"]["met"] and found["quarter"]["met"]
    assert found["step"] == {"wanted": 1.4, "worst": 1.6, "met": True}
    assert gpu.goals({"op": op, "steps": {**steps, "batch": 4}})["step"]["met"] is None


def test_what_raises_is_noted_and_the_rest_goes_on(tmp_path):
    report = Report(tmp_path / "gpu.json", 60.0, {"machine": {}})
    assert report.attempt("good", 1, lambda: 3) == 3
    assert report.attempt("bad", 1, lambda: 1 // 0) is None
    assert report.attempt("long", 100, lambda: 3) is None
    report.write()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [f["what"] for f in found["failed"]] == ["bad"] and "ZeroDivisionError" in found["failed"][0]["error"]
    assert [s["what"] for s in found["skipped"]] == ["long"]


def test_jobs_of_a_process_that_ends_or_hangs_are_said():
    jobs = Jobs("values", CPU, [], 2)
    jobs.names = ["a", "b", "c"]
    for i, (text, names) in enumerate({
        "print('{\"a\": {\"right\": true}}', flush=True); raise SystemExit('gone')": ["a", "b"],
        "import time; time.sleep(60)": ["c"],
    }.items()):  # fmt: skip
        out = Path(jobs.folder.name) / str(i)
        with out.open("wb") as file, out.with_suffix(".err").open("wb") as errors:
            process = subprocess.Popen([sys.executable, "-c", text], stdout=file, stderr=errors)
        jobs.running.append((process, out, names))
    jobs.running[0][0].wait()
    found, missing = jobs.results(0.1)
    assert found == {"a": {"right": True}}
    assert missing == {"b": "its process ended with 1: gone", "c": "there was no time"}


@pytest.mark.parametrize("way", gpu_cases.WAYS)
def test_ways_take_the_bytes_that_they_are_named_for_and_give_the_reference(way):
    wanted = {"int8": 0.5, "4 bits": 0.25, "model's dtype": 1.0, "int8 keys, joint values": 0.375}.get(way, 0.25)
    given = gpu_cases.reader(way, gpu_cases.LLAMA)
    assert gpu_cases.row_bytes(given) / gpu_op.dense_bytes(gpu_cases.LLAMA, 1, 1) == pytest.approx(wanted, abs=2e-3)
    given = gpu_cases.grown(gpu_cases.reader(way, gpu_cases.TINY), 70, 3, CPU)
    assert given[2].rows.shape[:2] == (70, 3) == given[3].rows.shape[:2]
    torch.testing.assert_close(tiled.attend(*given).double(), reference.attend(*given), atol=0.02, rtol=0.02)


def test_configs_are_those_that_were_compiled():
    names = gpu_op.jobs((4, 16))
    assert names[:2] == ["int8:0:4", "int8:0:16"] and len(set(names)) == len(names)
    known = gpu_op.compiled(names[:14], 4)
    assert known["int8"] == [0, 1] and known["joint"] == [0]
    assert set(gpu.all_values()) > set(kernel_runs.VALUES)
    assert len(gpu.all_values()) == 3 * len(kernel_runs.VALUES)


def test_the_clock_takes_turns():
    said: list[str] = []
    ms = Clock(CPU).medians({n: lambda n=n: said.append(n) for n in "ab"}, 3)
    assert said == [*"ab", *"ab", *"ba", *"ab"] and set(ms) == {"a", "b"}
