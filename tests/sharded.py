"""Decoders whose keys and values are projected by shards: run in process groups by ``test_adapted_weights.py``.

python sharded.py WORLD RENDEZVOUS OUT
"""
# ruff: noqa: E402

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
bench = types.ModuleType("bench")  # as conftest.py does
bench.__path__ = [str(HERE.parent / "bench")]
sys.modules.setdefault("bench", bench)

import torch
import torch.distributed as dist
from adapted import FAMILY, IDS, MASK, UNIFORM
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lorc_fx
from helpers import compiled, error, generate
from lorc_fx.errors import LorcWarning
from lorc_fx.gather import Sums
from lorc_fx.latent import LatentKV


def column_shards(model: Any, mesh: Any) -> Any:
    """Heads over processes: each caches its own."""
    plan: dict[str, Any] = {}
    for i in range(len(model.model.layers)):
        plan |= {f"model.layers.{i}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan[f"model.layers.{i}.self_attn.o_proj"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan).requires_grad_(False)


def gathered(model: Any, mesh: Any) -> Any:
    """Weights in shards, but each process caches the keys and values of all."""
    for p in FAMILY.projections(model):
        p.module.weight = nn.Parameter(distribute_tensor(p.module.weight.data, mesh, [Shard(0)]), requires_grad=False)
        p.module.register_forward_pre_hook(lambda module, args: (DTensor.from_local(args[0], mesh, [Replicate()]),))
        p.module.register_forward_hook(lambda module, args, out: out.full_tensor())
    return model


def projected(model: Any, world: int, ranks: list[tuple[int, int]]) -> Any:
    """The oracle: the rows of each shard, projected onto their own leading singular vectors."""
    for p in FAMILY.projections(model):
        rank = ranks[p.layer][p.kind == "value"]
        cut = []
        for rows in p.weight.double().chunk(world):
            u = torch.linalg.svd(rows)[0][:, :rank]
            cut.append(u @ (u.T @ rows))
        p.set_weight(torch.cat(cut).float())
    return model


CASES = {
    "column shards": (column_shards, 1.0),
    "column shards, half": (column_shards, 0.5),
    "gathered": (gathered, 1.0),
}


def lopsided(rank: int, mesh: Any) -> dict[str, Any]:
    """A long prompt of which the last process gets no statistics: no process may count it as its first prompt, for
    those that do run the next one once and the others twice, in other collectives. Then one that gives them to all."""
    ids = torch.randint(1, 90, (2, 150), generator=torch.Generator().manual_seed(3))
    mask, model, found = torch.ones_like(ids), column_shards(FAMILY.build(), mesh), {}
    compiled(model, calibration="first-prompt", ratio=0.45)
    want = generate(FAMILY.build(), ids, mask, new=2)
    nothing = mock.patch.object(Sums, "add", lambda self, y, real: setattr(self, "finite", False))
    for name, patch in (("without", nothing), ("with", contextlib.nullcontext())):
        with patch if rank == mesh.size() - 1 else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = generate(model, ids, mask, new=2, forced=want.sequences)
        found[name] = {"error": error(got.logits, want.logits), "informed": len(lorc_fx.fidelity(model))}
    return found


def work(rank: int, world: int, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, (shard, ratio) in CASES.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = generate(compiled(shard(FAMILY.build(), mesh), **UNIFORM, ratio=ratio), IDS, MASK)
        pairs = [(layer.keys, layer.values) for layer in got.cache.layers]
        plain = FAMILY.build()
        if ratio < 1:
            plain = projected(plain, world, [(k.codec.rank, v.codec.rank) for k, v in pairs])
        want = generate(plain, IDS, MASK, forced=got.sequences if ratio < 1 else None)
        found[name] = {
            "error": error(got.logits, want.logits),
            "tokens": torch.equal(got.sequences, want.sequences),
            "coded": [isinstance(t, LatentKV) for pair in pairs for t in pair],
            "said": [str(w.message) for w in caught if issubclass(w.category, LorcWarning)],
        }
    if world > 1:
        told: list[Any] = [None] * world
        dist.all_gather_object(told, lopsided(rank, mesh))
        found["lopsided"] = told
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    world, meeting, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if world == 1:
        work(0, 1, meeting, out)
    else:
        torch.multiprocessing.spawn(work, (world, meeting, out), nprocs=world)


if __name__ == "__main__":
    main()
