"""What ``bench.run`` and ``bench.overhead`` measure: (kind, tokens), for each model and each variant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to run a model: with LoRC's codec at ``ratio`` (``PAPER``), or dense under inductor where it is None;
    ``static`` has a preallocated cache."""

    name: str
    ratio: float | None = None
    static: bool = False


@dataclass(frozen=True)
class Case:
    """``decode``: one step on a cache of ``tokens``; ``prefill``: one piece of ``tokens`` into a fresh cache."""

    kind: str
    tokens: int


BASE = Variant("inductor")
VARIANTS = (BASE, Variant("inductor-static", static=True), Variant("lorc-1.0", 1.0), Variant("lorc-0.45", 0.45))

#: in this order: the second prefill length makes the prefill's length dynamic, as a second prompt would
CASES = (
    Case("prefill", 512),
    Case("prefill", 2048),
    Case("decode", 512),
    Case("decode", 2048),
    Case("decode", 8192),
)
QUICK = (Case("prefill", 512), Case("decode", 512), Case("decode", 2048), Case("decode", 8192))

#: timed repeats of each kind, all variants once per repeat
REPEATS = {"decode": 25, "prefill": 5, "compile": 3}
QUICK_REPEATS = {"decode": 9, "prefill": 3, "compile": 1}

#: tokens per call when a cache is filled for a decode case
CHUNK = 512
#: what is compiled in the compile case: two prompts of the first length, one of the second, STEPS tokens after each
PROMPTS = (128, 128, 192)
STEPS = 6
COMPILED = (BASE, Variant("lorc-0.45", 0.45))
