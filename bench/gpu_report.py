"""What ``bench.gpu`` found, on its way into one JSON: a time budget, what was left out and why, jobs in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorc_fx.console import write_json

T = TypeVar("T")


class Report:
    """``data`` is written to ``path`` whenever something was added. ``seconds``: how long all may take."""

    def __init__(self, path: Path, seconds: float, head: dict[str, Any]) -> None:
        self.path, self.seconds, self.begin = path, seconds, time.monotonic()
        self.data: dict[str, Any] = {**head, "budget_s": seconds, "took_s": {}, "skipped": [], "failed": []}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.begin)

    def skip(self, what: str, why: str) -> None:
        self.data["skipped"].append({"what": what, "why": why})
        self.say(f"left out: {what} ({why})")

    def attempt(self, what: str, needs: float, run: Callable[[], T]) -> T | None:
        """What ``run`` gives, or None where ``needs`` seconds are not left or where it raises: both are noted."""
        if self.left < needs:
            self.skip(what, f"{self.left:.0f} s are left, it takes about {needs:.0f}")
            return None
        start = time.monotonic()
        try:
            return run()
        except Exception as error:  # whatever a GPU, a driver or a compiler says: the rest is still worth having
            self.data["failed"].append({"what": what, "error": f"{type(error).__name__}: {error}"[:1000]})
            self.say(f"failed: {what} ({type(error).__name__})")
            return None
        finally:
            self.data["took_s"][what] = round(time.monotonic() - start, 1)
            self.write()

    def write(self) -> None:
        self.data["took_s"]["all"] = round(time.monotonic() - self.begin, 1)
        write_json(self.path, self.data)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:5.0f} s  {text}", file=sys.stderr, flush=True)


class Jobs:
    """Jobs of ``bench.kernel_runs``, dealt out to ``processes`` that run beside this one."""

    def __init__(self, what: str, device: torch.device, names: Sequence[str], processes: int) -> None:
        self.names, self.folder = list(names), tempfile.TemporaryDirectory()
        self.running: list[tuple[subprocess.Popen[bytes], Path, list[str]]] = []
        paths = os.pathsep.join(filter(None, sys.path))
        for i in range(min(processes, len(self.names))):
            out = Path(self.folder.name) / f"{i}"
            mine = self.names[i::processes]
            command = [sys.executable, "-m", "bench.kernel_runs", what, str(device), *mine]
            with out.open("wb") as file, out.with_suffix(".err").open("wb") as errors:
                root = Path(__file__).parents[1]
                own = {**os.environ, "PYTHONPATH": paths}
                made = subprocess.Popen(command, cwd=root, stdout=file, stderr=errors, env=own)
            self.running.append((made, out, mine))

    def results(self, seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
        """What was found within ``seconds`` from now, by name, and of the other names why nothing is known. No process
        is left."""
        until = time.monotonic() + seconds
        found: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for process, out, mine in self.running:
            why = "there was no time"
            try:
                code = process.wait(max(until - time.monotonic(), 0.01))
                last = out.with_suffix(".err").read_text(errors="replace").strip().splitlines()[-1:]
                why = f"its process ended with {code}: {' '.join(last)}"[:400]
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for line in out.read_text().splitlines():
                try:
                    found |= json.loads(line)
                except ValueError:  # cut off
                    continue
            missing |= {name: why for name in mine if name not in found}
        self.folder.cleanup()
        return found, missing
