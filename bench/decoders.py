"""Every decoder of the installed transformers under backend="lorc": right, and what of its caches is coded.

    python -m bench.decoders [--only LlamaForCausalLM ...] [--jobs 2] [--out bench/results/decoders.json]

Each class runs small (``bench.zoo``) in a process of its own: batch 2 with left padding, a prompt and five decode
steps, with a dynamic cache (the prompt whole, and in chunks of five) and a static one. Full rank (LoRC's codec, ratio
1.0) is compared with the eager model; ratio 0.5 with the eager model whose own weights were projected on the columns
that were kept: rows of an effective weight W become rows of U U^T W, found in the parameters by their values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import queue
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import lorc_fx
from bench import zoo
from bench.run import RESULTS, machine
from bench.verdicts import TOLERANCE, Row, page, verdict
from lorc_fx import backend, builder
from lorc_fx.console import write_json
from lorc_fx.latent import LatentKV

PROMPT, PAD, CHUNK, NEW = 9, 3, 5, 5
LIMIT_S = 600

#: name -> arguments of ``generate``
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "dynamic, chunks": {"prefill_chunk_size": CHUNK},
    "static": {"cache_implementation": "static"},
}


@dataclasses.dataclass
class Seen:
    """What the backend did in one or several runs: ``sites`` by name with their epilogues, misses, what it made of
    each site's weight, the sites whose weights are ``also`` used for what no cache keeps, and how they are read."""

    sites: dict[str, str] = dataclasses.field(default_factory=dict)
    misses: dict[str, str] = dataclasses.field(default_factory=dict)
    weights: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    ranks: dict[Any, int] = dataclasses.field(default_factory=dict)
    said: list[str] = dataclasses.field(default_factory=list)
    also: set[str] = dataclasses.field(default_factory=set)
    lowered: dict[str, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def watching(seen: Seen) -> Iterator[None]:
    """The pipeline's stages, with a note of what passes between them."""
    match, settle = backend.match, backend.without_projection
    made, rewrite = builder.Builder.made, builder.rewrite

    def matching(graph: Any) -> Any:
        found = match(graph)
        seen.sites |= {s.name: s.decoder.words for s in found.sites}
        chains = {node for site in found.sites for node, _ in site.rows.chain.nodes}
        seen.also |= {s.name for s in found.sites if any(set(w.users) - chains for w in s.weights)}
        return found

    def settling(found: Any, options: Any) -> Any:
        settled = settle(found, options)
        seen.misses |= {m.reason: m.kind for m in settled.misses}
        return settled

    def making(self: Any, prepared: Any, plan: Any, arguments: Any) -> Any:
        for (site, p), line in zip(prepared.items(), plan.sites, strict=True):
            key = (site.kind, p.weight.data_ptr(), tuple(p.weight.shape), float(p.weight.double().sum()))
            if seen.ranks.get(key, line.rank) != line.rank:
                seen.also.add(site.name)  # one weight, two caches
            seen.weights[key], seen.ranks[key] = p.weight.detach().clone(), line.rank
        return made(self, prepared, plan, arguments)

    def rewriting(*given: Any, **more: Any) -> Any:
        found = rewrite(*given, **more)
        seen.lowered |= found.lowerings  # the last is that of decode steps
        return found

    with (
        mock.patch.object(backend, "match", matching),
        mock.patch.object(backend, "without_projection", settling),
        mock.patch.object(builder, "rewrite", rewriting),
        mock.patch.object(builder.Builder, "made", making),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in caught if issubclass(w.category, lorc_fx.errors.LorcWarning)]
    seen.said += [text for text in dict.fromkeys(ours) if text not in seen.said]


class Ran(NamedTuple):
    """What one run gives: sequences, logits [steps, 2, vocabulary], ``parts``: each tensor of the cache by name, and
    whether it is coded."""

    tokens: torch.Tensor
    logits: torch.Tensor
    parts: list[tuple[str, bool]]


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """A batch of two prompts, the first padded on the left; decoders with an encoder get an input of that as well."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, PROMPT), generator=draw)
    mask = torch.ones_like(ids)
    ids[0, :PAD], mask[0, :PAD] = 0, 0
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    begin = torch.randint(3, 90, (2, CHUNK), generator=draw)
    sound = zoo.encoder_input(model, draw)
    return {**(sound or {"input_ids": ids, "attention_mask": mask}), "decoder_input_ids": begin}


@torch.no_grad()
def run(model: Any, given: dict[str, torch.Tensor], way: dict[str, Any]) -> Ran:
    """``generate``, greedy."""
    torch.manual_seed(0)
    fixed = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**{k: v.clone() for k, v in given.items()}, **fixed, **way)
    cache = getattr(out, "past_key_values", None)
    return Ran(out.sequences, torch.stack([step.float() for step in out.logits]), held(cache))


def compressing(model: Any, ratio: float, basis: str = "joint") -> None:
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # models with graph breaks: past it, tokens are kept as they are
    lorc_fx.reset(model)
    given = {**lorc_fx.PAPER, "scheduler": "uniform", "ratio": ratio, "basis": basis, "inner": "eager"}
    model.compile(backend="lorc", options=given)


def dense(model: Any) -> None:
    model._compiled_call_impl = None


def held(cache: Any) -> list[tuple[str, bool]]:
    """Every key and value tensor of a cache: its name, and whether it is coded."""
    found = []
    for name in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, name):
            found += [(f"{name.partition('_')[0]} {part}", coded) for part, coded in held(getattr(cache, name))]
    for i, layer in enumerate(getattr(cache, "layers", None) or ()):
        for kind in ("keys", "values"):
            value = getattr(layer, kind, None)
            if isinstance(value, LatentKV) or (isinstance(value, torch.Tensor) and value.numel()):
                found.append((f"{kind} {i}", is_coded(value)))
    return found


def is_coded(value: torch.Tensor) -> bool:
    return isinstance(value, LatentKV) and value.tail is None


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error, relative to the largest wanted value."""
    if got.shape != want.shape:
        return float("inf")
    both = torch.isfinite(want)  # suppressed tokens
    return float((got - want)[both].abs().max() / want[both].abs().max().clamp_min(1e-30))


def project(model: Any, seen: Seen) -> list[str]:
    """Replace each effective weight's rows in the model's parameters by their projections; those not found."""
    lost = []
    with torch.no_grad():
        for key, weight in seen.weights.items():
            exact = weight.double()
            u = torch.linalg.svd(exact, full_matrices=False)[0][:, : seen.ranks[key]]
            if not _replace(model, weight, (u @ (u.T @ exact)).to(weight.dtype)):
                lost.append(f"{key[0]} {tuple(weight.shape)}")
    return lost


def _replace(model: Any, old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether all rows of ``old`` [n, d] lie in one parameter, as rows or columns; they are then ``new``. Heads
    that are repeated before they are cached are equal rows of both."""
    n, d = old.shape
    for parameter in model.parameters():
        if parameter.dim() < 2:
            continue
        flat = parameter.detach().reshape(parameter.shape[0], -1)
        for view in (flat, flat.T):
            if view.shape[1] != d:
                continue
            places = {row.tobytes(): i for i, row in enumerate(view.contiguous().cpu().numpy())}
            at = [places.get(row.tobytes()) for row in old.contiguous().cpu().numpy()]
            if all(i is not None for i in at):
                view[torch.tensor(at)] = new
                return True
    return False


def check(entry: zoo.Entry, ways: Sequence[str] = tuple(WAYS), basis: str = "joint") -> Row:
    """Some ways of running one class."""
    torch.set_num_threads(1)
    row: Row = {"class": entry.cls, "model_type": entry.model_type, "kind": entry.kind, "ways": {}}
    begin = time.perf_counter()
    try:
        model = entry.build()
    except Exception as error:
        return {**row, "not_built": said(error)}
    seen, given = Seen(), inputs(model)
    for name in ways if entry.kind != "vision" else ways[:1]:  # text alone: what the causal classes have shown
        if "prefill_chunk_size" in WAYS[name] and model.config.is_encoder_decoder:
            continue  # generate cuts the encoder's mask too
        row["ways"][name] = compared(model, partial(run, model, given, WAYS[name]), seen, basis)
    row |= {
        "sites": seen.sites,
        "misses": seen.misses,
        "said": seen.said,
        "lowered": seen.lowered,
        "seconds": time.perf_counter() - begin,
    }
    return row


def compared(model: Any, go: Callable[[], Ran], seen: Seen, basis: str = "joint") -> Row:
    """One way of running a model, eager and compiled: at full rank (or as it is, with ``basis`` "identity") and, where
    something is coded in a joint basis, at half the bytes."""
    dense(model)
    try:
        want = go()
    except Exception as error:
        return {"eager_fails": said(error)}
    try:
        compressing(model, 1.0, basis)
        with watching(seen):
            got = go()
        found: Row = {
            "error": far(got.logits, want.logits),
            "tokens": torch.equal(got.tokens, want.tokens),
            "cached": len(want.parts),
            "coded": sum(coded for _, coded in got.parts),
            "dense": [name for name, coded in got.parts if not coded],
        }
        if found["coded"] and basis == "joint":
            found |= _half(model, go)
        return found
    except Exception as error:
        return {"fails": said(error), "trace": traceback.format_exc(limit=-6)}
    finally:
        dense(model)


def _half(model: Any, go: Callable[[], Ran]) -> Row:
    """At half the bytes, beside the model with projected weights."""
    compressing(model, 0.5)
    seen = Seen()
    with watching(seen):
        got = go()
    dense(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lost = project(model, seen)
    try:
        if lost or seen.also:  # projecting the weight would change more than what is cached
            return {"half_not_checked": lost or sorted(seen.also)}
        if _lost_on_the_way(got, seen):
            return {"half_not_checked": "it goes on dense"}
        want = go()
        found = {"half_error": far(got.logits, want.logits), "half_tokens": torch.equal(got.tokens, want.tokens)}
        if found["half_error"] > TOLERANCE:
            model.double()
            found["half_rounding"] = far(go().logits, want.logits)
        return found
    finally:
        model.float()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])


def _lost_on_the_way(got: Ran, seen: Seen) -> bool:
    """Whether caches that began coded are dense at the end: what they got later was not projected."""
    for kind in ("key", "value"):
        coded = sum(done for name, done in got.parts if kind in name)
        if coded < sum(key[0] == kind for key in seen.weights):
            return True
    return not any(done for _, done in got.parts)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


# -- many classes ------------------------------------------------------------------------------------------------------


def _worker(work: Callable[[], Row], answers: Any) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    sys.stderr = sys.stdout = open("/dev/null", "w")  # noqa: SIM115
    answers.put(work())


def isolated(entry: zoo.Entry, limit: float = LIMIT_S, basis: str = "joint") -> Row:
    """``check`` in a process of its own."""
    died = {"class": entry.cls, "model_type": entry.model_type, "kind": entry.kind, "ways": {}}
    return apart(partial(check, entry, basis=basis), died, limit)


def apart(work: Callable[[], Row], died: Row, limit: float = LIMIT_S) -> Row:
    """What ``work`` gives in a process of its own, which may die or hang: then ``died``, and how."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_worker, args=(work, answers))
    process.start()
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=0.5)
            if not process.is_alive() and answers.empty():
                return {**died, "died": process.exitcode}
        return {**died, "died": f"longer than {limit} s"}
    finally:
        process.kill()
        process.join()


def main(argv: Sequence[str] | None = None) -> None:
    from concurrent.futures import ThreadPoolExecutor

    parser = argparse.ArgumentParser(description="Every decoder of transformers, right and coded.")
    parser.add_argument("--only", nargs="+", default=None, help="names of classes or model types")
    parser.add_argument("--show", action="store_true", help="print what was found as JSON and write nothing")
    parser.add_argument("--basis", default="joint", choices=("joint", "identity"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoders.json", help="rows of other classes stay in it")
    parser.add_argument("--docs", type=Path, default=None, help="write a page on the result here")
    args = parser.parse_args(argv)
    import transformers  # noqa: F401  (the processes are copies of this one)

    torch.set_num_threads(1)
    chosen = [e for e in zoo.entries() if not args.only or e.cls in args.only or e.model_type in args.only]
    here = machine()
    rows: dict[str, Row] = {}
    if args.only and not args.show and args.out.exists():
        rows = {f"{row['model_type']} {row['class']}": row for row in json.loads(args.out.read_text())["rows"]}
    result: dict[str, Any] = {"machine": here, "tolerance": TOLERANCE, "command": "python -m bench.decoders"}
    with ThreadPoolExecutor(args.jobs) as pool:
        for entry, row in zip(chosen, pool.map(partial(isolated, basis=args.basis), chosen), strict=True):
            rows[f"{entry.model_type} {entry.cls}"] = {**row, "date": machine()["date"]}
            print(f"{entry.kind} {entry.cls} ({row.get('seconds', 0):.0f} s): {verdict(row)}", flush=True)
            if not args.show:
                write_json(args.out, {**result, "rows": list(rows.values())})  # as it goes: the whole takes hours
    if args.show:
        print(json.dumps(list(rows.values()), indent=1, default=str))
    elif args.docs:
        args.docs.write_text(page({**result, "rows": list(rows.values())}))


if __name__ == "__main__":
    main()
