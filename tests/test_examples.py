"""Each script of ``examples/`` runs on a tiny checkpoint: the tokens of the uncompressed model, in fewer bytes.

Keys and values of the checkpoint have rank 1/4, so that a ratio of 0.6 loses nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, make_low_rank
from transformers import LlamaForCausalLM

import lorc_fx
from bench.zoo import randomise
from helpers import assert_close, assert_tokens, cache_of, latents
from lorc_fx import latent_ops
from lorc_fx.errors import BadPlan, DenseCacheWarning, EagerWarning
from lorc_fx.latent import LatentKV, cache_nbytes
from lorc_fx.models import load_model

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore:Adapter name")]

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = EXAMPLES.parent / "docs" / "beside.md"
EXACT: dict[str, Any] = {"inner": "eager", "calibration": "none", "scheduler": "uniform", "ratio": 0.6}
PROMPT, NEW = "the river bends", 8


def made(folder: Path, heads: int, kv_heads: int, layers: int = 2) -> str:
    config = tiny.llama(heads, kv_heads).config
    config.num_hidden_layers = layers
    model = LlamaForCausalLM(config).eval()
    randomise(model, 0)
    make_low_rank(FAMILIES["llama-gqa"], model, 0.25)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tiny.letters().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made(tmp_path_factory.mktemp("eight"), 8, 8)


def example(name: str) -> Any:
    """The script as a module; it is not run as a program."""
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo looks its functions' module up
    spec.loader.exec_module(module)
    return module


def dense(path: str, model: Any = None, prompt: str = PROMPT, **more: Any) -> Any:
    """Greedy tokens and cache of the model that nothing has compiled."""
    loaded, tokenizer = load_model(path, dtype=None)
    asked = {**tokenizer(prompt, return_tensors="pt"), "max_new_tokens": NEW, "do_sample": False, **more}
    with torch.compiler.set_stance("force_eager"):
        return (loaded if model is None else model).generate(**asked, return_dict_in_generate=True)


def smaller(cache: Any, want: Any, most: float = 0.7) -> None:
    """All of it is coded, and takes at most ``most`` of the bytes of the dense one of the same tokens."""
    pairs = latents(cache)
    assert all(x.tail is None for pair in pairs for x in pair)
    plain = cache_of(want)
    assert cache_nbytes(cache, used=True) <= most * cache_nbytes(plain, used=True)


def agree(found: dict[str, Any], want: Any) -> None:
    assert_tokens("tokens", found["tokens"], want.sequences)
    smaller(found["cache"], want)


def test_the_checkpoint_tells_texts_apart(checkpoint: str) -> None:
    assert len(set(dense(checkpoint).sequences[0, -NEW:].tolist())) > 3


def test_each_example_has_a_row_and_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    text, tests = PAGE.read_text(), Path(__file__).read_text()
    for name in names:
        assert f"| [{name}.py](../examples/{name}.py) |" in text, f"docs/beside.md has no row for {name}.py"
        assert f'"{name}' in tests, f"no test runs {name}.py"
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 50, f"{name}.py has more than fifty lines"
    assert text.count("](../examples/") == len(names), "docs/beside.md has a row for an example that is not there"


@pytest.mark.parametrize("name", ["device_map", "turned_off"])
def test_plain_generation(name: str, checkpoint: str) -> None:
    agree(example(name).main(checkpoint, **EXACT), dense(checkpoint))


def test_peft_adapters(checkpoint: str) -> None:
    pytest.importorskip("peft", reason="the extra `adapted` is not installed")
    torch.manual_seed(0)
    found = example("peft_adapters").main(checkpoint, **EXACT)
    for name in ("one", "two"):
        found["model"].set_adapter(name)
        agree(found[name], dense(checkpoint, found["model"]))
    assert not torch.equal(found["one"]["tokens"], found["two"]["tokens"]), "the adapters have no effect"


def test_torchao_int8(checkpoint: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="the extra `adapted` is not installed")
    model, _ = load_model(checkpoint, dtype=None)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    agree(example("torchao_int8").main(checkpoint, **EXACT), dense(checkpoint, model))


def test_text_pipeline(checkpoint: str) -> None:
    found, want = example("text_pipeline").main(checkpoint, **EXACT), dense(checkpoint)
    assert found["text"] == PROMPT + found["tokenizer"].decode(want.sequences[0, -NEW:], skip_special_tokens=True)
    smaller(found["cache"], want)


def test_streaming(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, want = example("streaming").main(checkpoint, **EXACT), dense(checkpoint)
    agree(found, want)
    text = found["tokenizer"].decode(want.sequences[0])
    assert "".join(found["pieces"]) == text and len(found["pieces"]) > 1
    assert text in capsys.readouterr().out


def test_chat(checkpoint: str) -> None:
    found = example("chat").main(checkpoint, **EXACT)
    with torch.compiler.set_stance("force_eager"):
        want = example("chat").main(checkpoint, **EXACT)
    assert found["messages"] == want["messages"]
    assert found["reused"] == want["reused"] and found["reused"][0] == 0 < found["reused"][1] < found["reused"][2]
    assert_tokens("tokens", found["tokens"], want["tokens"])
    smaller(found["cache"], {"cache": want["cache"]})


def test_static_cache(checkpoint: str) -> None:
    """Compiling the model compresses; compiling ``generate``'s decode step cannot, and says so."""
    want = dense(checkpoint, cache_implementation="static")
    with pytest.warns(DenseCacheWarning, match="model.compile"):
        found = example("static_cache").main(checkpoint, **EXACT)
    agree(found["model"], want)
    assert_tokens("by CompileConfig", found["config"]["tokens"], want.sequences)
    assert not any(isinstance(layer.keys, LatentKV) for layer in found["config"]["cache"].layers)


@pytest.mark.parametrize("more", [{"dynamic": True}, {"dynamic": False}, {"fullgraph": True}], ids=str)
def test_compile_modes(more: dict[str, Any], checkpoint: str) -> None:
    agree(example("compile_modes").main(checkpoint, **more, **EXACT), dense(checkpoint))


MODES = ["reduce-overhead", "max-autotune"]


@pytest.mark.parametrize(("mode", "how"), [(MODES[0], "mode"), (MODES[1], "options")])
def test_a_mode_reaches_inductor(mode: str, how: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an argument of torch.compile, and beside options as one of ours."""
    from lorc_fx import compat

    seen = []

    def inductor(gm: Any, inputs: Any, mode: str | None) -> Any:
        seen.append(mode)
        return gm.forward

    monkeypatch.setattr(compat, "compile_with_inductor", inductor)
    options = {name: value for name, value in EXACT.items() if name != "inner"} if how == "options" else {}
    found = example("compile_modes").main(checkpoint, mode=mode, **options)
    assert seen and set(seen) == {mode}
    latents(found["cache"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_inductor(mode: str, checkpoint: str) -> None:
    options = EXACT | {"inner": "inductor"}
    agree(example("compile_modes").main(checkpoint, mode=mode, **options), dense(checkpoint))


def test_exporting(checkpoint: str, quiet: None) -> None:
    """The program is that of the model, dense, and reads a coded cache as the model does; no op of ours is in it."""
    found = example("exporting").main(checkpoint, **EXACT)
    latents(found["cache"])
    plain, _ = load_model(checkpoint, dtype=None)
    with torch.no_grad():
        assert_close("logits", found["logits"][:, -1], plain(found["ids"]).logits[:, -1])
    targets = [str(node.target) for node in found["program"].graph.nodes if node.op == "call_function"]
    assert targets and not any("lorc" in target for target in targets)


def test_an_export_is_the_model_without_lorc(checkpoint: str) -> None:
    """Of the module that was compiled in place and of torch.compile's wrapper: the graph of the model alone."""
    ids = torch.arange(1, 9)[None]
    graphs = []
    for how in ("not at all", "in place", "wrapped"):
        model, _ = load_model(checkpoint, dtype=None)
        call = model
        if how == "in place":
            model.compile(backend="lorc", options=EXACT)
        elif how == "wrapped":
            call = torch.compile(model, backend="lorc", options=EXACT)
        program = torch.export.export(call, (ids,), {"use_cache": False})
        graphs.append([str(node.target) for node in program.graph.nodes if node.op == "call_function"])
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            assert_close(how, program.module()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert graphs[0] == graphs[1] == graphs[2]


def test_a_strict_export_refuses_a_compressed_cache(checkpoint: str, quiet: None) -> None:
    found = example("exporting").main(checkpoint, **EXACT)
    keys, values = ([getattr(x, kind) for x in found["cache"].layers] for kind in ("keys", "values"))
    with pytest.raises(Exception, match="a LatentKV does not enter a region compiled by"):
        torch.export.export(found["step"], (found["ids"][:, -1:], keys, values), strict=True)


def test_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More graphs than Dynamo's limit: the example raises it. Without that later layers stay dense, and right."""
    path = made(tmp_path, 8, 8, layers=6)
    want = dense(path)
    agree(example("layer_by_layer").main(path, **EXACT), want)
    torch._dynamo.reset()
    monkeypatch.setattr(latent_ops, "_hinted", set())  # it is said once per process
    model, _ = load_model(path, dtype=None)
    for layer in model.model.layers:
        layer.compile(backend="lorc", options=EXACT)
    with pytest.warns(EagerWarning, match="recompile_limit"):
        out = model.generate(want.sequences[:, :-NEW], max_new_tokens=NEW, do_sample=False)
    assert_tokens("past the limit", out, want.sequences)


def test_layers_with_few_heads(tmp_path: Path) -> None:
    """Keys that must be decoded would cost as much in cosines and sines, and stay dense. By default keys are kept as
    they are, in as many bits as the budget has: then all is compressed."""
    path = made(tmp_path, 8, 2)
    for ratio in (0.45, 0.2):
        smaller(example("layer_by_layer").main(path, inner="eager", ratio=ratio)["cache"], dense(path), ratio)
        torch._dynamo.reset()
    with pytest.warns(DenseCacheWarning, match="bytes per token beside the projection"):
        found = example("layer_by_layer").main(path, **EXACT)
    assert_tokens("tokens", found["tokens"], dense(path).sequences)
    assert found["coded"] == [False, True] * 2


@pytest.mark.slow
def test_layers_take_a_calibration_and_no_plan(tmp_path: Path, quiet: None) -> None:
    path = made(tmp_path, 8, 2)
    model, _ = load_model(path, dtype=None)
    known = lorc_fx.calibrate(model, [torch.randint(1, 28, (2, 200))])
    found = example("layer_by_layer").main(path, inner="eager", calibration=known, ratio=0.3)
    smaller(found["cache"], dense(path), 0.3)
    plan = lorc_fx.make_plan(model, torch.arange(1, 9)[None], options={"calibration": known, "ratio": 0.45})
    torch._dynamo.reset()
    with pytest.raises(BadPlan, match="it has ranks for sites that this model lacks"):
        example("layer_by_layer").main(path, inner="eager", plan=plan)


def test_assisted(checkpoint: str, tmp_path: Path) -> None:
    """With a draft that is wrong now and then."""
    draft, _ = load_model(checkpoint, dtype=None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.3 * p.std() * torch.randn(p.shape, generator=generator) if p.dim() > 1 else 0.0)
    draft.save_pretrained(tmp_path)
    tiny.letters().save_pretrained(tmp_path)
    found, want = example("assisted").main(checkpoint, str(tmp_path), **EXACT), dense(checkpoint)
    assert_tokens("alone", found["alone"], want.sequences)
    agree(found, want)


def test_turned_off(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORC_DISABLE", "1")
    found, want = example("turned_off").main(checkpoint, **EXACT), dense(checkpoint)
    assert_tokens("tokens", found["tokens"], want.sequences)
    assert not any(isinstance(layer.keys, LatentKV) for layer in found["cache"].layers)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_tensor_parallel(checkpoint: str) -> None:
    """Two processes of four heads each: the tokens of one, in half of its bytes each (and positions)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "tensor_parallel.py"), checkpoint, json.dumps(EXACT)]
    root = str(EXAMPLES.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *(p for p in sys.path if p)])}
    environment |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    want = dense(checkpoint)
    plain = cache_nbytes(cache_of(want), used=True)
    assert sorted(row["rank"] for row in rows) == [0, 1]
    for row in rows:
        assert row["tokens"] == want.sequences.tolist()
        assert row["heads"] == 4 and row["coded"] == 4
        assert row["bytes"] <= 0.7 * plain / 2


@pytest.mark.lm_eval
def test_lm_eval_task(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed without loss it scores what the dense model scores."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    got = example("lm_eval_task").main(checkpoint, **EXACT)
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        want = example("lm_eval_task").main(checkpoint, **EXACT)
    assert got["accuracy"] == want["accuracy"]
    scores = [[pair[0] for sample in found["samples"] for pair in sample["filtered_resps"]] for found in (got, want)]
    assert len(scores[0]) == 6 and scores[0] == pytest.approx(scores[1], rel=1e-4)
