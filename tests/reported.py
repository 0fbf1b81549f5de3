"""Pages of a tiny checkpoint, for tests of what ``lorc report`` writes."""

from __future__ import annotations

from pathlib import Path

import tiny
from commands import run

TEXT = "the sea takes the river and the river takes the rain " * 12
SECTIONS = ("spectra", "conditions", "bytes", "loss", "retrieval", "time", "matched")
FULL = ("--measure", "--needle", "--needle-lengths", "120", "--needle-keys", "1", "--time",
        "--time-tokens", "16,32", "--repeats", "1", "--inner", "eager",
        "--sweep", "0.5,0.3", "--ratio", "0.3")  # fmt: skip
"""Everything that can be asked for, on short lengths."""


def checkpoint(folder: Path) -> Path:
    """A tiny Llama with 8 kv heads of 8 in `model`, and `text.txt`: half of it is a first prompt."""
    tiny.letters().save_pretrained(folder / "model")
    tiny.llama(heads=8, kv_heads=8).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def report(folder: Path, out: Path, *arguments: str) -> tuple[int, str]:
    """Run the command on the checkpoint; exit code and what it said."""
    return run("report", str(out), "--model", str(folder / "model"), "--dtype", "fp32", *arguments)


def everything(folder: Path) -> tuple[Path, Path]:
    """A page with all parts, and its figures as JSON."""
    out, figures = folder / "full.html", folder / "full.json"
    code, text = report(folder, out, "--text", str(folder / "text.txt"), *FULL, "--json", str(figures))
    assert code == 0, text
    return out, figures
