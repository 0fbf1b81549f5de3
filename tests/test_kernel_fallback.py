"""What generated kernels cannot do, or the device cannot: torch does it, as right, and one warning says where and why.

The real launcher runs; what fails is put in its place. As a script (Triton decides at its import whether it interprets
kernels) it prints what ``interpreted`` found, as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from families import FAMILIES
from torch.utils.cpp_extension import include_paths

from bench.attention_cases import Case, build
from bench.kernel_runs import difference
from helpers import compiled, generate, new_cache, prompt
from lorc_fx.compat import cpp_compiler
from lorc_fx.errors import KernelWarning
from lorc_fx.kernels import fallback, launch, native, reference, tiled
from lorc_fx.kernels.config import Config
from lorc_fx.kernels.expressions import NotGenerated
from lorc_fx.packing import Segment
from lorc_fx.passes import attention
from lorc_fx.records import Plan, PlannedSite

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (the extra `gpu`)"
)
KINDS = ("key", "value")
DIMS, RANKS = (1, 3, 48, 100, 257, 512), (1, 7, 33, 65)
SIZES = {
    f"heads of {dim}, rank {rank}, {bits} bits": Case(
        tokens=20, batch=1, heads=2, dim=dim, keys=((rank, bits),), values=((rank, 0),), mean=True, rotary=rotary
    )
    for dim in DIMS
    for rank in RANKS
    for bits, rotary in ((0, None), (4, "half" if dim % 2 == 0 else None))
    if rank <= dim
}
"""Heads and rows that no tile divides."""
CASE = Case(rotary="half", cached=2, heads=4, keys=((32, 8), (16, 4)), tokens=70)


class OutOfResources(Exception):
    """As Triton's, of which only the name and the module are known where it is not installed."""


class CompilationError(Exception):
    pass


OutOfResources.__module__ = "triton.runtime.errors"
CompilationError.__module__ = "triton.compiler.errors"
LARGE = OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448.")
BROKEN = CompilationError("at 40:12:\n    s = tl.dot(q, k)\n        ^\nthe first product is of the wrong shape")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """No reader was met before, and kernels are kept elsewhere."""
    monkeypatch.setenv("LORC_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "_made", {})
    monkeypatch.setattr(launch, "_smaller", {})
    monkeypatch.setattr(fallback, "_said", set())


def attended(given, times=2):
    """The results of some calls, and what they said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = [launch.attend(*given) for _ in range(times)]
    assert all(issubclass(w.category, KernelWarning) for w in said)
    return got, [str(w.message) for w in said]


def right(got, given):
    want = reference.attend(*given)
    for one in got:
        assert float((one.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


class Device:
    """In place of a launch: fails by the config, else does what the kernel would. Notes the configs."""

    def __init__(self, fails):
        self.fails, self.tried = fails, []

    def __call__(self, about, given, config, made, *tensors):
        self.tried.append(config)
        error = self.fails(config)
        if error is not None:
            raise error
        return tiled.attend(about, *tensors)

    def installed(self):
        """A launcher that finds Triton, and this device."""
        module = SimpleNamespace(__file__="kernels/attend_of_a_test.py")
        return mock.patch.multiple(launch, source_key=lambda *a: "0" * 64, load=lambda *a: module, _run=self)


# -- one cause after another ------------------------------------------------------------------------------------------


def no_triton():
    return mock.patch.dict(sys.modules, {"triton": None})


def not_generated():
    return mock.patch.object(launch, "generate", side_effect=NotGenerated("heads", "more than a kernel takes"))


CAUSES = {
    "no Triton": (no_triton, ["Triton cannot be imported", "install it"]),
    "not generated": (not_generated, ["heads: more than a kernel takes", "Kernels are made of"]),
    "does not compile": (
        Device(lambda config: BROKEN).installed,
        ["CompilationError: at 40:12: .. the first product is of the wrong shape", "another release", "/attend_of"],
    ),
    "a pass of the compiler fails": (
        Device(lambda config: RuntimeError("PassManager::run failed")).installed,
        ["PassManager::run failed", "another release"],
    ),
    "no room at all": (
        Device(lambda config: LARGE).installed,
        ["even with 16 tokens in a block and 1 stage", "Hardware limit: 232448", "a smaller `ratio`"],
    ),
    "no registers": (
        Device(lambda config: RuntimeError("Triton Error [CUDA]: too many resources requested for launch")).installed,
        ["even with 16 tokens", "a smaller `ratio`"],
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_torch_does_it_and_one_warning_says_where_and_why_and_what_to_do(name):
    failing, words = CAUSES[name]
    given = build(CASE)
    for layer in range(3):
        fallback.used_at(given[0], f"layer {layer} key and layer {layer} value")
    with failing():
        got, said = attended(given)
    right(got, given)
    assert len(said) == 1
    where = "at layer 0 key and layer 0 value (and 2 more like it)"
    for part in [where, "rows ((32, 8), (16, 4))", "as right", *words]:
        assert part in said[0]
    assert "\n" not in said[0] and len(said[0]) < 1200


def test_another_number_of_queries_is_the_same_reader():
    few, many = build(CASE), build(replace(CASE, queries=4))
    assert few[0].digest == many[0].digest
    with no_triton():
        assert len(attended(few)[1]) == 1 and attended(many)[1] == []
        assert len(attended(build(replace(CASE, keys=((40, 8),))))[1]) == 1, "another one has a warning of its own"


def test_what_is_no_matter_of_compiling_is_raised():
    given = build(CASE)
    failing = Device(lambda config: RuntimeError("CUDA error: an illegal memory access was encountered"))
    with failing.installed(), pytest.raises(RuntimeError, match="illegal memory access"):
        launch.attend(*given)


def test_a_models_layers_are_named(clean, monkeypatch):
    """Two kinds of layers, three of one and one of another: two readers, each said once with the sites it has."""
    monkeypatch.setattr(tiled, "op", launch.attend)  # as on a GPU
    monkeypatch.setattr(attention, "PLAIN", True)
    model = FAMILIES["gpt2"].build(layers=4)
    sites = [PlannedSite(i, k, 32, (Segment(8 if i else 9, 0),), 1, 0, 0, None, 1.0) for i in range(4) for k in KINDS]
    compiled(model, plan=Plan(tuple(sites)))
    ids, mask = prompt(2, 7, 0)
    with not_generated(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generate(model, ids, mask, new_cache(model, "dynamic", 10), new=3)
    found = sorted(str(w.message).split(" (", 1)[0] for w in said if w.category is KernelWarning)
    start = "no kernel for attention at layer"
    assert found == [f"{start} 0 key and layer 0 value", f"{start} 1 key and layer 1 value"]
    assert sum("(and 2 more like it)" in str(w.message) for w in said) == 1


# -- smaller kernels first --------------------------------------------------------------------------------------------


def test_smaller_configs_need_less_step_by_step():
    config, seen = Config(tokens=64, stages=3), []
    while config is not None:
        seen.append((config.stages, config.tokens))
        config = fallback.smaller(config)
    assert seen == [(3, 64), (1, 64), (1, 32), (1, 16)]


@pytest.mark.parametrize("fits", [(1, 32), (1, 16)])
def test_what_fits_is_found_without_a_word_and_remembered(fits):
    given = build(CASE)
    device = Device(lambda config: LARGE if (config.stages, config.tokens) > fits else None)
    with device.installed():
        got, said = attended(given)
        tried = len(device.tried)
        more, _ = attended(given, times=3)
    right(got + more, given)
    assert said == []
    assert [(c.stages, c.tokens) for c in device.tried[tried:]] == [fits] * 3, "later calls begin with what fits"
    assert len({*device.tried}) == tried - 1, "no config is tried twice before it"


def test_a_tuner_gets_the_config_that_it_asks_for_or_an_error():
    """... also where the launcher has gone on to a smaller one; and splits are those of the config at hand."""
    given = build(CASE)
    device = Device(lambda config: LARGE if config.stages > 1 else None)
    large = Config(tokens=32, stages=2)
    with device.installed():
        for splits in (3, 5):
            launch.attend(*given, config=replace(large, splits=splits))
            assert device.tried[-1] == replace(large, stages=1, splits=splits)
        with pytest.raises(OutOfResources):
            launch.exactly(given[0], launch.given_of(*given), large, *given[1:])
    assert device.tried[-1] == large


def test_a_smaller_kernel_that_does_not_compile_is_given_up():
    device = Device(lambda config: BROKEN if config.stages == 1 else LARGE)
    given = build(CASE)
    with device.installed():
        got, said = attended(given)
    right(got, given)
    assert len(said) == 1 and "does not compile" in said[0] and len(device.tried) == 2


# -- sizes that no tile divides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_odd_sizes_in_tiles(name):
    given = build(SIZES[name])
    with no_triton():
        got, said = attended(given)
    right(got, given)
    assert len(said) == 1


def interpreted():
    """Errors of the kernels for these sizes, and of a kernel that is found on the way down."""
    found = {name: difference(case, torch.device("cpu")) for name, case in SIZES.items()}
    run, tried = launch._run, []

    def small(about, given, config, *more):
        tried.append(config.tokens)
        if config.tokens > 16 or config.stages > 1:
            raise LARGE
        return run(about, given, config, *more)

    with mock.patch.object(launch, "_run", small):
        found["on the way down"] = difference(CASE, torch.device("cpu"))
    assert tried[-1] == 16 and len(tried) > 2
    return found


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), *filter(None, sys.path)])
    own = {"PYTHONPATH": paths, "LORC_KERNEL_CACHE": str(folder), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], cwd=root, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("name", [*SIZES, "on the way down"])
def test_odd_sizes_by_kernels(name, errors):
    """A kernel, or tiles and one warning; either way right."""
    found = errors[name]
    assert found["error"] is not None and found["error"] < 1e-5
    assert len(found["said"]) <= 1


# -- rows.cpp ---------------------------------------------------------------------------------------------------------

INSTRUCTIONS = {
    "AVX-512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX2 without F16C": ("-mavx2", "-mfma"),
    "none": (),
}
#: what GCC 12 says of its own: how vectors are passed where there are no registers for them; its AVX-512 header
QUIET = ("-Wno-psabi", "-Wno-maybe-uninitialized")


#: inductor's own, and what else is there of those that the warning below recommends
COMPILERS = sorted({cpp_compiler(), *filter(shutil.which, ("g++", "clang++"))})


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", sorted(INSTRUCTIONS))
def test_it_compiles_for_cpus_that_are_not_there(name, compiler, tmp_path):
    """Without a warning: each has branches of its own, of which a machine runs one."""
    flags = INSTRUCTIONS[name]
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{platform.machine()} has no {name}")
    (tmp_path / "all.cpp").write_text(native.source())
    torchs = [f"-isystem{path}" for path in include_paths("cpu")]
    quiet = QUIET if "clang" not in compiler else QUIET[:1]
    command = [compiler, "-std=c++20", "-O1", "-fopenmp", "-Wall", "-Werror", *torchs, *quiet, *flags]
    subprocess.run([*command, "-c", "all.cpp", "-o", "all.o"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_its_flags_are_known_to_the_compiler(compiler, tmp_path):
    """In a process of its own: inductor asks once which compiler it has."""
    asked = (
        "from lorc_fx.compat import compile_cpp; print(compile_cpp('extern \"C\" int seven() { return 7; }').seven())"
    )
    environment = os.environ | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True)
    assert made.stdout.split() == ["7"], made.stderr


def test_no_compiler_on_a_cpu():
    """It is said once in a process, and torch ops do it, whoever reads rows."""
    native.library.cache_clear()
    cases = [build(Case(keys=((32, 8),), values=((24, 4),))), build(Case(keys=((16, 0),), tokens=5))]
    try:
        with (
            mock.patch.object(native, "compile_cpp", side_effect=RuntimeError("g++: not found\nand much more")),
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            got = [(given, tiled.attend(*given)) for given in cases * 2]
    finally:
        native.library.cache_clear()
    for given, one in got:
        right([one], given)
    assert [w.category for w in said] == [KernelWarning]
    text = str(said[0].message)
    assert "g++: not found" in text and "and much more" not in text and "install g++" in text


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(interpreted()))
