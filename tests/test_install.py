"""The wheel and the sdist: what they hold, and that the wheel works from outside of the repository."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = """
import sys, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
import lorc_fx
assert lorc_fx.__file__.startswith(sys.argv[1]), lorc_fx.__file__
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, bos_token_id=None, eos_token_id=None)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(1, 9)[None]
asked = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
want = model.generate(ids, **asked)
torch.compile(model, backend="lorc")  # found without an import, by its entry point
model.compile(backend="lorc", options={**lorc_fx.PAPER, "ratio": 1.0, "inner": "eager"})
got = model.generate(ids, **asked)
assert torch.equal(want.sequences, got.sequences)
cache = got["cache"] if "cache" in got else got["past_key_values"]
assert isinstance(cache.layers[0].keys, lorc_fx.LatentKV)
from lorc_fx.kernels import launch, tiled
from importlib import resources
assert resources.files("lorc_fx.kernels").joinpath("attend.cpp").is_file()
assert resources.files("lorc_fx").joinpath("data/text.txt").is_file()
assert resources.files("lorc_fx").joinpath("data/report.html.j2").is_file()
print("works")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel made of the sdist. Of a copy: setuptools writes beside its sources."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("lorc_fx", "passes", "kernels", "tests", "bench", "pyproject.toml", "README.md", "LICENSE", "lorc.py"):
        subprocess.run(["cp", "-r", "--no-dereference", str(ROOT / name), str(copy)], check=True)
    code = "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=copy, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    code = code.replace("build_sdist", "build_wheel")
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(about))
        (points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"lorc_fx", "lorc.py", about.partition("/")[0]}
    assert {"lorc_fx/passes/sites.py", "lorc_fx/kernels/attend.cpp", "lorc_fx/data/text.txt"} <= set(names)
    files = [path for folder in ("passes", "kernels", "lorc_fx") for path in (ROOT / folder).rglob("*.py")]
    inside = [path.relative_to(ROOT).as_posix().removeprefix("lorc_fx/") for path in files]
    assert {f"lorc_fx/{name}" for name in inside} <= set(names), "a package is missing from pyproject's lists"
    assert {name.rpartition("/")[2] for name in names if "/shipped/" in name} == {
        p.name for p in (ROOT / "kernels" / "shipped").glob("*.json")
    }
    for field in ("Name", "Version", "Summary", "License-Expression", "Requires-Python", "Keywords", "Author"):
        assert metadata[field], field
    assert metadata.get_payload(), "no readme"
    assert any("Python :: 3.13" in line for line in metadata.get_all("Classifier"))
    assert "lorc_fx.cli:main" in points and "torch_dynamo_backends" in points


def test_the_wheel_works_outside_of_the_repository(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(site), str(built[1])], check=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PYTHONPATH": str(site)}
    given = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, "-c", SMOKE, str(site)], **given)  # type: ignore[call-overload]
    assert run.returncode == 0 and "works" in run.stdout, run.stderr[-2000:]
    run = subprocess.run([sys.executable, str(site / "bin" / "lorc"), "--help"], **given)  # type: ignore[call-overload]
    assert run.returncode == 0, run.stderr[-2000:]
