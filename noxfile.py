"""The versions that are supported, each in an environment of its own:

    pipx run nox                     every pair of torch and transformers, on each Python that is found here
    pipx run nox -s versions-3.11    one Python
    pipx run nox -- tests            the whole suite instead of the quick part

A Python that is not installed is skipped, and nox says so. torch from PyPI brings CUDA (some 3 GB); an index with CPU
builds is taken from $PIP_EXTRA_INDEX_URL, as pip does.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.11", "3.12", "3.13"]
TORCH = ["2.11.0", "2.13.0"]
TRANSFORMERS = ["5.17.0", "newest"]
QUICK = [f"tests/test_{name}.py" for name in (
    "families", "oracle", "rules", "matcher", "latent", "cache_operations", "cache_file", "compiles", "generation",
    "static_writes", "packing", "codec", "options", "calibration", "install",
)]  # fmt: skip
"""What versions can break: the trace, Dynamo, caches, generate, inductor; a quarter of an hour on two cores."""


@nox.session(python=PYTHONS)
@nox.parametrize("transformers", TRANSFORMERS)
@nox.parametrize("torch", TORCH)
def versions(session: nox.Session, torch: str, transformers: str) -> None:
    """What is installed is the wheel, and the tests are those of the checkout."""
    wanted = "transformers" if transformers == "newest" else f"transformers=={transformers}"
    session.install(f"torch=={torch}")
    session.install(f"torch=={torch}", wanted, ".[test]")
    session.run("python", "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)")
    session.run("pytest", "-n", "2", *(session.posargs or QUICK), env={"OMP_NUM_THREADS": "1"})
