"""Kernels that code new rows: values under Triton's interpreter, builds without a device, and the op."""

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
from encode_runs import BUILDS, EXAMPLES, Case, inputs
from tiny import llama
from transformers import DynamicCache

from bench.kernel_runs import SHARED, TARGETS
from lorc_fx.evaluate import cache_keyword
from lorc_fx.kernels import encode, encode_source
from lorc_fx.packing import Format, Segment

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it is for Linux on x86_64"
)

QUICK = [("sm_90", "plain"), ("gfx942", "8 and 4 bits")]
"""Builds of the default run; the others are slow."""


def run(folder: Path, *args: str, **env: str) -> Any:
    """What ``encode_runs.py`` prints."""
    root = Path(__file__).parents[1]
    own = {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)]), "LORC_KERNEL_CACHE": str(folder)}
    own["TRITON_CACHE_DIR"] = str(folder / "triton")
    command = [sys.executable, str(root / "tests" / "encode_runs.py"), *args]
    done = subprocess.run(command, env={**os.environ, **own, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_rows_are_those_of_pack(tmp_path):
    assert run(tmp_path, "values", TRITON_INTERPRET="1") == {"right": True}


@needs_triton
@pytest.mark.parametrize(
    ("target", "name"),
    [pytest.param(t, n, marks=[] if (t, n) in QUICK else pytest.mark.slow) for t in TARGETS for n in BUILDS],
)
def test_they_build(target, name, tmp_path):
    found = run(tmp_path, "build", target, name)[name]
    assert found["bytes"] > 1000 and found["shared"] <= SHARED[target]


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_the_op_is_the_linear_layer_and_pack_off_gpus(case):
    *tensors, form = inputs(case, whole=False)
    columns, bits = zip(*case.segments, strict=True)
    given = (*tensors, list(columns), list(bits), form.choices, form.dtype)
    made = torch.ops.lorc.encode(*given)
    assert torch.equal(made, encode.reference(*tensors, form))
    torch.library.opcheck(torch.ops.lorc.encode.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("wired", [(), ("cpu",)])
def test_graphs_use_the_op_where_it_is_wired_for_steps_of_few_tokens(wired, monkeypatch, clean):
    monkeypatch.setattr(encode, "WIRED", wired)
    seen: list[tuple[int, int]] = []  # tokens of a graph, and how often it has the op
    pieces: list[int] = []

    def inner(gm: Any, examples: Any) -> Any:
        found = [n for n in gm.graph.nodes if n.target is torch.ops.lorc.encode.default]
        seen.append((pieces[-1], len(found)))
        return gm.forward

    lm, compiled, ids = llama(), llama(), torch.arange(100)[None] % 28
    cache, dense = DynamicCache(config=lm.config), DynamicCache(config=lm.config)
    options = {"ratio": 0.6, "precision": "int8", "basis": "joint", "calibration": "none", "inner": inner}
    compiled.compile(backend="lorc", options=options)
    with torch.no_grad():
        for piece in (ids, ids[:, :1], ids[:, 1:2]):
            pieces.append(piece.shape[1])
            want = lm(input_ids=piece, use_cache=True, **{cache_keyword(lm): dense}).logits[:, -1]
            got = compiled(input_ids=piece, use_cache=True, **{cache_keyword(lm): cache}).logits[:, -1]
    assert dict(seen) == {100: 0, 1: 4 * len(wired)}, "keys and values of two layers"
    assert float((got - want).norm() / want.norm()) < 0.1


def test_sources_are_the_same_for_equal_formats_and_are_python():
    def source(*segments: tuple[int, int], means: int = 1) -> str:
        form = Format(tuple(Segment(*s) for s in segments), means, torch.bfloat16)
        return encode_source.generate(form, torch.float32, form.columns + means - 1, False, True, "float32")

    first = source((8, 0), (33, 4), (9, 3), means=3)
    assert first == source((8, 0), (33, 4), (9, 3), means=3) != source((8, 0), (33, 4), (9, 3))
    assert "rows ((8, 0), (33, 4), (9, 3)), 3 means, bfloat16, encoded in float32" in first
    compile(first, "generated", "exec")


def test_what_does_not_fit_is_refused():
    *tensors, form = inputs(Case(((8, 4),)), whole=True)
    with pytest.raises(ValueError, match="no contiguous ones of torch.uint8"):
        encode.encode(*tensors, form, out=torch.zeros(4, 2, form.width))
    with pytest.raises(ValueError, match="2 means needs offsets"):
        encode.encode(*tensors, Format(form.segments, 2, form.dtype))


@pytest.mark.parametrize(("depth", "wanted"), [(1, (1, 64)), (64, (1, 64)), (600, (2, 320)), (4096, (16, 256))])
def test_stretches_cover_all_features(depth, wanted):
    splits, each = encode.stretches(depth)
    assert (splits, each) == wanted and (splits - 1) * each < depth <= splits * each
