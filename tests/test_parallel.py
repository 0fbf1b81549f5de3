"""Models over processes and devices (``bench.parallel``): tensor parallel by transformers itself, device maps."""

from __future__ import annotations

import pytest
import torch

from bench import parallel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
]
SPLIT = ("llama", "qwen3", "gemma3")
EXACT = ("dynamic", "static", "beams")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    ways = [way.name for way in parallel.WAYS]
    found = parallel.tensor_parallel(folder, "eager", list(parallel.MODELS), ways)
    return {(row["model"], row["way"]): row for row in found}


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("model", SPLIT)
def test_full_rank(rows, model, way):
    """The tokens of one process; each rank codes its own heads, in half the bytes (and positions, which each keeps)."""
    row = rows[model, way]
    assert row["tokens_equal"] and row["ranks_agree"] and row["logits_agree"] and row["error"] < 1e-4, row
    assert row["coded"] == row["cached"], row
    assert all(set(ranks) == {2 * parallel.HEAD} for ranks in row["planned"]), "two of four heads each"
    assert len(set(row["bytes"])) == 1
    positions = row["bytes"][0] - row["bytes_dense"][0]
    assert 0 < positions < 0.1 * row["bytes_dense"][0]
    counters = 64  # a cache's own, which each rank has too
    assert 0 < 2 * row["bytes"][0] - row["bytes_one_process"] <= positions + counters


@pytest.mark.parametrize("model", SPLIT)
def test_half(rows, model):
    """Right by the oracle of projected shards; as many bytes on each rank as half of its dense cache, and no more."""
    row = rows[model, "half"]
    assert row["ranks_agree"] and row["error"] < 1e-4 and row["coded"] == row["cached"], row
    assert len(set(row["bytes"])) == 1 and 2 * row["bytes"][0] <= 1.01 * row["bytes_dense"][0], row


@pytest.mark.parametrize("model", SPLIT)
def test_first_prompt(rows, model):
    """Statistics are of a rank's own heads: codecs differ, what they cost does not, and all go on together."""
    row = rows[model, "first prompt"]
    assert row["ranks_agree"] and row["logits_agree"] and row["error"] < 0.2 and row["coded"] == row["cached"], row
    assert all(bytes_ <= 0.45 * dense for bytes_, dense in zip(row["bytes"], row["bytes_dense"], strict=True)), row
    assert max(row["bytes"]) - min(row["bytes"]) <= 0.01 * row["bytes"][0], row
    assert any(bits < 16 for rank in row["segments"] for site in rank for _, bits in site), "packed"


def test_one_head_cannot_be_split(rows):
    """transformers itself does not run it, coded or not."""
    row = rows["llama, one kv head", "dynamic"]
    assert row["dense_fails"] == [True, True] and all("shape" in text for text in row["fails"]), row


def test_gathered_heads_stay_dense(rows):
    row = rows["llama, one kv head, gathered", "dynamic"]
    assert row["tokens_equal"] and row["ranks_agree"] and row["error"] < 1e-4, row
    assert row["coded"] == [0, 0] and any("No site found" in text for text in row["said"]), row


def test_device_maps(tmp_path):
    """Right wherever accelerate puts modules. Its hooks end a graph at each module that has one, so there is a site
    only where the hooks are on whole layers."""
    for row in parallel.device_maps(tmp_path, "eager"):
        assert row["tokens_equal"], row
        assert row["coded"] == (0 if row["map"] in ("disk", "forced") else row["cached"]), row
        assert row["coded"] or any("No site found" in text for text in row["said"]), row
