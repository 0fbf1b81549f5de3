"""Models over several processes and devices: tokens, bytes and plans of each rank, beside those of one process.

    python -m bench.parallel [--models llama qwen3 gemma3] [--inner eager] [--out bench/results/parallel.json]

Small random models of few layers are saved, and loaded under ``torchrun`` by transformers' own tensor parallel
(``tp_plan="auto"``; two processes, gloo, on the CPU), each way in ``WAYS``; and in one process by ``device_map`` with
accelerate's hooks (``MAPS``), which is how a pipeline over devices and an offload to disk are written. Nothing here is
a measurement of time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
WORLD = 2
VOCAB, HEAD, WINDOW, NEW = 101, 16, 6, 8


@dataclass(frozen=True)
class Way:
    """``calibrated``: the default options and a prompt of 300 tokens instead of LoRC's codec and one of 18."""

    name: str
    ratio: float = 1.0
    static: bool = False
    beams: int = 1
    calibrated: bool = False


WAYS = (
    Way("dynamic"),
    Way("static", static=True),
    Way("beams", beams=2),
    Way("half", ratio=0.5),
    Way("first prompt", ratio=0.45, calibrated=True),
)

#: model -> class of its configuration, what differs from SHAPE, what differs from its own tensor parallel plan
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 8 * HEAD,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": HEAD,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
_GEMMA = {"num_hidden_layers": 3, "sliding_window": WINDOW, "query_pre_attn_scalar": HEAD}
_GEMMA["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
_GATHERED = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
_GATHERED["model.layers.*.self_attn.o_proj"] = "rowwise_split_input"
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, str] | None]] = {
    "llama": ("LlamaConfig", {}, None),
    "qwen3": ("Qwen3Config", {}, None),
    "gemma3": ("Gemma3TextConfig", _GEMMA, None),
    "llama, one kv head": ("LlamaConfig", {"num_key_value_heads": 1}, None),
    "llama, one kv head, gathered": ("LlamaConfig", {"num_key_value_heads": 1}, _GATHERED),
}

#: what each module is on (accelerate); ``forced``: with hooks, though all is on one device; ``layers``: on layers alone
MAPS = ("one device", "disk", "forced", "layers")


def tried(name: str, ways: Sequence[str]) -> list[Way]:
    """The ways in which a model is run: what cannot be split or is gathered is the same in all, so one."""
    whole = MODELS[name][1].get("num_key_value_heads") == 1
    return [way for way in WAYS if way.name in ways][: 1 if whole else None]


def save(name: str, folder: Path) -> None:
    """The model ``name`` of ``MODELS`` with random weights, as ``from_pretrained`` reads it."""
    import transformers

    from bench.zoo import randomise

    kind, own, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SHAPE, **own})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    randomise(model, 0)
    model.save_pretrained(folder)


def load(folder: Path, **more: Any) -> Any:
    """From disk, in eval mode, never ending a text by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **more).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.requires_grad_(False)


def prompt(way: Way) -> torch.Tensor:
    """Token ids [2, T], the same in each process."""
    tokens = 150 if way.calibrated else 9
    return torch.randint(1, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(0))


def run(model: Any, way: Way, forced: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Greedy tokens [2, T + NEW], their logits [NEW, 2 * beams, vocabulary] and the cache. ``forced``: these tokens
    instead of the greedy ones."""
    from transformers import DynamicCache, StaticCache

    from lorc_fx.evaluate import cache_keyword

    ids = prompt(way)
    room = ids.shape[1] + NEW
    cache = StaticCache(config=model.config, max_cache_len=room) if way.static else DynamicCache(config=model.config)
    more: dict[str, Any] = {} if forced is None else {"logits_processor": [lambda seen, scores: _only(forced, seen)]}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=way.beams,
        disable_compile=True,  # the model is compiled already, where it is
        return_dict_in_generate=True,
        output_logits=True,
        **more,
        **{cache_keyword(model): cache},
    )
    return out.sequences, torch.stack(out.logits), getattr(out, cache_keyword(model))


def _only(forced: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Scores that leave one token."""
    scores = torch.full((seen.shape[0], VOCAB), -torch.inf)
    return scores.scatter(1, forced[:, seen.shape[1] : seen.shape[1] + 1], 0.0)


def observed(model: Any, way: Way, inner: str) -> dict[str, Any]:
    """One way on one process: tokens, logits' sum, bytes used, ranks and bits per site, and what was said; the name
    and the first line of an exception where there is one."""
    from lorc_fx import PAPER, LatentKV, LorcWarning, cache_nbytes

    torch._dynamo.reset()
    options = {**({} if way.calibrated else PAPER), "ratio": way.ratio, "inner": inner}
    found: dict[str, Any] = {}
    with torch._dynamo.config.patch(recompile_limit=64), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            want, logits, plain = run(model, way)
            found |= {"uncompressed": {"tokens": want.tolist(), "bytes": cache_nbytes(plain, used=True)}}
            model.compile(backend="lorc", options=options)
            got, logits, cache = run(model, way)
        except Exception as error:
            return found | {"fails": f"{type(error).__name__}: {error}".splitlines()[0]}
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    coded = [t for t in held if isinstance(t, LatentKV)]
    return found | {
        "tokens": got.tolist(),
        "logits": logits.tolist(),
        "bytes": cache_nbytes(cache, used=True),
        "coded": len(coded),
        "cached": len(held),
        "planned": [t.codec.rank for t in coded],
        "segments": [[[s.columns, s.bits] for s in t.codec.format.segments] for t in coded],
        "said": sorted({f"{w.category.__name__}: {w.message}" for w in caught if issubclass(w.category, LorcWarning)}),
    }


# -- tensor parallel ---------------------------------------------------------------------------------------------------


def work(folder: Path, inner: str, names: Sequence[str], ways: Sequence[str]) -> None:
    """What each process under torchrun does; writes ``FOLDER/RANK.json``."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names:
        own = MODELS[name][2]
        # a plan of one's own goes into a configuration; "auto" alone is what users write
        more = {"tp_plan": "auto"} if own is None else {"distributed_config": DistributedConfig(WORLD, tp_plan=own)}
        for way in tried(name, ways):
            found[f"{name}: {way.name}"] = observed(load(folder / name, **more), way, inner)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, inner: str, names: Sequence[str], ways: Sequence[str], limit: float = 900) -> list[Any]:
    """Run ``work`` in WORLD processes; what each found. Raises RuntimeError with their output where one fails, and
    subprocess.TimeoutExpired where they hang for ``limit`` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    command += ["-m", "bench.parallel", "--worker", str(folder), "--inner", inner]
    command += ["--models", *names, "--ways", *ways]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *(p for p in sys.path if p)])}
    environment |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit)
    if ran.returncode:
        raise RuntimeError(f"the processes failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-6000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def projected(model: Any, ranks: Sequence[Sequence[int]]) -> Any:
    """The oracle of LoRC's codec: the rows that each process has of a key or value projection, projected onto their own
    leading singular vectors; ``ranks`` per process, sites in the order of the layers, keys first."""
    sites = [getattr(layer.self_attn, name) for layer in model.model.layers for name in ("k_proj", "v_proj")]
    for i, module in enumerate(sites):
        cut = []
        for rows, mine in zip(module.weight.double().chunk(len(ranks)), ranks, strict=True):
            u = torch.linalg.svd(rows)[0][:, : mine[i]]
            cut.append(u @ (u.T @ rows))
        module.weight.data.copy_(torch.cat(cut).float())
    return model


def tensor_parallel(folder: Path, inner: str, names: Sequence[str], ways: Sequence[str]) -> list[dict[str, Any]]:
    """One row per model and way: what the processes found, and how it compares with one process."""
    for name in names:
        if not (folder / name).exists():
            save(name, folder / name)
    told = launch(folder, inner, names, ways)
    rows = []
    for name in names:
        for way in tried(name, ways):
            parts = [part[f"{name}: {way.name}"] for part in told]
            rows.append({"model": name, "way": way.name} | _compared(folder / name, way, parts, inner))
    return rows


def _compared(folder: Path, way: Way, parts: list[dict[str, Any]], inner: str) -> dict[str, Any]:
    if any("fails" in part for part in parts):
        return {"fails": [part.get("fails") for part in parts], "dense_fails": ["uncompressed" not in p for p in parts]}
    logits = [torch.tensor(part.pop("logits")) for part in parts]
    plain, whole = load(folder), observed(load(folder), way, inner)
    coded = [part["coded"] == part["cached"] for part in parts]
    if way.ratio < 1 and not way.calibrated and all(coded):
        plain = projected(plain, [part["planned"] for part in parts])
    forced = torch.tensor(parts[0]["tokens"]) if way.ratio < 1 else None
    tokens, want, _ = run(plain, way, forced)
    error = float((logits[0] - want).abs().max() / want.abs().max())
    return {
        "tokens_equal": tokens.tolist() == parts[0]["tokens"] if way.ratio == 1 else None,
        "error": error,  # at "first prompt" what the codecs cost, else what arithmetic in another order does
        "ranks_agree": all(part["tokens"] == parts[0]["tokens"] for part in parts),
        "logits_agree": all(torch.equal(part, logits[0]) for part in logits),
        "bytes_dense": [part["uncompressed"]["bytes"] for part in parts],
        "bytes": [part["bytes"] for part in parts],
        "bytes_one_process": whole["bytes"],
        "coded": [part["coded"] for part in parts],
        "cached": [part["cached"] for part in parts],
        "planned": [part["planned"] for part in parts],
        "segments": [part["segments"] for part in parts] if way.calibrated else None,
        "said": sorted({text for part in parts for text in part["said"]}),
    }


# -- device maps -------------------------------------------------------------------------------------------------------


def mapped(folder: Path, how: str) -> Any:
    """The model at ``folder`` spread by accelerate as ``MAPS`` says."""
    ends: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places = ends | {"model.layers.0": "cpu", "model.layers.1": "disk" if how == "disk" else "cpu"}
    if how in ("one device", "disk"):
        return load(folder, device_map=places, offload_folder=str(folder / "offloaded"))
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    model = dispatch_model(load(folder), places, main_device="cpu", force_hooks=True)
    if how == "layers":
        for layer in model.model.layers:
            for part in layer.modules():
                if part is not layer:
                    remove_hook_from_module(part)
    return model


def device_maps(folder: Path, inner: str, maps: Sequence[str] = MAPS) -> list[dict[str, Any]]:
    """One row per map and kind of cache, of the model ``llama``."""
    if not (folder / "llama").exists():
        save("llama", folder / "llama")
    rows = []
    for how in maps:
        for way in WAYS[:2]:
            want, _, _ = run(load(folder / "llama"), way)
            found = observed(mapped(folder / "llama", how), way, inner)
            kept = {k: found[k] for k in ("coded", "cached", "bytes", "said", "fails") if k in found}
            rows.append({"map": how, "way": way.name, "tokens_equal": found.get("tokens") == want.tolist()} | kept)
    return rows


def versions() -> dict[str, str]:
    import accelerate
    import transformers

    named = {"torch": torch.__version__, "transformers": transformers.__version__, "accelerate": accelerate.__version__}
    return named | {"python": sys.version.split()[0]}


def main(argv: Sequence[str] | None = None) -> None:
    from lorc_fx.console import write_json

    parser = argparse.ArgumentParser(description="Tensor parallel and device maps: tokens, bytes and plans.")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=[w.name for w in WAYS], choices=[w.name for w in WAYS])
    parser.add_argument("--inner", default="eager", help="the compiler of the rewritten graphs, or inductor")
    parser.add_argument("--out", type=Path, default=RESULTS / "parallel.json")
    args = parser.parse_args(argv)
    if args.worker is not None:
        work(args.worker, args.inner, args.models, args.ways)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "command": "python -m bench.parallel",
            "versions": versions(),
            "world": WORLD,
            "inner": args.inner,
            "tensor_parallel": tensor_parallel(folder, args.inner, args.models, args.ways),
            "device_maps": device_maps(folder, args.inner),
        }
    write_json(args.out, result)
    for row in result["tensor_parallel"]:
        shown = row.get("fails") or [row["tokens_equal"], f"{row['error']:.1e}", row["bytes"], row["bytes_dense"]]
        print(f"{row['model']}, {row['way']}:", *shown)
    for row in result["device_maps"]:
        print(
            f"map {row['map']}, {row['way']}:", row["tokens_equal"], f"{row.get('coded')} of {row.get('cached')} coded"
        )


if __name__ == "__main__":
    main()
