"""`lorc eval`: what the figures are, what is refused, and that nothing of a compressed run stays in the model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from families import FAMILIES
from oracle import oracle, ranks_of

from helpers import latents, new_cache
from lorc_fx import cli, evaluate, models, perplexity
from lorc_fx.errors import BadModel, BadOption
from lorc_fx.evaluate import compressed, token_scores
from lorc_fx.texts import read_text, tokenized

pytestmark = pytest.mark.usefixtures("clean")
WORDS = evaluate.sample_text().lower()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of letters in `model`, one without in `bare`, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.letters().save_pretrained(folder / "model")
    for name in ("model", "bare"):
        tiny.llama(heads=8, kv_heads=8).save_pretrained(folder / name)
    (folder / "text.txt").write_text(WORDS)
    return folder


def run(folder: Path, *arguments: str, model: str = "model", text: str = "text.txt") -> tuple[int, str]:
    small = ["--text", str(folder / text), "--model", str(folder / model), "--dtype", "fp32"]
    return commands.run("eval", *small, *arguments)


# ------------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_token_scores_are_those_of_one_forward(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_AT_A_TIME", 10)  # so that slices begin and end inside of chunks
    model = FAMILIES["llama-gqa"].build()
    ids = torch.randint(1, 60, (65,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    found = token_scores(model, ids, chunk)
    want = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(found.nats, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.greedy, logits.argmax(-1))
    assert found.mean == pytest.approx(want.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_a_compressed_model_is_one_function(name: str) -> None:
    """One pass, chunks and the oracle at the same ranks give the same scores; the dense model gives others."""
    family = FAMILIES[name]
    model = family.build(layers=family.fewest)
    ids = torch.randint(1, 60, (97,), generator=torch.Generator().manual_seed(2))
    dense = token_scores(model, ids, 97)
    cache = new_cache(model)
    with compressed(model, {"ratio": 0.5, "calibration": "none", "inner": "eager"}):
        found = [token_scores(model, ids, 97), token_scores(model, ids, 5, cache), token_scores(model, ids, 32)]
    found.append(token_scores(oracle(family, copy.deepcopy(model), ranks_of(cache)), ids, 97))
    for scores in found[1:]:
        torch.testing.assert_close(scores.nats, found[0].nats, rtol=2e-3, atol=2e-3)
    assert (found[0].nats - dense.nats).abs().max() > 0.01
    after = token_scores(model, ids, 97)
    assert torch.equal(after.nats, dense.nats)  # the block leaves the model as it was


def test_statistics_of_a_first_prompt_do_not_outlive_the_block() -> None:
    model = FAMILIES["llama-gqa"].build()
    options = {"calibration": "first-prompt", "ratio": 0.2, "inner": "eager"}
    prompts = torch.randint(1, 60, (2, 300), generator=torch.Generator().manual_seed(3))
    means = []
    for prompt in prompts:
        with compressed(model, options):
            evaluate.first_prompt(model, prompt)
            cache = new_cache(model)
            token_scores(model, prompt[:9], 9, cache)
        means.append(latents(cache)[0][0].codec.mean)
    assert not torch.allclose(means[0], means[1])


def test_the_recompile_limit_is_an_error_and_not_a_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "RECOMPILE_LIMIT", 1)
    model = FAMILIES["llama-gqa"].build()
    with (
        compressed(model, {"ratio": 0.5, "inner": "eager"}),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        token_scores(model, list(range(1, 60)), 7)


# ----------------------------------------------------------------------------------------------------------- command


def test_eval_with_a_first_prompt(folder: Path) -> None:
    """The dense row first; text before the prompt's end is not scored; figures follow from one another."""
    out = folder / "eval.json"
    asked = ["--calibration", "first-prompt", "--prompt-tokens", "300", "--tokens", "65", "--chunk", "16"]
    code, text = run(folder, *asked, "--ratio", "0.5", "--ratio", "0.15", "--json", str(out))
    assert code == 0, text
    result = json.loads(out.read_text())
    dense, half, least = result["rows"]
    model, tokenizer = models.load_model(folder / "model", torch.float32)
    ids = torch.tensor(tokenizer(WORDS).input_ids)
    want = token_scores(model, ids[300:366], 66)
    assert result["tokens"] == 65
    assert dense["nats"] == pytest.approx(want.mean, rel=1e-5)
    assert dense["agreement"] == 1 and dense["added"] == 0 and dense["of_dense"] == 1
    assert dense["per_token"] == 2 * 2 * 64 * 4
    for row, ratio in ((half, 0.5), (least, 0.15)):
        assert row["ratio"] == ratio and row["of_dense"] <= ratio
        assert row["perplexity"] == pytest.approx(math.exp(row["nats"]))
        assert row["added"] == pytest.approx(row["nats"] / dense["nats"] - 1)
        assert row["nats"] != dense["nats"]
        assert abs(row["difference"]) < 1e-3
    with compressed(model, {"calibration": "first-prompt", "ratio": 0.15, "inner": "eager"}):
        evaluate.first_prompt(model, ids[:300])
        assert token_scores(model, ids[300:366], 66).mean == pytest.approx(least["nats"], rel=1e-5)
    for word in ("dense", "ratio 0.5", "ratio 0.15", "bytes per token", "in chunks of 16", "difference", "perplexity"):
        assert word in text


def test_eval_with_needles_and_the_papers_codec(folder: Path) -> None:
    out = folder / "needles.json"
    asked = ["--calibration", "none", "--prompt-tokens", "0", "--tokens", "40", "--ratio", "1.0"]
    code, text = run(
        folder, *asked, "--needle", "--needle-lengths", "120,200", "--needle-keys", "1", "--json", str(out)
    )
    assert code == 0, text
    dense, full = (row["needles"] for row in json.loads(out.read_text())["rows"])
    assert dense["of"] == full["of"] == 2 * 5
    assert {trial["length"] for trial in dense["trials"]} == {120, 200}
    assert full["nats"] == pytest.approx(dense["nats"], rel=1e-4)  # full rank is exact
    assert "Needle in a haystack" in text


def test_no_needles_unless_asked(folder: Path) -> None:
    code, text = run(folder, "--calibration", "none", "--prompt-tokens", "0", "--tokens", "9", "--needle-lengths", "x")
    assert code == 0 and "Needle" not in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ratio", "1.5"], "ratio=1.5 is not allowed"),
        (["--ratio", "0.5", "--ratio", "0"], "ratio=0.0"),
        (["--calibration", "first-promt"], "first-promt"),
        (["--calibration", "/nowhere.safetensors"], "/nowhere.safetensors cannot be used to calibrate"),
        (["--scheduler", "unifrom"], "Did you mean 'uniform'?"),
        (["--precision", "int5"], "precision='int5'"),
        (["--needle", "--needle-lengths", "long"], "needle_lengths='long'"),
        (["--calibration", "first-prompt", "--prompt-tokens", "100"], "prompt_tokens=100"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_refused_options_exit_2_before_anything_is_loaded(
    folder: Path, arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(perplexity, "load_model", load)
    code, text = run(folder, *arguments)
    assert code == 2
    assert word in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "at least 1026 tokens, and this one has 0"),
        (b"a few words", "at least 1026 tokens, and this one has 11"),
        ("Gr\u00fc\u00dfe".encode("latin-1"), "a text file in UTF-8"),
        (None, "No such file"),
    ],
    ids=["empty", "short", "latin-1", "missing"],
)
def test_texts_that_cannot_be_scored_exit_2(folder: Path, content: bytes | None, word: str) -> None:
    path = folder / "bad.txt"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    code, text = run(folder, "--calibration", "first-prompt", text="bad.txt")
    assert code == 2
    assert word in " ".join(text.split())


def test_models_that_cannot_be_scored_exit_1(folder: Path) -> None:
    code, text = run(folder, model="bare")
    assert code == 1 and "it has no tokenizer" in text
    code, text = run(folder, model="nowhere")
    assert code == 1 and "there is no such file" in text


def test_needles_longer_than_the_models_positions_are_refused(folder: Path) -> None:
    code, text = run(folder, "--prompt-tokens", "0", "--calibration", "none", "--needle", "--needle-lengths", "2045")
    assert code == 2 and "at most 2042 for this model" in text


# ------------------------------------------------------------------------------------------------------------- texts


def test_a_text_without_bos_has_no_beginning() -> None:
    beginning, body = tokenized("a stone", tiny.letters(), None)
    assert beginning.tolist() == [] and body.tolist() == [1, 27, 19, 20, 15, 14, 5]


def test_bos_is_the_beginning() -> None:
    class Begins:
        bos_token_id = 2

        def __call__(self, text: str, verbose: bool) -> Any:
            return type("Found", (), {"input_ids": [2, 7, 8]})

    beginning, body = tokenized("x", Begins(), None)
    assert beginning.tolist() == [2] and body.tolist() == [7, 8]


def test_refused_texts(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="UTF-8"):
        read_text(tmp_path)
    with pytest.raises(BadModel, match="'m' cannot be used: it has no tokenizer"):
        tokenized("x", None, "m")


def test_calibrate_reads_rows_of_the_text(folder: Path) -> None:
    model = tiny.llama()
    rows = cli._rows(folder / "text.txt", None, model, tiny.letters(), 2500)
    assert [len(row) for row in rows] == [1024, 1024, 452]
    assert torch.cat(rows).tolist() == tiny.letters()(WORDS).input_ids[:2500]
    model.config.max_position_embeddings = 600
    assert [len(row) for row in cli._rows(folder / "text.txt", None, model, tiny.letters(), 1300)] == [600, 600, 100]
