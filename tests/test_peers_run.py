"""The straightforward LoRC that lorc is compared with, and what becomes of the measurements of ``bench.peers_run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import families
import pytest
import tiny
import torch
from transformers import DynamicCache

from bench import peer_steps, peers_plot, peers_run, table
from bench.peers_material import Material
from bench.straightforward import ranks, straightforward
from lorc_fx.evaluate import cache_bytes, cache_keyword
from lorc_fx.latent import cache_nbytes
from lorc_fx.schedulers import progressive_ranks

PIECES = (9, 4, 1, 1)


@torch.no_grad()
def logits(model: Any) -> tuple[torch.Tensor, Any]:
    """Of pieces of a text read into one cache, and that cache; windows of 6 fill and slide."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, 27, (1, sum(PIECES)), generator=torch.Generator().manual_seed(1))
    parts = [
        model(input_ids=piece, use_cache=True, **{cache_keyword(model): cache}).logits
        for piece in ids.split(PIECES, dim=1)
    ]
    return torch.cat(parts, dim=1), cache


def built(name: str) -> Any:
    return tiny.llama() if name == "tiny" else families.FAMILIES[name].build()


@pytest.mark.parametrize("name", ["tiny", "gemma3"])
def test_straightforward_lorc_is_exact_at_full_rank(name: str) -> None:
    model = built(name)
    dense, _ = logits(model)
    with straightforward(model, 1.0) as chosen:
        assert set(chosen) == {model.model.layers[0].self_attn.k_proj.out_features}
        found, cache = logits(model)
    assert all(layer.keys.shape[1] == 1 for layer in cache.layers)  # latents, no heads
    torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "gemma3"])
def test_straightforward_lorc_is_the_model_with_truncated_weights(name: str) -> None:
    model, truncated = built(name), built(name)
    dense, _ = logits(model)
    with straightforward(model, 0.5) as chosen:
        found, _ = logits(model)
    for layer, rank in zip(truncated.model.layers, chosen, strict=True):
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            left, values, right = torch.linalg.svd(projection.weight.detach(), full_matrices=False)
            projection.weight.data = left[:, :rank] * values[:rank] @ right[:rank]
    expected, _ = logits(truncated)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, dense, atol=1e-2)
    assert torch.equal(logits(model)[0], dense)  # and nothing of it is left in the model


def test_straightforward_lorc_holds_the_bytes_of_its_ranks() -> None:
    model = tiny.llama(heads=8, kv_heads=4)
    _, dense = logits(model)
    attentions = [layer.self_attn for layer in model.model.layers]
    with straightforward(model, 0.6) as chosen:
        _, cache = logits(model)
    assert cache_bytes(cache) == sum(2 * rank * 4 * sum(PIECES) for rank in chosen)
    assert cache_nbytes(cache, used=True) <= 0.6 * cache_nbytes(dense, used=True)
    conds = [[float(torch.linalg.cond(a.get_submodule(p).weight)) for a in attentions] for p in ("k_proj", "v_proj")]
    published = [progressive_ranks(*conds, d_min=low, d_max=32) for low in range(1, 33)]
    assert chosen == max(r for r in published if sum(r) <= 0.6 * 64)  # the paper's schedule: shallow layers are wide
    assert sum(ranks(attentions, 0.2)) <= 0.2 * 64 < sum(published[0])  # too few bytes for that: the most falls
    with pytest.raises(ValueError, match="0.01"):
        ranks(attentions, 0.01)


CASES = {
    "dynamic": {},
    "static": {},
    "straightforward": {"ratio": 0.5},
    "lorc": {"ratio": 0.5, "inner": "eager", "calibration": "none"},
    "quantized": {"backend": "fp8"},
}


@pytest.mark.parametrize("kind", CASES)
def test_a_case_is_measured(kind: str, tmp_path: Path, quiet: None) -> None:
    tiny.llama(heads=8, kv_heads=4).save_pretrained(tmp_path)
    case = peer_steps.Case(kind, CASES[kind], kind == "lorc", str(tmp_path), [3] * 40, 32, 2, 3, 1)
    found = peer_steps.measure(case)
    tokens = 32 + peer_steps.WARMUP + 3
    dense = 2 * 2 * 32 * 2 * tokens
    share = {"dynamic": 1.0, "static": 1.0, "quantized": 0.5}.get(kind)
    if share is None:
        assert 0.3 * dense < found["bytes"] <= 0.5 * dense
    else:
        assert found["bytes"] == pytest.approx(share * dense, abs=64)
    assert found["held_bytes"] >= found["bytes"]
    assert len(found["prefill_s"]) == 2 and len(found["decode_s"]) == 3
    # how much: of a process this small, the system may take more back meanwhile than a step needs
    assert {"prefill_peak_bytes", "decode_peak_bytes"} <= set(found)
    assert found["compiled_while_measured"] == 0
    assert found["versions"]["torch"] == torch.__version__


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'paged'"):
        peer_steps.measure(peer_steps.Case("paged", {}, False, str(tmp_path), [3] * 9, 4, 1, 1, 1))


def row(peer: str, prefill: float, decode: float, when: str = "", environment: str = "own", **more: Any) -> Any:
    """A made-up measurement."""
    sizes = {"held_bytes": 2 << 20, "decode_peak_bytes": 3 << 20}
    times = {"prefill_median_s": prefill, "decode_median_s": decode}
    about = {"model": "gemma", "context": 512, "session": "one", "timed": True}
    return {"peer": peer, "when": when, "environment": environment} | about | sizes | times | more


ROWS = [
    row("DynamicCache", 1.0, 0.10, "start"),
    row("lorc, 0.5", 2.2, 0.055),
    row("DynamicCache, kvpress's transformers", 4.0, 0.4, environment="kvpress"),
    row("kvpress, SnapKVPress 0.5", 5.0, 0.2, environment="kvpress"),
    row("DynamicCache", 1.2, 0.12, "end"),
    row("hqq, int4", 9.0, 9.0, environment="quantizers", session="two", timed=False),
]
LOSSES = [
    {"peer": "dense", "setting": "", "protocol": "chunks", "nats": 3.0, "added": 0.0, "fraction": 1.0},
    {"peer": "hqq", "setting": "int4", "protocol": "chunks", "nats": 3.1, "added": 0.06, "fraction": 0.31},
    {"peer": "lorc", "setting": "calibrated, 0.31", "protocol": "chunks", "nats": 4, "added": 0.3, "fraction": 0.31},
    {
        "peer": "lorc",
        "setting": "calibrated, auto, 0.5",
        "protocol": "chunks",
        "nats": 3.0,
        "added": 0.0,
        "fraction": 0.5,
    },
    {
        "peer": "lorc",
        "setting": "calibrated, auto, 0.31",
        "protocol": "chunks",
        "nats": 3,
        "added": 0.001,
        "fraction": 0.31,
    },
    {"peer": "lorc", "setting": "calibrated, 0.1", "protocol": "prompt", "nats": 3.0, "added": 0.1, "fraction": 0.1},
]


def test_times_are_shares_of_the_base_of_their_environment() -> None:
    rows, drift = peers_run.related(ROWS)
    found = {r["peer"]: (r["prefill_ratio"], r["decode_ratio"]) for r in rows if r["when"] != "end"}
    assert found["lorc, 0.5"] == pytest.approx((2.0, 0.5))
    assert found["kvpress, SnapKVPress 0.5"] == pytest.approx((1.25, 0.5))
    assert found["hqq, int4"] == (None, None)
    assert [d["session"] for d in drift] == ["one"]
    assert (drift[0]["prefill"], drift[0]["decode"]) == pytest.approx((0.2, 0.2))


def test_what_is_there_is_not_measured_again() -> None:
    chosen = peers_run.peers_of([])
    names = [peer.name for peer in chosen]
    assert {"hqq, int4", "lorc, 0.5", "lorc, 0.298", "LoRC, straightforward, 0.5"} < set(names)
    assert len([name for name in names if name.startswith("kvpress")]) == 3
    left = [peer.name for peer in peers_run.wanting(chosen, ROWS, "gemma", 512, timed=True)]
    assert set(names) - set(left) == {"lorc, 0.5", "kvpress, SnapKVPress 0.5"}  # hqq's has no times
    assert "hqq, int4" not in [p.name for p in peers_run.wanting(chosen, ROWS, "gemma", 512, timed=False)]
    assert len(peers_run.wanting(chosen, ROWS, "gemma", 2048, timed=True)) == len(chosen)


@pytest.mark.parametrize(("weights", "own"), [("pretrained", False), ("trained, 600 steps, 4.483 nats", True)])
def test_losses_are_added_to_the_file_that_has_the_others(weights: str, own: bool, tmp_path: Path) -> None:
    """Of the pretrained model they are measured as its file was: told of another model or prompt, ``bench.peers`` would
    replace all that is in it."""
    known = tmp_path / "peers.json"
    known.write_text('{"groups": {"dense": {}}, "rows": []}')
    made = Material(tmp_path, weights, known, [], tmp_path)
    pythons = dict.fromkeys((peers_run.QUANT, peers_run.KVPRESS), tmp_path / "venv" / "bin" / "python")
    with mock.patch.object(peers_run.subprocess, "run") as run:
        assert peers_run.losses_of(made, pythons, None, True) == []
    command = [str(part) for part in run.call_args.args[0]]
    assert "dense" not in command and "lorc" in command
    assert ("--model" in command) == ("--prompt" in command) == own


def test_lorc_gets_the_bytes_of_the_others() -> None:
    """And the loss is that of the codec whose steps are timed, not of another basis at the same bytes."""
    assert peers_run.lorc_ratios(LOSSES) == (0.5, 0.31)
    by_name = {peer.name: peers_run.loss_row(peer, LOSSES) for peer in peers_run.peers_of(LOSSES)}
    assert by_name["lorc, 0.31"]["added"] == 0.001
    assert by_name["StaticCache, inductor"]["added"] is None


def test_the_table_and_the_figure_show_what_was_measured(tmp_path: Path) -> None:
    rows, drift = peers_run.related(ROWS)
    chosen = (peers_run.BASE, *peers_run.peers_of(LOSSES))
    result = {
        "rows": rows,
        "drift": drift,
        "losses": [{"model": "gemma"} | peers_run.loss_row(peer, LOSSES) for peer in chosen],
        "models": {"gemma": {"weights": "pretrained"}},
    }
    lines = table.peers_run(result).splitlines()
    split = [line.split(" | ") for line in lines if line.startswith("| gemma:")]
    cells = {first.removeprefix("| gemma: "): others for first, *others in split}
    assert cells["DynamicCache"][:5] == ["1.000", "+0.00 %", "2.0", "1000 ms", "100 ms"]
    assert cells["lorc, 0.5"][1:5] == ["+0.00 %", "2.0", "2.00", "0.50"]
    assert cells["hqq, int4"][:5] == ["0.310", "+6.00 %", "2.0", "–", "–"]  # not timed
    assert cells["kvpress, KeyDiffPress 0.5"] == ["–", "–", "–", "–", "–", "– |"]
    assert "20 %" in lines[-1] and "pretrained" in lines[-1]
    peers_plot.draw(result, "gemma", tmp_path / "peers.svg")
    assert "kvpress, SnapKVPress 0.5" in (tmp_path / "peers.svg").read_text()


def test_the_figure_has_a_look_of_its_own_for_every_peer() -> None:
    looks = peers_plot.looks([peer.name for peer in (peers_run.BASE, *peers_run.peers_of([]))])
    assert len({tuple(look.values()) for look in looks.values()}) == len(looks)
