"""What each part of the codec is worth: loss on Gemma 3 270M with one part changed at a time.

    python -m bench.ablation --handbook FOLDER [--ratios 0.25 0.15] [--only NAME ...] [--out PATH]

Everything is in fp32 and outside of the graph: hooks on the projections put y through a codec and back, so what is
compared is the codec alone. Statistics and text are those of ``bench.quality``, with gradients; bytes are planned, the
same for all rows of a ratio, but that a token kept exactly ("slot") costs its dense bytes on top, once per text.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import lorc_fx
from bench.prompted import PIECE
from bench.quality import RESULTS, Text, read_text
from bench.run import command, machine
from bench.scoring import compared
from lorc_fx import allocate, calibration, gather, models, packing
from lorc_fx.allocate import DROPPED, Columns
from lorc_fx.calibration import SiteStatistics, basis_of, fingerprint
from lorc_fx.codec import Basis, Codec, make_codec, through
from lorc_fx.console import write_json
from lorc_fx.decoder import Decoder
from lorc_fx.factors import gram
from lorc_fx.packing import BITS, MODEL

Key = tuple[int, str]


@dataclass(frozen=True)
class Change:
    """What a row does otherwise. ``patches``: (module, name, value) while codecs are made and used; ``gathered``: also
    while statistics are; ``sinks``: "mean" as shipped, "none", "slot" (the first token is exact), or both; ``metric``:
    what columns are weighed by, gradients of the "loss", of "scores" (a forward pass), or nothing; ``rows``: texts that
    statistics are of, None for all; ``power``: of the energies, where they are no losses."""

    patches: tuple[tuple[Any, str, Any], ...] = ()
    gathered: tuple[tuple[Any, str, Any], ...] = ()
    levels: tuple[int, ...] = (MODEL, *BITS, DROPPED)
    sinks: str = "mean"
    metric: str = "loss"
    rows: int | None = None
    power: float = 1.0


CHANGES: dict[str, Change] = {
    "as shipped": Change(),
    "sinks: no mean of their own": Change(sinks="none"),
    "sinks: first token in a slot": Change(sinks="slot"),
    "sinks: slot and mean": Change(sinks="slot and mean"),
    "sinks: later ones in the statistics": Change(gathered=((gather, "SINK_NEAR", 0.0),)),
    "levels 8, 4": Change(levels=(MODEL, 8, 4, DROPPED)),
    "levels 8, 4, 2": Change(levels=(MODEL, 8, 4, 2, DROPPED)),
    "levels 8, 4, 3, 2": Change(levels=(MODEL, 8, 4, 3, 2, DROPPED)),
    "nothing is clipped": Change(patches=((packing, "CLIPS", (1.0,)),)),
    "blocks of 32 columns": Change(patches=((allocate, "BLOCK", 32),)),
    "no prior": Change(patches=((calibration, "PRIOR", 1e-6),)),
    "prior 0.1": Change(patches=((calibration, "PRIOR", 0.1),)),
    "G as it is": Change(patches=((calibration, "FLATTEN", 0.0),)),
    "G flattened by 0.1": Change(patches=((calibration, "FLATTEN", 0.1),)),
    "statistics of 2048 tokens": Change(rows=2),
    "statistics of 4096 tokens": Change(rows=4),
    "gradients of scores only": Change(metric="scores"),
    "no gradients": Change(metric=""),
    "no gradients, energies to the power 0.75": Change(metric="", power=0.75),
    "no gradients, energies to the power 0.5": Change(metric="", power=0.5),
}


@dataclass(eq=False)
class Bench:
    """The model in fp32, its text, and statistics gathered so far."""

    model: Any
    text: Text
    known: dict[Any, dict[Key, SiteStatistics]] = field(default_factory=dict)
    dense: torch.Tensor | None = None

    def __post_init__(self) -> None:
        layers = enumerate(self.model.model.layers)
        pairs = [(i, layer.self_attn) for i, layer in layers]
        self.modules: dict[Key, Any] = {(i, "key"): a.k_proj for i, a in pairs} | {
            (i, "value"): a.v_proj for i, a in pairs
        }

    def weight(self, site: Key) -> torch.Tensor:
        return self.modules[site].weight.detach().double()

    def statistics(self, change: Change) -> dict[Key, SiteStatistics]:
        key = (change.gathered, change.rows, change.metric == "scores")
        if key not in self.known:
            with patched(change.gathered):
                rows = self.text.calibration[: change.rows]
                made = lorc_fx.calibrate(self.model, rows, gradients=change.metric != "scores", progress=False)
            marks = {site: fingerprint(self.weight(site)) for site in self.modules}
            self.known[key] = {
                site: next(s for s in made.sites if s.is_of(site[1], len(s.total), mark))
                for site, mark in marks.items()
            }
        return self.known[key]

    def bases(self, change: Change) -> dict[Key, Basis]:
        found = {}
        for site, statistics in self.statistics(change).items():
            if not change.metric:
                statistics = replace(statistics, gradient=None)
            basis = basis_of(statistics, gram(self.weight(site), f"layer {site[0]} {site[1]}"))
            found[site] = basis if "mean" in change.sinks else replace(basis, means=basis.means[:1])
        return found

    @torch.no_grad()
    def loss(self, coders: dict[Key, Callable[[torch.Tensor], torch.Tensor]]) -> tuple[float, float]:
        """Nats, and the divergence KL(dense | coded) in nats, which has less noise; the first call must be dense.

        A large vocabulary's logits of all tokens, twice, are gigabytes: they are made in pieces of last states.
        """
        states, targets = self.states(coders), self.text.scored[0][1:]
        if self.dense is None:
            self.dense = states
        head, found = self.model.lm_head, []
        for exact, coded, want in zip(self.dense.split(PIECE), states.split(PIECE), targets.split(PIECE), strict=True):
            found.append(compared(head(exact), head(coded), want))
        _, nats, divergence = torch.cat(found, 1).mean(1).tolist()
        return nats, divergence

    def states(self, coders: dict[Key, Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        """The last hidden states [N, d] with every site put through its coder."""
        with self.coded(coders):
            row = self.text.scored[0]
            return self.model.model(input_ids=row[None, :-1], use_cache=False).last_hidden_state[0]

    @contextlib.contextmanager
    def coded(self, coders: dict[Key, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """In this block what a site projects (y [N, n], batches of one) is what its coder makes of it; sites without
        a coder are exact."""
        with contextlib.ExitStack() as hooks:
            for site, coder in coders.items():

                def hook(module: Any, args: Any, y: torch.Tensor, coder: Any = coder) -> torch.Tensor:
                    return coder(y[0]).to(y.dtype)[None]

                hooks.callback(self.modules[site].register_forward_hook(hook).remove)
            yield


@contextlib.contextmanager
def patched(patches: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value))
        allocate.distortion.cache_clear()  # measured on the quantiser, which may be patched
        stack.callback(allocate.distortion.cache_clear)
        yield


def measure(bench: Bench, change: Change, ratio: float) -> tuple[float, float]:
    """Loss and divergence with every key and value read back from its codec."""
    with patched(change.patches):
        bases = bench.bases(change)
        columns = [_columns(b, change) for b in bases.values()]
        dense = sum(2 * len(b.energy) for b in bases.values())
        plans = allocate.allocate(columns, math.floor(ratio * dense) - 4)  # 4: one position per token, for all sites
        coders = {}
        for (site, basis), segments in zip(bases.items(), plans, strict=True):
            codec = make_codec(bench.weight(site), None, basis, segments, NOWHERE, (), torch.bfloat16)
            coders[site] = _coder(codec, basis, "slot" in change.sinks)
        return bench.loss(coders)


def _columns(basis: Basis, change: Change) -> Columns:
    energy = basis.energy / 2 if basis.absolute else (basis.energy / basis.energy.sum()) ** change.power
    return Columns(tuple(energy.tolist()), change.levels, 2, len(basis.means), allocate.BLOCK)


def _coder(codec: Codec, basis: Basis, slot: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def coder(y: torch.Tensor) -> torch.Tensor:
        read = through(codec, basis, y)
        if slot:
            read[0] = y[0]
        return read

    return coder


#: no cache is written here
NOWHERE: Decoder = None  # type: ignore[assignment]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each part of the codec is worth.")
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.15])
    parser.add_argument("--only", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    model, tokenizer = models.load_model(None, dtype=torch.float32)
    bench = Bench(model, read_text(model, tokenizer, None, args.handbook, args.tokens))
    dense, _ = bench.loss({})
    about = {"model": models.DEMO_NAME, "dtype": "float32", "tokens": args.tokens, "dense_nats": dense}
    about |= {"calibration_tokens": sum(map(len, bench.text.calibration))}
    rows: list[dict[str, Any]] = []
    about |= {"command": command("ablation", argv)}
    for name in args.only:
        for ratio in args.ratios:
            begin = time.perf_counter()
            nats, divergence = measure(bench, CHANGES[name], ratio)
            added = nats / dense - 1
            rows.append({"change": name, "ratio": ratio, "nats": nats, "added": added, "divergence": divergence})
            told = f"{name} at {ratio}: {100 * added:+.2f} %, KL {divergence:.4f}"
            print(f"{told} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
        write_json(args.out, {"machine": machine(), **about, "rows": rows})


if __name__ == "__main__":
    main()
