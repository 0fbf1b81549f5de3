"""Quality at equal bytes: lorc beside what transformers and kvpress offer, on Gemma 3 270M in bf16.

    python -m bench.peers --handbook FOLDER [--only lorc] [--kvpress-venv FOLDER] [--out bench/results/peers.json]

Two protocols on the held-out text of ``bench.quality``. ``chunks``: fed in chunks of 32, so that the cache is read from
the first chunk on (transformers' QuantizedCache: pip install optimum-quanto hqq, the extra ``peers``; LoRC as
published, ``bench.straightforward``). ``prompt``: 2048 tokens in one piece, after which the rest is scored in one pass
(kvpress, in an environment of its own, which is made in ``--kvpress-venv`` if it is not there). Groups that are not
named in ``--only`` keep their rows in the file.

Bytes are those of keys and values shown, scales, zero points, positions and dense residual tokens included, and
``fraction`` is of the 16-bit cache of the same tokens. QuantizedCache refuses sliding windows; here it is told that all
layers have full attention: it then keeps every token of them (the model's masks still apply), and so does the dense
cache that it is compared with.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import kvpress_rows
from bench.environments import environment
from bench.peer_steps import quantized_cache, shown, stored, versions
from bench.prompted import prompted
from bench.quality import METHODS, RESULTS, Text, calibrations, read_text
from bench.run import command, machine
from bench.straightforward import straightforward
from lorc_fx import models
from lorc_fx.console import write_json
from lorc_fx.evaluate import cache_keyword, chunked_loss, compressed

TOKENS, CHUNK, PROMPT = 4096, 32, 2048
COMPRESSIONS = (0.5, 0.75, 0.9)
#: of lorc in the prompt protocol; in chunks it gets the bytes of each quantized cache
RATIOS = (0.5, 0.25, 0.1)
LORC = ("calibrated", "calibrated with gradients")
AUTO = "calibrated, auto"
#: of LoRC as published
PUBLISHED = 0.5

#: backend -> setting -> arguments of QuantizedCache. KIVI's axes (keys by channel, values by token) need groups that
#: divide the first chunk. hqq's other axis groups tokens far apart; its 3 bits fail where 10 does not divide the rows.
QUANTIZED: dict[str, dict[str, dict[str, Any]]] = {
    "quanto": {
        "int4": {"nbits": 4},
        "int2": {"nbits": 2},
        "int4, keys by channel": {"nbits": 4, "axis_key": -1, "axis_value": 0, "q_group_size": 32},
        "int2, keys by channel": {"nbits": 2, "axis_key": -1, "axis_value": 0, "q_group_size": 32},
    },
    "hqq": {f"int{bits}": {"nbits": bits, "axis_key": 1, "axis_value": 1} for bits in (8, 4, 2)},
    "fp8": {"e4m3": {}},
}
PACKAGES = {"quanto": ("optimum-quanto",), "hqq": ("hqq",)}
Row = dict[str, Any]


class Setup(NamedTuple):
    """The model, what it is scored on and calibrated on, the command line's options, and the rows there are."""

    model: Any
    text: Text
    options: argparse.Namespace
    rows: list[Row]

    @property
    def ids(self) -> torch.Tensor:
        """The scored ids [1, tokens + 1]."""
        return self.text.scored[0][None]


def in_chunks(setup: Setup, cache: Any, count: Callable[[Any], dict[str, int]] = shown) -> Row:
    """Loss and bytes with this cache, fed in chunks."""
    loss = chunked_loss(setup.model, setup.ids[0], CHUNK, cache=cache)
    return {"protocol": "chunks", "nats": loss.nats, **count(cache)}


def after_prompt(setup: Setup) -> Row:
    """Loss of the continuation of a prompt in one piece, and bytes after the prompt."""
    cache = dense_cache(setup)
    found = prompted(setup.model, setup.ids, setup.options.prompt, cache, shown, cache_keyword(setup.model))
    return {"protocol": "prompt", "nats": found.nats, **found.prompt_bytes}


def dense_cache(setup: Setup) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=setup.model.config)


def dense(setup: Setup) -> Iterator[Row]:
    """What everything else is compared with; ``all tokens``: without regard to sliding windows."""
    from transformers import DynamicCache

    yield {"setting": "", **in_chunks(setup, dense_cache(setup))}
    yield {"setting": "all tokens", **in_chunks(setup, DynamicCache())}
    yield {"setting": "", **after_prompt(setup)}


def static(setup: Setup) -> Iterator[Row]:
    """transformers' StaticCache, with room for the text: its loss is the dense one's but for rounding."""
    from transformers import StaticCache

    cache = StaticCache(config=setup.model.config, max_cache_len=setup.ids.shape[1])
    yield {"setting": "", **in_chunks(setup, cache)}


def published(setup: Setup) -> Iterator[Row]:
    """LoRC as published, by the straightforward implementation."""
    with straightforward(setup.model, PUBLISHED):
        for measure in (lambda: in_chunks(setup, dense_cache(setup)), lambda: after_prompt(setup)):
            yield {"setting": f"{PUBLISHED:g}", **measure()}


def quantized(backend: str) -> Callable[[Setup], Iterator[Row]]:
    """transformers' QuantizedCache with this backend."""

    def measure(setup: Setup) -> Iterator[Row]:
        for setting, given in QUANTIZED[backend].items():
            cache = quantized_cache(setup.model.config, {"backend": backend, **given})
            yield {"setting": setting, "given": given, **in_chunks(setup, cache, stored)}

    return measure


def lorc(setup: Setup) -> Iterator[Row]:
    """Our own: in chunks at the bytes of each quantized cache, and after a prompt."""
    peers = {row["fraction"] for row in setup.rows if row["peer"] in QUANTIZED}
    matched = sorted({math.floor(1000 * fraction) / 1000 for fraction in peers} or RATIOS, reverse=True)
    cases = [("chunks", ratio) for ratio in matched] + [("prompt", ratio) for ratio in RATIOS]
    for method, known in calibrations(setup.model, setup.text, LORC, setup.options.model).items():
        for protocol, ratio in cases:
            with compressed(setup.model, {**METHODS[method], "ratio": ratio, "inner": "eager", "calibration": known}):
                found = in_chunks(setup, dense_cache(setup)) if protocol == "chunks" else after_prompt(setup)
            yield {"setting": f"{method}, {ratio:g}", **found}


def default(setup: Setup) -> Iterator[Row]:
    """Our own with the options that a user gets who gives a calibration and no more, at the bytes of LoRC as published
    and of hqq's four bits: what ``bench.peers_run`` times."""
    known = calibrations(setup.model, setup.text, (AUTO,), setup.options.model)[AUTO]
    hqq = [row["fraction"] for row in setup.rows if (row["peer"], row["setting"]) == ("hqq", "int4")]
    for ratio in (PUBLISHED, *(math.floor(1000 * fraction) / 1000 for fraction in hqq)):
        with compressed(setup.model, {"ratio": ratio, "inner": "eager", "calibration": known}):
            yield {"peer": "lorc", "setting": f"{AUTO}, {ratio:g}", **in_chunks(setup, dense_cache(setup))}


def kvpress(setup: Setup) -> Iterator[Row]:
    """Presses, in an environment with an older transformers."""
    python = environment(setup.options.kvpress_venv, kvpress_rows.REQUIREMENTS)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.json"), Path(folder, "out.json")
        checkpoint = Path(setup.options.model or models.demo_checkpoint()).expanduser()
        given = {"checkpoint": str(checkpoint), "ids": setup.ids[0].tolist(), "prompt": setup.options.prompt}
        given |= {"dtype": str(setup.model.dtype).removeprefix("torch."), "compressions": COMPRESSIONS}
        source.write_text(json.dumps(given))
        command = [python, "-m", "bench.kvpress_rows", source, target]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        found = json.loads(target.read_text())
    for row in found["rows"]:
        yield {**row, "protocol": "prompt", "versions": found["versions"]}


GROUPS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "dense": dense,
    "static": static,
    "straightforward": published,
    **{backend: quantized(backend) for backend in QUANTIZED},
    "kvpress": kvpress,
    "lorc": lorc,
    "default": default,
}


def compared(row: Row, rows: Sequence[Row]) -> Row:
    """``row`` with the loss added to, and the fraction of, the dense run of its protocol that keeps the same tokens."""
    kept = "all tokens" if row["peer"] in QUANTIZED or row["setting"] == "all tokens" else ""
    same = ("dense", row["protocol"], kept)
    base = next(r for r in [*rows, row] if (r["peer"], r["protocol"], r["setting"]) == same)
    fraction = row["bytes"] / base["bytes"]
    return {**row, "added": row["nats"] / base["nats"] - 1, "dense_bytes": base["bytes"], "fraction": fraction}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality at equal bytes, beside other packages.")
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--model", default=None, help="a local checkpoint (default: the demo's model)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--kvpress-venv", type=Path, default=models.cache_root() / "kvpress-venv")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    model, tokenizer = models.load_model(args.model)
    text = read_text(model, tokenizer, args.model, args.handbook, args.tokens)
    measured = {"model": args.model or models.DEMO_NAME, "dtype": str(model.dtype).removeprefix("torch.")}
    measured |= {"tokens": args.tokens, "chunk": CHUNK, "prompt": args.prompt}
    result: dict[str, Any] = {**measured, "groups": {}, "rows": []}
    if args.out.exists():
        old = json.loads(args.out.read_text())
        if {key: old.get(key) for key in measured} == measured:
            result = old
        else:
            print(f"{args.out} was measured otherwise: all its rows are replaced", file=sys.stderr)
    setup = Setup(model, text, args, result["rows"])
    for group in [name for name in GROUPS if name in args.only or (name == "dense" and not result["rows"])]:
        fresh: list[Row] = []
        begin = time.perf_counter()
        others = [row for row in result["rows"] if row["group"] != group]
        for row in GROUPS[group](setup):
            row = compared({"group": group, "peer": group, **row}, [*others, *fresh])
            fresh.append(row)
            seconds, begin = time.perf_counter() - begin, time.perf_counter()
            told = f"{row['fraction']:.3f} of the bytes, {100 * row['added']:+.2f} %"
            print(f"{row['peer']} {row['setting']} ({row['protocol']}): {told} ({seconds:.0f} s)", file=sys.stderr)
        result["rows"][:] = [compared(row, [*others, *fresh]) for row in [*others, *fresh]]
        result["groups"][group] = {"machine": machine(), "versions": versions(PACKAGES.get(group, ()))}
        result["groups"][group]["command"] = command("peers", argv)
        write_json(args.out, result)


if __name__ == "__main__":
    main()
