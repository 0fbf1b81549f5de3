"""Every test starts from a clean Dynamo and a fixed seed."""

import os
import sys
import types
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("lorc", deadline=None)  # a first example compiles, and others wait for a core
settings.load_profile("lorc")

# ``bench`` alone: with the repository itself on the path, its ``kernels`` would be taken for the package of that name
bench = types.ModuleType("bench")
bench.__path__ = [str(Path(__file__).parents[1] / "bench")]
sys.modules.setdefault("bench", bench)


@pytest.fixture(scope="session", autouse=True)
def no_settings():
    """Nothing that the user set for LoRC holds in the tests, but for where files are kept."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("LORC_")]:
            if name not in ("LORC_CACHE", "LORC_KERNEL_CACHE", "LORC_HANDBOOK"):
                patch.delenv(name)
        yield


@pytest.fixture
def clean():
    """Forget compiled graphs before and after, and reseed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def quiet(clean):
    """``clean``, and nothing is said of quality, graphs or caches."""
    from lorc_fx.errors import LorcWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorcWarning)
        yield


@pytest.fixture
def fresh_hints(monkeypatch):
    """No hint was given before."""
    from lorc_fx import latent_ops

    monkeypatch.setattr(latent_ops, "_hinted", set())


@pytest.fixture
def many_shapes():
    """Pieces of many lengths through one model: more graphs than Dynamo's default limit allows.

    With Dynamo's own patch: pytest's monkeypatch leaves the config without the attribute.
    """
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=4096):
        yield


@pytest.fixture
def database(tmp_path, monkeypatch):
    """The file of the only database of configs that is read; nothing is known of what was read before."""
    from lorc_fx.kernels import tuned, words

    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "shipped_file", lambda device: tmp_path / "shipped.json")
    tuned.forget()
    yield tuned.users_file(words.device_name(torch.device("cpu")))
    tuned.forget()


@pytest.fixture
def tile_by_tile(monkeypatch):
    """Tiles are looked at as the torch ops get them, not in one compiled call."""
    from lorc_fx.kernels import fused

    monkeypatch.setattr(fused, "chain", lambda about: None)
