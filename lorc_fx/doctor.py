"""What ``lorc doctor`` finds: versions, compilers, devices, folders and switches, what will work, and a run that shows
it. Each finding says what to do where something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich import box
from rich.markup import escape
from rich.table import Table

from . import models, switch
from .compat import backends, cpp_compiler
from .device import datasheet
from .errors import LorcError
from .evaluate import Show
from .kernels.launch import cache_folder, target
from .kernels.tuned import current
from .kernels.words import tiled_target
from .latent import LatentKV

OK, NOTE, FAIL = "ok", "note", "fail"
DISTRIBUTION = "lorc-fx"
VARIABLES = (
    switch.VARIABLE, "LORC_CACHE", "LORC_KERNEL_CACHE", "LORC_DUMP", "TORCH_LOGS", "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_INTERPRET", "OMP_NUM_THREADS", "HF_HUB_OFFLINE",
)  # fmt: skip
"""What changes how a model runs, as far as it is set."""
STOPS = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
"""Those of torch under which no backend is asked at all."""
TOLERANCE = 1e-4
"""Of the run: logits at full rank against the uncompiled model's, relative to the largest."""
ROOM = 1 << 30
"""Free bytes below which a folder is said to be short: the demo's model takes half of that."""


@dataclass(frozen=True)
class Finding:
    """One line: ``what`` was looked at, its ``state`` ("ok"; "note": works without; "fail"), what was ``found``, and
    the ``step`` to take ("" where none is needed)."""

    what: str
    state: str
    found: str
    step: str = ""


def examined(show: Show, deep: bool = True) -> list[Finding]:
    """All findings. ``deep``: compile a small decoder with the default inner compiler too: half a minute."""
    found = [*versions(), *extras(), *compilers(), *devices(), *folders(), *environment()]
    for inner in ("eager", "inductor") if deep else ("eager",):
        show.stage(f"Compressing a small decoder, inner={inner!r}")
        found.append(_tried(inner, torch.device("cpu")))
        if torch.cuda.is_available():
            found.append(_tried(inner, torch.device("cuda")))
    return found


# -- what is installed ------------------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Python and what lorc_fx requires, against the ranges of its own metadata; whether torch knows the backend."""
    python = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding("Python", FAIL if old else OK, python, "Python 3.11 or newer is needed." if old else "")
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _required(requirement)
    known = "lorc" in backends()
    step = "" if known else f"Install {DISTRIBUTION} (pip install -e . in a checkout), or pass lorc_fx.backend.lorc."
    yield Finding('backend="lorc"', OK if known else FAIL, "known to torch" if known else "not known to torch", step)


def _requirements() -> list[Requirement]:
    """Of lorc_fx's metadata; none in a checkout that is not installed."""
    try:
        return [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required(requirement: Requirement) -> Finding:
    version, name = _version(requirement.name), requirement.name
    asked = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Finding(name, FAIL, "not installed", asked)
    if not requirement.specifier.contains(version, prereleases=True):
        step = f"Tested with {requirement.specifier}: {asked}"
        return Finding(name, NOTE, f"{version}, outside of {requirement.specifier}", step)
    return Finding(name, OK, version)


def extras() -> Iterator[Finding]:
    """Each extra: what it lacks, if anything."""
    optional = [r for r in _requirements() if r.marker is not None and not r.marker.evaluate({"extra": ""})]
    names = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") if optional else ()
    for extra in sorted(names or ()):
        needed = [r for r in optional if r.marker is not None and r.marker.evaluate({"extra": extra})]
        lacking = [r.name for r in needed if _version(r.name) is None]
        step = f"pip install '{DISTRIBUTION}[{extra}]'" if lacking else ""
        text = f"without {', '.join(lacking)}" if lacking else "complete"
        yield Finding(f"extra {extra}", NOTE if lacking else OK, text, step)


# -- what compiles, and where -----------------------------------------------------------------------------------------


def compilers() -> Iterator[Finding]:
    """C++ for inductor on a CPU and for reading stored rows; Triton for GPUs."""
    try:
        yield Finding("C++ compiler", OK, cpp_compiler())
    except Exception as error:  # inductor's own, of several classes
        step = "Install g++ or clang++; until then options={'inner': 'eager'} compresses without compiling."
        yield Finding("C++ compiler", NOTE, f"none that inductor can use ({type(error).__name__})", step)
    version = _version("triton")
    gpu = torch.cuda.is_available()
    if version:
        yield Finding("Triton", OK, version)
    elif gpu:
        yield Finding("Triton", FAIL, "not installed, and there is a GPU", f"pip install '{DISTRIBUTION}[gpu]'")
    else:
        where = "" if platform.system() == "Linux" else f", and there is none for {platform.system()}"
        yield Finding("Triton", NOTE, f"not installed{where}: nothing on a CPU needs it")


def devices() -> Iterator[Finding]:
    """Processors and GPUs, and whether attention was tuned on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    more = threads > cores
    step = f"More threads than cores make compiled code several times slower: OMP_NUM_THREADS={cores}." if more else ""
    found = f"{platform.system()} {platform.machine()}, {cores} cores, {threads} threads"
    yield Finding("CPU", NOTE if more else OK, found, step)
    yield _tuned(torch.device("cpu"))
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        figures = "figures of its datasheet" if datasheet(about.name) else "figures are measured when needed"
        size = f"{about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        yield Finding(f"GPU {i}", OK, f"{about.name}, {size}; {figures}")
        yield _tuned(torch.device("cuda", i))
    if not torch.cuda.is_available():
        yield Finding("GPU", NOTE, "none that torch can use: attention runs in compiled C++")


def _tuned(device: torch.device) -> Finding:
    here = target(device) if device.type == "cuda" else tiled_target()
    entries = len(current(here).entries)
    step = "" if entries else "Defaults are used; `lorc autotune --model PATH` finds what is fastest here."
    return Finding(f"tuned, {here.device}", OK if entries else NOTE, f"{entries} entries", step)


# -- folders and variables --------------------------------------------------------------------------------------------


def folders() -> Iterator[Finding]:
    """Where models and kernels are kept, and the demo's model."""
    for what, folder in (("models and tuning", models.cache_root()), ("kernels", cache_folder())):
        yield _writable(what, folder)
    converted = (models.cache_root() / models.DEMO_NAME / models.MANIFEST).exists()
    package = importlib.util.find_spec(models.DEMO_MODULE) is not None
    text = "converted" if converted else "installed, not converted yet" if package else "not installed"
    step = "" if converted or package else f"For `lorc demo` without --model: {models.INSTALL_DEMO}"
    yield Finding("demo's model", OK if converted or package else NOTE, text, step)


def _writable(what: str, folder: Path) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        step = "Set LORC_CACHE (and LORC_KERNEL_CACHE) to a folder that can be written."
        return Finding(what, NOTE, f"{folder} cannot be written ({error.strerror})", step)
    free = shutil.disk_usage(there).free
    short = free < ROOM
    step = "Free some, or set LORC_CACHE to a folder with more room." if short else ""
    return Finding(what, NOTE if short else OK, f"{folder}, {free / 2**30:.1f} GiB free", step)


def environment() -> Iterator[Finding]:
    """What is set of ``VARIABLES``."""
    for name in VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            yield Finding(f"${name}", *_variable(name, value))


def _variable(name: str, value: str) -> tuple[str, str, str]:
    if name == switch.VARIABLE:
        try:
            off = switch.disabled()
        except LorcError as error:
            return FAIL, value, str(error)
        return (NOTE, f"{value}: the backend is off", "Unset it to compress.") if off else (OK, value, "")
    if name in STOPS and _stops(name):
        return NOTE, f"{value}: torch.compile does nothing, so caches stay dense", "Unset it to compress."
    if name == "TRITON_INTERPRET" and value == "1":
        return NOTE, f"{value}: kernels run as Python, thousands of times slower", "Unset it outside of tests."
    return OK, value, ""


def _stops(name: str) -> bool:
    """As torch reads it: nothing but 1 counts."""
    return os.environ.get(name) == "1"


# -- a run ------------------------------------------------------------------------------------------------------------


def _tried(inner: str, device: torch.device) -> Finding:
    """A prompt and two steps of a small Llama at full rank: the same logits as uncompiled, latents in the cache."""
    what = f"a small Llama on {device.type}, inner={inner!r}"
    try:
        wrong = _differs(inner, device)
    except Exception as error:  # whatever it is: that is the finding
        text = str(error).strip().splitlines()
        return Finding(what, FAIL, f"{type(error).__name__}: {text[0] if text else ''}"[:400], _report_it(inner))
    return Finding(
        what, FAIL if wrong else OK, wrong or "same logits, latents in its cache", wrong and _report_it(inner)
    )


def _report_it(inner: str) -> str:
    return (
        "options={'inner': 'eager'} may work meanwhile." if inner != "eager" else "Please report it, with this table."
    )


@torch.no_grad()
def _differs(inner: str, device: torch.device) -> str:
    """What is wrong, or ""."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from .evaluate import cache_keyword, compressed

    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    model: Any = LlamaForCausalLM(config).eval().to(device)
    pieces = torch.arange(1, 21, device=device)[None].split([18, 1, 1], 1)

    def run() -> tuple[list[torch.Tensor], Any]:
        cache = DynamicCache(config=config)
        keyword = cache_keyword(model)
        return [model(input_ids=piece, use_cache=True, **{keyword: cache}).logits for piece in pieces], cache

    options = {"ratio": 1.0, "scheduler": "uniform", "precision": "model", "basis": "joint", "calibration": "none"}
    want, _ = run()
    with compressed(model, options | {"inner": inner}):
        got, cache = run()
    off = switch.disabled() or any(map(_stops, STOPS))
    if not off and not all(isinstance(layer.keys, LatentKV) for layer in cache.layers):
        return "its cache is dense"
    error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))
    return "" if error <= TOLERANCE else f"logits are off by {error:.2g} of the largest"


# -- how it is shown --------------------------------------------------------------------------------------------------


def table(found: Iterable[Finding]) -> Table:
    """One row per finding; what to do below what was found."""
    colours = {OK: "green", NOTE: "yellow", FAIL: "red"}
    shown = Table(box=box.SIMPLE)
    for name in ("", "", "found"):
        shown.add_column(name, overflow="fold")
    for f in found:
        text = escape(f.found) + (f"\n[bold]{escape(f.step)}[/bold]" if f.step else "")
        shown.add_row(f"[{colours[f.state]}]{f.state}[/]", escape(f.what), text)
    return shown


def plain(found: Iterable[Finding]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(f) for f in found]
