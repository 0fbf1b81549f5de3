"""Generated Triton kernels: values against the reference under Triton's interpreter, builds without a device."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.attention_cases import Case, build, decoder_of
from bench.kernel_runs import BUILDS, SHARED, TARGETS, TOLERANCE, VALUES
from lorc_fx.errors import KernelWarning
from lorc_fx.kernels import fallback, launch, row_source, tiled
from lorc_fx.kernels.config import Config
from lorc_fx.kernels.expressions import NotGenerated
from lorc_fx.kernels.generator import generate
from lorc_fx.kernels.numbered import Constant
from lorc_fx.kernels.symbolic import epilogue_of

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it is for Linux on x86_64"
)
QUICK = [("sm_90", "rotary"), ("gfx942", "mixed bits")]
"""Builds of the default run; the others are slow."""


def run(folder: Path, *args: str, **env: str) -> Any:
    """What ``bench.kernel_runs`` prints."""
    paths = os.pathsep.join(filter(None, sys.path))
    own = {"PYTHONPATH": paths, "LORC_KERNEL_CACHE": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-m", "bench.kernel_runs", *args]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env={**os.environ, **own, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: found for line in done.stdout.splitlines() for name, found in json.loads(line).items()}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """All cases in one process: importing torch and Triton takes longer than most of them."""
    return run(tmp_path_factory.mktemp("kernels"), "values", "cpu", *VALUES, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_the_reference(name, values):
    found = values[name]
    assert found.get("failed") is None and found["said"] == []
    assert found["error"] < TOLERANCE[VALUES[name].dtype]


@needs_triton
@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(t, n, marks=[] if (t, n) in QUICK else pytest.mark.slow, id=f"{t}-{n}")
        for t in TARGETS
        for n in BUILDS
    ],
)
def test_it_builds(target, name, tmp_path):
    found = run(tmp_path, "build", target, name)[name]
    assert found["bytes"] > 1000
    assert found["shared"] <= SHARED[target]


# -- without Triton ---------------------------------------------------------------------------------------------------


def pieces(rotary: str | None, norm: str | None, dim: int = 64) -> list[tuple[int, int, int]]:
    about, _, keys, _, _ = build(Case(rotary=rotary, norm=norm, cached=2, dim=dim))
    consts = [Constant(tuple(c.shape), c.dtype) for c in keys.parts(about.keys)[2]]
    return [(p.features.base, p.features.step, p.features.items) for p in epilogue_of(about.keys, consts).pieces]


@pytest.mark.parametrize(
    ("rotary", "norm", "wanted"),
    [
        ("half", None, [(0, 1, 32), (32, 1, 32)]),
        ("half", "rms", [(0, 1, 32), (32, 1, 32)]),
        ("interleaved", None, [(0, 2, 32), (1, 2, 32)]),
        ("complex", "l2", [(0, 2, 32), (1, 2, 32)]),
        ("partial", None, [(0, 1, 8), (8, 1, 8), (16, 1, 48)]),
        ("table", None, [(0, 1, 32), (32, 1, 32)]),
        (None, "layer", [(0, 1, 64)]),
    ],
)
def test_a_head_falls_into_pieces(rotary, norm, wanted):
    assert pieces(rotary, norm) == wanted


def refused(fn: Any, **more: Any) -> tuple[Any, ...]:
    """A case whose key epilogue is ``fn(y, positions)`` on [B, T, 128] -> [B, 2, T, 64]."""
    about, query, keys, values, extras = build(Case(rotary="half", cached=2, **more))
    module = torch.fx.experimental.proxy_tensor.make_fx(fn, tracing_mode="symbolic", pre_dispatch=True)(
        torch.zeros(2, 3, 128), torch.zeros(2, 3, dtype=torch.int32)
    )
    decoder = replace(about.keys.decoder, module=module, digest="")
    keys = replace(keys, codec=keys.codec[:-1])
    return replace(about, keys=replace(about.keys, decoder=decoder)), query, keys, values, extras


def heads(y: torch.Tensor) -> torch.Tensor:
    return y.view(y.shape[0], y.shape[1], 2, 64).transpose(1, 2)


def joined_pairs(x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(torch.cat([2 * pairs[..., :4], pairs[..., 4:]], -1)).flatten(-2)


SCATTERED = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
REFUSED = {
    "softmax": (lambda y, p: heads(y).softmax(-1), "an op of which no kernel is made"),
    "cumulative": (lambda y, p: heads(y).cumsum(-1), "an op of which no kernel is made"),
    "scattered features": (lambda y, p: torch.stack([heads(y)[..., i] for i in SCATTERED], -1), "pieces"),
    "two kinds of heads": (lambda y, p: torch.stack([heads(y)[:, 0], heads(y)[:, 1].cos()], 1), "different ways"),
    "scaled on the way": (lambda y, p: torch.rsub(heads(y), 1.0, alpha=2), "it scales or rounds"),
    "bits": (lambda y, p: heads(y) * torch.bitwise_not((4 * heads(y)).to(torch.int64)), "bits of integers"),
    "joined pairs": (lambda y, p: joined_pairs(heads(y)), "in this form"),
    "a third power": (lambda y, p: heads(y).pow(3), "a power of 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_gets_no_kernel_runs_in_tiles_and_is_said_once(name, monkeypatch):
    monkeypatch.setattr(fallback, "_said", set())
    monkeypatch.setattr(launch, "_made", {})
    fn, why = REFUSED[name]
    given = refused(fn)
    with pytest.raises(NotGenerated, match=why):
        generate(given[0], launch.given_of(*given), Config())
    with pytest.warns(KernelWarning, match=why):
        got = launch.attend(*given)
    assert torch.equal(got, tiled.attend(*given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.attend(*given)


def test_sources_are_the_same_for_equal_readers_and_say_what_they_are():
    def source(**more: Any) -> str:
        given = build(Case(rotary="half", keys=((32, 8), (16, 4)), **more))
        return generate(given[0], launch.given_of(*given), Config()).source

    first = source()
    assert first == source(tokens=200, batch=3, seed=1), "sizes of batch and tokens are no part of a kernel"
    assert first != source(queries=4)
    assert "keys: 1 heads of 64, rows ((32, 8), (16, 4)), decoded" in first
    compile(first, "generated", "exec")


def test_strides_are_known_to_be_multiples_of_a_formats_alignment():
    def source(*segments: tuple[int, int]) -> str:
        about, query, keys, values, extras = build(Case(keys=segments, values=segments))
        made = generate(about, launch.given_of(about, query, keys, values, extras), Config())
        stride = launch.operands(about, made, keys, values, extras)[1]
        assert stride * row_source.unit(about.keys.format) == keys.rows.stride(0)
        return made.source

    assert "k_at = i * (k_t * 2)" in source((33, 8)) and "v_at = i * (v_t * 4)" in source((3, 0), (33, 8))
    assert "k_at = i * (k_t)" in source((32, 0))


def test_only_masks_bring_conditions_and_wide_queries_are_loaded_block_by_block():
    def loop(case: Case) -> str:
        given = build(case)
        return generate(given[0], launch.given_of(*given), Config()).source.split("for at in")[1]

    assert "if tl.max" in loop(Case(scores="bool")) and "if tl.max" not in loop(Case(scores="alibi"))
    assert "tl.load(q " not in loop(Case())
    assert "tl.load(q " in loop(Case(heads=64, keys=((512, 0),)))


def test_sums_that_fit_in_no_registers_are_refused():
    given = build(Case(values=((2100, 0),), tokens=1))
    with pytest.raises(NotGenerated, match="2100 latents"):
        generate(given[0], launch.given_of(*given), Config())


@pytest.mark.parametrize(("own", "folder"), [(None, "caches/kernels"), ("", "caches/kernels"), ("mine", "mine")])
def test_sources_are_kept_beside_other_caches_or_where_they_are_told_to(own, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LORC_CACHE", str(tmp_path / "caches"))
    monkeypatch.delenv("LORC_KERNEL_CACHE", raising=False)
    if own is not None:
        monkeypatch.setenv("LORC_KERNEL_CACHE", own and str(tmp_path / own))
    assert launch.cache_folder() == tmp_path / folder


def test_a_source_file_that_was_cut_off_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LORC_KERNEL_CACHE", str(tmp_path))
    assert launch.load("NUMBER = 7\n", "a" * 64).NUMBER == 7
    (file,) = tmp_path.iterdir()
    file.write_text("NUMB")
    assert launch.load("NUMBER = 7\n", "a" * 64).NUMBER == 7
    assert [f.read_text() for f in tmp_path.glob("*.py")] == ["NUMBER = 7\n"]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORC_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
    launch._own_folder.cache_clear()
    with pytest.warns(KernelWarning, match="LORC_KERNEL_CACHE"):
        assert launch.load("NUMBER = 7\n", "a" * 64).NUMBER == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.load("NUMBER = 8\n", "b" * 64).NUMBER == 8


def test_kernels_die_with_their_reader():
    given = build(Case(rotary="half", cached=2))
    launch._made.setdefault(given[0], {})["key"] = None
    assert given[0] in launch._made
    gone = weakref.ref(given[0])
    del given
    gc.collect()
    assert gone() is None and not any(held == {"key": None} for held in launch._made.values())


def test_decoders_of_the_cases_are_those_of_graphs():
    decoder, consts = decoder_of("half", "rms", 2, 64, torch.float32)
    made = decoder.module(torch.randn(3, 5, 128), torch.zeros(3, 5, dtype=torch.int32), *consts)
    assert list(made.shape) == decoder.shape(3, 5)
