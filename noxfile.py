"""The versions that are supported, each in an environment of its own:

    pipx run nox                     every pair of torch and transformers, on each Python that is found here
    pipx run nox -s versions-3.11    one Python
    pipx run nox -- tests            the whole suite instead of the quick part

What each says goes into bench/results/versions.json (`python -m bench.table --write docs/troubleshooting.md` shows it).
A Python that is not installed is skipped, and nox says so. torch from PyPI brings CUDA (some 3 GB); an index with CPU
builds is taken from $PIP_EXTRA_INDEX_URL, as pip does.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.11", "3.12", "3.13"]
TORCH = ["2.11.0", "2.13.0"]
TRANSFORMERS = ["5.17.0", "newest"]
QUICK = [
    "families", "oracle", "rules", "matcher", "latent", "cache_operations", "cache_file", "compiles", "generation",
    "static_writes", "packing", "codec", "options", "calibration", "install", "native_ops", "pack_op",
]  # fmt: skip
"""What versions can break: the trace, Dynamo, caches, generate, inductor, torch's headers; a quarter of an hour on two
cores."""


@nox.session(python=PYTHONS)
@nox.parametrize("transformers", TRANSFORMERS)
@nox.parametrize("torch", TORCH)
def versions(session: nox.Session, torch: str, transformers: str) -> None:
    """What is installed is the wheel, and the tests are those of the checkout."""
    wanted = "transformers" if transformers == "newest" else f"transformers=={transformers}"
    session.install(f"torch=={torch}")
    session.install(f"torch=={torch}", wanted, ".[test]")
    report = Path(session.create_tmp()) / "report.xml"
    tests = session.posargs or [f"tests/test_{name}.py" for name in QUICK]
    session.run("pytest", "-n", "2", f"--junitxml={report}", *tests, env={"OMP_NUM_THREADS": "1"}, success_codes=[0, 1])
    suite = "quick" if not session.posargs else " ".join(session.posargs)
    session.run("python", "bench/versions.py", str(report), suite)  # it fails where a test did
