"""The code of the documentation runs, block after block in one namespace, and does what the text says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import lorc_fx
from helpers import assert_close
from lorc_fx import bases
from lorc_fx.latent import LatentKV
from lorc_fx.passes.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def run(path: Path, stop: int | None = None) -> dict[str, Any]:
    """Execute the first ``stop`` blocks of a page; lines of errors are those of the page."""
    text, module = path.read_text(), types.ModuleType(path.stem)
    sys.modules[path.stem] = module  # Dynamo looks its functions' module up
    for block in list(BLOCK.finditer(text))[:stop]:
        lines = "\n" * text[: block.start(1)].count("\n")
        exec(compile(lines + block.group(1), str(path), "exec"), vars(module))
    return vars(module)


@pytest.mark.filterwarnings("ignore::lorc_fx.errors.QualityWarning")
def test_new_architecture(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_REGISTRY", {})
    try:
        space = run(DOCS / "new_architecture.md")
    finally:
        RULES.pop(torch.ops.my_lib.fused_qkv.default, None)
    with torch.no_grad():
        assert_close("in columns of its own", space["turned"], space["model"](space["x"])[0], 1e-5)
    report = space["report"]
    assert not report.sites and len(report.misses) == 2
    miss = str(report.misses[0])
    for part in ("my_lib.fused_qkv.default", "new_architecture.md:", "= fused_qkv(x, self.qkv", "register_rule"):
        assert part in miss, miss
    keys, values = space["keys"], space["values"]
    assert isinstance(keys, LatentKV) and isinstance(values, LatentKV)
    assert lorc_fx.cache_nbytes((keys, values), used=True) <= 0.5 * 2 * 8 * 32 * 4


def test_a_rule_of_ones_own_is_exact(clean: None) -> None:
    space = run(DOCS / "new_architecture.md", 2)
    model, x = space["model"], torch.randn(2, 7, 32)
    step = torch.randn(2, 1, 32)
    try:
        call = torch.compile(model, backend="lorc", options={**lorc_fx.PAPER, "ratio": 1.0, "inner": "eager"})
        with torch.no_grad():
            (want, cache), (got, coded) = model(x), call(x)
            (then, _), (now, _) = model(step, cache), call(step, coded)
    finally:
        RULES.pop(torch.ops.my_lib.fused_qkv.default, None)
    assert_close("prompt", got, want, 1e-5)
    assert_close("step", now, then, 1e-5)


def test_theory(clean: None) -> None:
    """The certificate that the page shows is sound, and what the tables are made of can be made of it."""
    from bench import bounds, table

    certificate = run(DOCS / "theory.md")["certificate"]
    assert len(certificate.sites) == 4
    made = bounds.row(certificate)
    assert made["sound"] is True
    assert made["attention, errors known"]["median"] < made["attention"]["median"]
    text = table.certificates({"rows": [{"model": "m", "way": "w", **made}]})
    assert "m, w" in text
    assert f"of {made['logits']['positions']} |" in text
