"""lm-eval on compressed models, with tasks from local files: every key and value of a request goes through the codec.

`pytest -m lm_eval`, with the extra `eval`.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="the extra `eval` is not installed (150 MB, so the extra `test` is without it)")

import tiny
import torch
from families import FAMILIES
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from oracle import oracle, ranks_of
from typer.testing import CliRunner

import lorc_fx
from helpers import cache_of, new_cache, piecewise
from lorc_fx import cli, lm_eval_adapter
from lorc_fx.errors import BadModel, BadOption, UnknownOption
from lorc_fx.lm_eval_adapter import LorcLM

pytestmark = [pytest.mark.lm_eval, pytest.mark.usefixtures("clean")]
FAMILY = FAMILIES["llama-gqa"]
#: (context, continuation): of different lengths, so that a batch is padded
PAIRS = [
    ("the river bends", " slowly"),
    ("a", " stone"),
    ("sand and gravel settle on the", " inside of the bend"),
    ("on", " to"),
]


def tokenizer() -> Any:
    letters = tiny.letters()
    letters.eos_token = "<unk>"  # lm-eval needs one, and the tiny model has no other to spare
    return letters


def ask(lm: Any, pairs: list[tuple[str, str]] = PAIRS) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def dense(model: Any) -> list[float]:
    return ask(HFLM(copy.deepcopy(model), tokenizer=tokenizer(), batch_size=4))


def lorc(model: Any, **kwargs: Any) -> LorcLM:
    return LorcLM(copy.deepcopy(model), tokenizer=tokenizer(), batch_size=4, **kwargs)


@pytest.mark.parametrize("use_cache", [True, False])
def test_loglikelihoods_are_those_of_the_oracle(use_cache: bool) -> None:
    model = FAMILY.build()
    model.config.use_cache = use_cache
    lm = lorc(model, ratio=0.5, calibration="none")
    got = ask(lm)
    cache = new_cache(lm.model)
    piecewise(lm.model, torch.tensor([[1, 2, 3]]), cache, [3])
    assert got == pytest.approx(
        ask(HFLM(oracle(FAMILY, copy.deepcopy(model), ranks_of(cache)), tokenizer=tokenizer())), rel=1e-4
    )
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(got, dense(model), strict=True))


def test_full_rank_is_the_dense_model() -> None:
    model = FAMILY.build()
    assert ask(lorc(model, ratio=1.0)) == pytest.approx(dense(model), rel=1e-4)


def test_generation_is_padded_on_the_left() -> None:
    """A batch of prompts of different lengths gives what each gives alone."""
    lm = lorc(FAMILY.build(), ratio=0.5)
    texts = ["the river bends slowly", "a stone", "sand"]
    settings = {"until": ["#"], "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts)]
    found = lm.generate_until(requests, disable_tqdm=True)
    for text, answer in zip(texts, found, strict=True):
        ids = lm.tokenizer(text, return_tensors="pt")
        alone = lm.model.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=0)
        assert answer == lm.tokenizer.decode(alone[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(set(found)) > 1


def test_a_batch_of_generations_runs_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lorc(FAMILY.build(), ratio=0.5)
    caches = []
    generate = lm.model.generate

    def record(**kwargs: Any) -> Any:
        out = generate(**kwargs, return_dict_in_generate=True)
        caches.append(cache_of(out))
        return out.sequences

    monkeypatch.setattr(lm.model, "generate", record)
    settings = {"until": ["#"], "max_gen_toks": 3}
    lm.generate_until(
        [Instance("generate_until", {}, (t, settings), 0) for t in ("a stone", "sand")], disable_tqdm=True
    )
    assert len(ranks_of(caches[0])) == len(caches[0].layers)  # fails where a layer is dense


def test_the_first_prompt_comes_before_any_request(tmp_path: Path) -> None:
    """The same as a calibration on that text (as much as the model has positions for), whatever is asked first."""
    text = "water runs down the hill and over the stones " * 10
    (tmp_path / "prompt.txt").write_text(text)
    model = FAMILY.build()
    learnt = lorc(model, ratio=0.2, calibration="first-prompt", prompt=tmp_path / "prompt.txt")
    got = ask(learnt)
    ids = torch.tensor(tokenizer()(text).input_ids[: learnt.max_length])
    known = lorc_fx.calibrate(copy.deepcopy(model), [ids], progress=False)
    assert got == pytest.approx(ask(lorc(model, ratio=0.2, calibration=known)), rel=1e-3)
    again = lorc(model, ratio=0.2, calibration="first-prompt", prompt=tmp_path / "prompt.txt")
    assert ask(again, PAIRS[::-1]) == pytest.approx(got[::-1], rel=1e-5)
    assert got != pytest.approx(dense(model), rel=1e-4)


def test_refusals(tmp_path: Path) -> None:
    model = tiny.llama()
    with pytest.raises(UnknownOption, match="Did you mean 'ratio'"):
        lorc(model, ration=0.5)
    with pytest.raises(BadOption, match=r"ratio=2"):
        lorc(model, ratio=2)
    with pytest.raises(BadOption, match="prompt="):
        (tmp_path / "short.txt").write_text("a few words")
        lorc(model, calibration="first-prompt", prompt=tmp_path / "short.txt")
    with pytest.raises(BadModel, match="encoder-decoder"):
        lorc(model, backend="seq2seq")


# ------------------------------------------------------------------------------------------------------ local tasks

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/generate.json}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["#"], max_gen_toks: 4, do_sample: false}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = ["is water wet", "does sand float", "do rivers bend", "is a stone soft", "is it so"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks, like BoolQ and like GSM8K; the right answers of the second are set by the test."""
    rows = [{"question": question, "label": i % 2} for i, question in enumerate(QUESTIONS)]
    (tmp_path / "choice.json").write_text(json.dumps(rows))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(folder=tmp_path))
    (tmp_path / "generate.yaml").write_text(GENERATE.format(folder=tmp_path))
    return tmp_path


def write_answers(folder: Path, answers: list[str]) -> None:
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    (folder / "generate.json").write_text(json.dumps(rows))


def test_tasks_from_local_files(tasks: Path) -> None:
    """Accuracies are those of the compressed model's own scores and texts."""
    model = FAMILY.build()
    lm = lorc(model, ratio=0.5)
    settings = {"until": ["#"], "max_gen_toks": 4, "do_sample": False}
    requests = [Instance("generate_until", {}, (question, settings), i) for i, question in enumerate(QUESTIONS)]
    written = lm.generate_until(requests, disable_tqdm=True)
    write_answers(tasks, [*written[:3], "wrong", "wrong"])
    scores = [ask(lm, [(question, " yes"), (question, " no")]) for question in QUESTIONS]
    right = sum((yes < no) == bool(i % 2) for i, (yes, no) in enumerate(scores))
    found = lm_eval_adapter.evaluate(
        copy.deepcopy(model),
        ["local_choice", "local_generate"],
        {"ratio": 0.5},
        tokenizer=tokenizer(),
        batch_size=2,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert found["local_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert found["local_generate"]["exact_match,none"] == pytest.approx(3 / len(QUESTIONS))


def test_the_command_line(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lorc lm-eval run --model lorc` on a saved checkpoint, its results written by lm-eval."""
    assert get_model("lorc") is LorcLM
    tiny.llama().save_pretrained(tasks / "model")
    tokenizer().save_pretrained(tasks / "model")
    write_answers(tasks, ["x"] * len(QUESTIONS))
    arguments = ["lm-eval", "run", "--model", "lorc", "--tasks", "local_choice", "--include_path", str(tasks)]
    arguments += ["--model_args", f"pretrained={tasks / 'model'},ratio=0.5,calibration=none", "--batch_size", "2"]
    made = []
    compress = lm_eval_adapter.compress
    monkeypatch.setattr(lm_eval_adapter, "compress", lambda *given: (made.append(given[1]), compress(*given)))
    result = CliRunner().invoke(cli.app, [*arguments, "--output_path", str(tasks / "out")])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert made == [{"inner": "eager", "ratio": 0.5, "calibration": "none"}]
    (written,) = (tasks / "out").rglob("results*.json")
    assert 0 <= json.loads(written.read_text())["results"]["local_choice"]["acc,none"] <= 1
