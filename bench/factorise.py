"""Codecs of every layer of Llama 3 8B and 70B shapes: seconds, accuracy and memory, next to numpy's SVD.

    python -m bench.factorise [--shapes 8B 70B] [--dtypes bfloat16 float32] [--layers N] [--threads 1]

A process per shape and dtype makes random weights of one layer at a time (columns scaled, so that singular values fall)
and does what the backend does: singular values for the plan, then vectors and the codec, half of the columns in the
model's dtype. On a few layers numpy.linalg.svd of the same weight takes turns with it; the one in fp64 is the truth.
Ratios are of the process' own seconds, as other work on the machine stretches those of the wall. ``extra_bytes``: the
most that a site's work took on top of its weights, the codec included (``VmHWM``, Linux).

``backend``: model.compile(backend="lorc") of all layers with these keys and values (other weights are shared by all
layers, or narrow); here ``extra_bytes`` of the first call leave out the codecs, and have what tracing takes and what
the C heap leaves unused between them. Nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.resident import reset_peak, resident
from bench.run import RESULTS, machine
from lorc_fx import PAPER
from lorc_fx.codec import Codec, prior_basis
from lorc_fx.console import write_json
from lorc_fx.decoder import Decoder
from lorc_fx.errors import QualityWarning
from lorc_fx.factors import factorise, gram, spectrum
from lorc_fx.packing import MODEL, Segment
from lorc_fx.prepared import Prepared
from lorc_fx.records import PlannedSite

DECADES = 2.0  # over which a weight's columns fall
COMPARED = 3  # layers whose weights numpy decomposes too


class Shape(NamedTuple):
    """Sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    cached: int = 8
    head_dim: int = 128

    @property
    def width(self) -> int:
        return self.cached * self.head_dim

    def layer_bytes(self, element: int) -> int:
        """Of a decoder layer's matrices."""
        return (2 * self.hidden + 2 * self.width + 3 * self.intermediate) * self.hidden * element


SHAPES = {"8B": Shape(32, 4096, 14336, 32), "70B": Shape(80, 8192, 28672, 64)}


class Flat(torch.nn.Module):
    """The epilogue of a cache [B, T, n]: none."""

    def forward(self, y: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return y


def weight_of(shape: Shape, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, d]."""
    generator = torch.Generator().manual_seed(seed)
    falling = torch.logspace(0, -DECADES, shape.hidden)
    return torch.randn(shape.width, shape.hidden, generator=generator).mul_(falling).to(dtype)


def coded(weight: torch.Tensor, decoder: Decoder) -> Codec:
    """A site as ``Builder`` has it: before the plan, and after it."""
    found = spectrum(gram(weight, "a site"))
    site = Prepared("a site", weight, None, found, prior_basis(found, None))
    n = len(weight)
    line = PlannedSite(0, "key", n, (Segment(n // 2, MODEL),), 1, 0, 0, None, found.condition)
    return site.codec(line, decoder, (), weight.dtype)


class Clock:
    """Seconds of the wall and of this process, by what was done."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def run(self, what: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        made = work()
        self.wall.setdefault(what, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(what, []).append(time.process_time() - cpu)
        return made


def layer_by_layer(shape: Shape, dtype: torch.dtype, layers: int) -> dict[str, Any]:
    """Runs in a process of its own."""
    decoder = Decoder(torch.fx.symbolic_trace(Flat()), shape.width, ("B", "T", shape.width), dtype, None, "none")
    coded(torch.randn(64, 64).to(dtype), decoder)  # libraries are loaded
    clock, extra, off, captured = Clock(), 0, 0.0, 0.0
    compared = {round(i * (layers - 1) / max(COMPARED - 1, 1)) for i in range(COMPARED)}
    for layer in range(layers):
        for kind in range(2):
            weight = weight_of(shape, 2 * layer + kind, dtype)
            before = reset_peak()
            codec = clock.run("codec", lambda w=weight: coded(w, decoder))  # type: ignore[misc]
            extra = max(extra, resident("VmHWM") - before)
            del codec
            if layer in compared:
                found = clock.run("factorise", lambda w=weight: factorise(w, "a site"))  # type: ignore[misc]
                single, double = weight.float().numpy(), weight.double()
                clock.run("svd fp32", lambda w=single: np.linalg.svd(w, full_matrices=False))  # type: ignore[misc]
                truth = clock.run("svd fp64", lambda w=double: np.linalg.svd(w.numpy(), full_matrices=False))  # type: ignore[misc]
                values = torch.from_numpy(truth[1])
                off = max(off, float((found.singular - values).abs().max() / values[0]))
                half = found.left[:, : shape.width // 2].T @ double
                kept = values[: shape.width // 2].square().sum()
                captured = max(captured, abs(float((half.square().sum() - kept) / values.square().sum())))
    element = dtype.itemsize
    return {
        "layers": layers,
        "width": shape.width,
        "hidden": shape.hidden,
        "condition": float(found.condition),
        "codecs_s": sum(clock.wall["codec"]),
        "codecs_cpu_s": sum(clock.cpu["codec"]),
        "median_s": {k: statistics.median(v) for k, v in clock.wall.items()},
        "median_cpu_s": {k: statistics.median(v) for k, v in clock.cpu.items()},
        "codec_to_svd": {k: ratio(clock.cpu, "codec", k) for k in ("svd fp32", "svd fp64")},
        "factorise_to_svd": {k: ratio(clock.cpu, "factorise", k) for k in ("svd fp32", "svd fp64")},
        "compared_sites": len(clock.wall["factorise"]),
        "singular_error": off,
        "captured_error": captured,
        "extra_bytes": extra,
        "keys_and_values_bytes": 2 * shape.width * shape.hidden * element,
        "layer_bytes": shape.layer_bytes(element),
    }


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Of medians of the process' own seconds: other work on the machine does not count."""
    return statistics.median(times[one]) / statistics.median(times[other])


def backend(shape: Shape, dtype: torch.dtype, layers: int) -> dict[str, Any]:
    """Runs in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorc_fx.backend import reset_timings, timings
    from lorc_fx.store import STORE

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=shape.hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.cached,
        head_dim=shape.head_dim,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).eval().requires_grad_(False)
    shared = torch.nn.Parameter(torch.randn(shape.hidden, shape.hidden, dtype=dtype) / shape.hidden, False)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight = layer.self_attn.o_proj.weight = shared
        for j, part in enumerate((layer.self_attn.k_proj, layer.self_attn.v_proj)):
            part.weight = torch.nn.Parameter(weight_of(shape, 2 * i + j, dtype), False)
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.is_meta:
                setattr(module, name, torch.nn.Parameter(torch.ones(tensor.shape, dtype=dtype) * 0.01, False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.compile(backend="lorc", options={**PAPER, "ratio": 0.5, "scheduler": "uniform", "inner": "eager"})
    reset_timings()
    before, begin = reset_peak(), time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings(category=QualityWarning, action="ignore"):
        model(torch.ones(1, 4, dtype=torch.long), use_cache=True)
    codecs = sum(codec.nbytes() for codec in STORE.codecs(model.parameters()))
    return {
        "layers": layers,
        "first_call_s": time.perf_counter() - begin,
        "factorise_s": timings()["factorise_s"],
        "plan_s": timings()["plan_s"],
        "codec_bytes": codecs,
        "extra_bytes": resident("VmHWM") - before - codecs,
        "layer_bytes": shape.layer_bytes(dtype.itemsize),
    }


RUNS = {"layer by layer": layer_by_layer, "backend": backend}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Codecs of all layers of Llama 3 8B and 70B shapes.")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "factorise.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        torch.set_num_threads(args.threads)
        run, name, dtype = args.child
        shape = SHAPES[name]
        print(json.dumps(RUNS[run](shape, getattr(torch, dtype), args.layers or shape.layers)))
        return
    result: dict[str, Any] = {"threads": args.threads, "rows": []}
    libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # torch's, and those of numpy
    environment = os.environ | dict.fromkeys(libraries, str(args.threads))
    for run in args.runs:
        for name in args.shapes:
            for dtype in args.dtypes if run == "layer by layer" else args.dtypes[:1]:
                command = [sys.executable, "-m", "bench.factorise", "--child", run, name, dtype]
                command += ["--threads", str(args.threads), *(["--layers", str(args.layers)] if args.layers else [])]
                where = machine()
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                row = {"run": run, "shape": name, "dtype": dtype, "machine": where}
                result["rows"].append(row | json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
                write_json(args.out, result)


if __name__ == "__main__":
    main()
