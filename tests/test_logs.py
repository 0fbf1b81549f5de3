"""``TORCH_LOGS="+lorc"`` and ``LORC_DUMP``: what is generated can be read, and looking at it changes nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch

from bench.attention_cases import Case, build
from lorc_fx import logs
from lorc_fx.errors import KernelWarning, LorcWarning
from lorc_fx.kernels import launch


def step() -> torch.Tensor:
    """A prompt and a step of a model whose rows are read as they are."""
    model = tiny.llama(heads=8, kv_heads=8)
    known = {"basis": "identity", "calibration": "none", "precision": "int8"}
    model.compile(backend="lorc", options={"inner": "eager", **known})
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        return model(ids[:, -1:], past_key_values=cache).logits


def test_graphs_are_dumped_and_say_what_they_are(clean, tmp_path, monkeypatch):
    want = step()
    torch._dynamo.reset()
    monkeypatch.setenv("LORC_DUMP", str(tmp_path / "new" / "folder"))
    assert torch.equal(step(), want)
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert len(files) == 2 and all(f.name.startswith("graph-layer_0_") and f.suffix == ".py" for f in files)
    for file in files:
        compile(file.read_text(), file.name, "exec")
    texts = [f.read_text() for f in files]
    assert all("# layer 1 value: rows ((64, 8),)" in text for text in texts)
    (decode,) = [text for text in texts if "torch.ops.lorc.attend" in text]
    digest = decode.split("keys 8 heads of 8")[0].split("# ")[-1].split(":")[0]
    assert decode.count(digest) >= 2, "the reader in words, and the op that names it"
    torch._dynamo.reset()
    step()
    assert sorted((tmp_path / "new" / "folder").iterdir()) == files, "equal graphs have equal names"


def test_kernels_are_dumped(tmp_path, monkeypatch):
    monkeypatch.setenv("LORC_DUMP", str(tmp_path))
    monkeypatch.setenv("LORC_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(launch, "_made", {})
    given = build(Case(rotary="half", heads=4, cached=2, keys=((32, 8),)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)  # without Triton the source is all there is
        try:
            launch.attend(*given)
        except RuntimeError:  # Triton is there, and no GPU
            pass
    (file,) = tmp_path.glob("*.py")
    assert file.name.startswith("kernel-kernel_4_query_heads") and given[0].digest[:12] in file.name
    assert "def attend(" in file.read_text()


def test_a_folder_that_cannot_be_written_is_said_once(clean, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORC_DUMP", str(tmp_path / "file"))
    logs._warn.cache_clear()
    with pytest.warns(LorcWarning, match="LORC_DUMP") as said:
        step()
    assert len([w for w in said if "LORC_DUMP" in str(w.message)]) == 1


def test_nothing_is_made_where_nobody_looks(monkeypatch):
    monkeypatch.delenv("LORC_DUMP", raising=False)
    monkeypatch.setattr(logs.log, "level", logging.WARNING)
    logs.log.manager._clear_cache()

    def text() -> str:
        raise AssertionError("a text was made")

    logs.show("graph", "nothing", text)


def test_torch_logs_takes_the_name():
    """In a process of its own: torch reads the variable while it is imported."""
    here = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import test_logs; test_logs.step()"
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TORCH_LOGS": "+lorc", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "graph of layer 0" in done.stderr and "torch.ops.lorc.attend" in done.stderr
