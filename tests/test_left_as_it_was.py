"""What commands and functions leave behind: the user's model, gradients, warnings, default device and files are what
they were."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from commands import run
from torch import nn

import lorc_fx
from helpers import assert_close, cache_name, new_cache, options
from lorc_fx import autotune, demo, errors, plan_command, plan_plot
from lorc_fx.calibrate import _self_written
from lorc_fx.console import Show, print_path
from lorc_fx.errors import BadOption, ConflictingOptions, LorcWarning
from lorc_fx.html_report.gather import heard
from lorc_fx.plan_file import replaced
from lorc_fx.store import STORE

pytestmark = pytest.mark.usefixtures("quiet")


def ids_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 28, (1, tokens), generator=torch.Generator().manual_seed(seed))


# -- calibrate ---------------------------------------------------------------------------------------------------------


def test_gradients_of_the_users_stay_what_they_are() -> None:
    model = tiny.llama()
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.grad = torch.ones_like(weight)
    frozen = model.lm_head.weight
    frozen.requires_grad_(False)
    found = lorc_fx.calibrate(model, [ids_of(40)], gradients=True, progress=False)
    assert all(site.gradients for site in found.sites)
    assert bool((weight.grad == 1).all()) and [p for p in model.parameters() if p.grad is not None] == [weight]
    assert not frozen.requires_grad and weight.requires_grad


def test_the_model_itself_writes_what_it_is_calibrated_on() -> None:
    """And not its compressed self, though it was compiled in place."""
    model = tiny.llama()
    model.generation_config.bos_token_id = 1
    want = next(_self_written(model))
    model.compile(backend="lorc", options=options(ratio=0.1, scheduler="uniform", precision="model"))
    assert torch.equal(next(_self_written(model)), want)
    assert not STORE.codecs(model.parameters())


@torch.no_grad()
def test_a_default_device_of_the_users_is_not_where_sums_are() -> None:
    """Dynamo resets it while it compiles; statistics and codecs are also made at later calls."""
    model, plain = tiny.llama(), tiny.llama()
    model.compile(backend="lorc", options={"inner": "eager", "ratio": 0.9})
    cuts = [ids_of(n, seed=n) for n in (20, 30, 40, 300)]
    with torch.device("meta"):
        for ids in cuts:
            with torch.device("cpu"):
                cache = new_cache(model)
            model(
                input_ids=ids,
                use_cache=True,
                position_ids=torch.arange(ids.shape[1], device="cpu")[None],
                **{cache_name(model): cache},
            )
        assert len(lorc_fx.fidelity(model)) == 4
    assert_close("logits", model(ids_of(50)).logits, plain(ids_of(50)).logits, 0.1)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_finding_readers_leaves_no_statistics() -> None:
    model = tiny.llama()
    before = model._compiled_call_impl
    assert autotune.readers(model, {"ratio": 0.5}, [1])
    assert model._compiled_call_impl is before
    assert not STORE.codecs(model.parameters()) and lorc_fx.fidelity(model) == ()


def test_measuring_a_plan_leaves_the_model_as_it_was() -> None:
    model = tiny.llama()
    model.compile(backend="eager")
    before = model._compiled_call_impl
    (asked,) = plan_command.asked({"precision": "int8", "calibration": "none"}, {"ratio": 0.5}, [], True)
    (plan,) = plan_command.planned(model, [asked])
    assert plan_command.measured(Show(), model, [ids_of(30)[0]], plan, asked) > 0
    assert model._compiled_call_impl is before and not STORE.codecs(model.parameters())


def test_a_budget_that_no_plan_has_is_refused() -> None:
    with pytest.raises(ConflictingOptions, match="only a plan that is written has that budget"):
        plan_command.asked({}, {"ratio": 0.4, "bytes_per_token": None}, [0.5], False)
    assert len(plan_command.asked({}, {"ratio": None, "bytes_per_token": None}, [0.5], False)) == 1


@pytest.mark.parametrize("command", ["explain", "eval --text nothing.txt", "plan out.json", "doctor", "demo"])
def test_a_json_that_cannot_be_written_is_refused_first(command: str, tmp_path: Path) -> None:
    code, text = run(*command.split(), "--json", str(tmp_path / "none" / "x.json"))
    assert code == 2 and "folder that exists" in " ".join(text.split())


def test_a_plot_is_two_files_and_each_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "figs").mkdir()
    plan_plot.check("plot", tmp_path / "figs")
    (tmp_path / "figs.svg").mkdir()
    with pytest.raises(BadOption):
        plan_plot.check("plot", tmp_path / "figs")


def test_brackets_of_a_path_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_path(Path("c[v2][bold].safetensors"))
    assert capsys.readouterr().out.strip() == "c[v2][bold].safetensors"


@torch.no_grad()
def test_the_demo_takes_models_of_few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than the sample text has tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 28, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 320}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None)).eval()
    monkeypatch.setattr(demo, "load_model", lambda *_: (model, tiny.letters()))
    with Show() as show:
        found = demo.run(show, None, {"inner": "eager"}, new_tokens=3, prompts=("rivers are", "water is so"))
    assert found["first_prompt_tokens"] == 320 and found["lorc"]["loss"]["nats"] > 0


# -- warnings and files ------------------------------------------------------------------------------------------------


def test_warnings_are_shown_where_no_page_comes() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError), heard() as said:
            warnings.warn("ours", LorcWarning, stacklevel=1)
            warnings.warn("theirs", stacklevel=1)
            raise ValueError
    assert sorted(str(w.message) for w in caught) == ["ours", "theirs"] and said == []


def test_threads_that_write_one_path_do_not_share_a_partial_file(tmp_path: Path) -> None:
    path, names = tmp_path / "x", set()
    barrier = threading.Barrier(4)

    def write(text: str) -> None:
        with replaced(path) as partial:
            names.add(partial)
            partial.write_text(text)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(str(i) * 9,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 4 and path.read_text() in {str(i) * 9 for i in range(4)}
    assert list(tmp_path.iterdir()) == [path]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_refused_calls_hold_no_more_than_the_last() -> None:
    """One exception is raised again at each call: its traceback must not grow."""

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    call, depths = torch.compile(Two(), backend="lorc", options={"ratio": 7}), []
    for _ in range(4):
        with pytest.raises(BadOption) as caught:
            call(torch.ones(3))
        depths.append(len(caught.traceback))
    assert len(set(depths[1:])) == 1


def test_what_runs_unchanged_is_not_told_to_leave_strict_out() -> None:
    said, refused = str(errors.NoSites(strict=False)), str(errors.NoSites())
    assert "strict" not in said and "runs unchanged" in said
    assert "strict=False" in refused


def test_the_ratio_at_which_positions_come_on_top_is_named() -> None:
    assert errors.ratio_for(260, 256, 4) == "1" and errors.ratio_for(261, 256, 4).startswith("none")
