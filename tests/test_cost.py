"""The cost model against what is really moved and multiplied."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

from bench import lowerings
from helpers import cache_name, new_cache, prompt
from lorc_fx.device import DATASHEETS, datasheet, device_of, measured
from lorc_fx.kernels import native, reference, tiled
from lorc_fx.kernels.attend import Attend
from lorc_fx.options import Options
from lorc_fx.passes import cost
from lorc_fx.report import examined

DEVICE = cost.Device("a device", 1e11, 1e12, "made up")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", ["rows", "latent", "turned", "tiles"])
@pytest.mark.parametrize("shape", [(4, 4, 16), (8, 2, 32), (7, 1, 8)], ids=str)
def test_products_are_those_that_are_counted(how, shape, groups, monkeypatch):
    """By torch's own counter, on the form in torch ops. It does not see sums: unpacking and epilogues are left out."""
    monkeypatch.setattr(native, "library", lambda: None)
    heads, cached, dim = shape
    tokens, batch, n, groups = 100, 3, cached * dim, 1 if how == "rows" else min(groups, cached)
    (k, keys), (v, values) = (lowerings.operand(way, tokens, batch, cached, dim) for way in (how, "rows"))
    if groups > 1:
        k, keys = lowerings.operand(how, tokens, batch, cached, dim, groups)
    about = Attend(k, v, torch.fx.symbolic_trace(lambda scores: scores), ())
    query = torch.randn(batch, heads, 1, dim)
    with FlopCounterMode(display=False) as counter:
        tiled.attend(about, query, keys, values, ())
    width = k.latent_width
    sizes = {"B": batch, "T": tokens, "S": 1, "H": heads, "D": dim, "n": n, "k": width, "w": keys.rows.shape[2], "e": 4}
    sizes["g"] = groups
    given = {symbol: sizes[str(symbol)] for symbol in cost.SYMBOLS}
    products = {
        "rows": cost.B * cost.T * cost.READ_DENSE,
        "latent": cost.B * cost.T * cost.READ_LATENT + cost.B * cost.S * cost.H * 2 * cost.D * cost.k / cost.g,
        **dict.fromkeys(("turned", "tiles"), cost.B * cost.T * (cost.READ_DENSE + cost.DECODE)),
    }
    wanted = (products[how] + products["rows"]).subs(given)
    constants = 4 * batch * heads * (width + n)  # what ``half`` adds: one number per query
    assert wanted <= counter.get_total_flops() <= wanted + constants
    bytes_, flops, numbers = cost.counted(how, **sizes)
    assert numbers == batch * tokens * {"rows": n, "latent": width, "turned": width, "tiles": 4 * width + 6 * n}[how]
    assert flops >= products[how].subs(given)
    moved = keys.rows.numel() * keys.rows.element_size() + sum(t.numel() * 4 for t in keys.codec)
    assert bytes_ == moved


def test_what_takes_longest_counts():
    sizes = {"B": 1, "T": 1000, "S": 1, "H": 4, "D": 16, "n": 64, "k": 32, "w": 34, "e": 2}
    bytes_, flops, numbers = cost.counted("latent", **sizes)
    slow = cost.Device("slow memory", 1.0, 1e30, "")
    weak = cost.Device("weak", 1e30, 1.0, "")
    packed = cost.Device("slow to unpack", 1e30, 1e30, "", numbers=1.0)
    assert [cost.seconds("latent", d, **sizes) for d in (slow, weak, packed)] == [bytes_, flops, numbers]
    rows = cost.Device("slow to multiply rows", 1e30, 1.0, "", products=0.5)
    assert [
        cost.seconds(how, rows, **sizes) / cost.seconds(how, weak, **sizes) for how in ("latent", "rows", "dense")
    ] == [2, 2, 1]
    passing = cost.Device("slow ops", 1e30, 1e30, "", passed=1.0, fused=False)
    assert cost.seconds("tiles", passing, **sizes) == cost.counted("tiles", **sizes)[2]
    assert cost.seconds("rows", passing, **sizes) < 1, "one call unpacks, no op"
    one = cost.Device("a byte and a FLOP a second", 1.0, 1.0, "")
    ops = cost.Device("the same by ops", 1.0, 1.0, "", fused=False)
    for how, device in (("decoding", one), ("decoding", ops), ("tiles", ops)):
        moved, multiplied, _ = cost.counted(how, **sizes)
        assert cost.seconds(how, device, **sizes) == moved + multiplied, "ops that write their results one by one"
    assert cost.seconds("tiles", one, **sizes) == max(cost.counted("tiles", **sizes)[:2])
    halves = {**sizes, "g": 2}
    assert cost.seconds("latent", ops, **halves) < cost.seconds("latent", ops, **sizes)
    assert cost.seconds("latent", one, **halves) == cost.seconds("latent", one, **sizes), "kernels read all columns"
    called = cost.Device("slow to call", 1.0, 1.0, "", call=1e6)
    assert cost.seconds("latent", called, **sizes) == cost.seconds("latent", one, **sizes) + 5e5
    assert cost.seconds("dense", called, **sizes) == cost.seconds("dense", one, **sizes)
    with pytest.raises(KeyError):
        cost.counted("by magic", **sizes)


def test_grouped_heads_are_repeated_where_the_device_does_so():
    sizes = {"B": 1, "T": 1000, "S": 1, "H": 4, "D": 16, "n": 32, "k": 32, "w": 34, "e": 4}
    plain, repeats = (cost.Device("", 1.0, 1e30, "", fused=f) for f in (True, False))
    assert cost.seconds("dense", plain, **sizes) == 1000 * 32 * 4
    assert cost.seconds("dense", repeats, **sizes) == 1000 * 4 * (32 + 2 * 64)
    assert cost.seconds("dense", repeats, **{**sizes, "n": 64}) == 1000 * 64 * 4


def test_devices():
    here = measured(torch.device("cpu"), repeats=1)
    assert (
        here.source == "measured"
        and here.bandwidth > 1e8
        and here.flops > 1e8
        and 1e7 < here.numbers < 1e13
        and 0 < here.call < 1
        and 1e8 < here.products < 1e15
        and 1e7 < here.passed < 1e13
    )
    assert device_of(torch.device("cpu")) is device_of(torch.device("cpu")), "measured once"
    assert all("datasheet" in d.source and d.flops > d.bandwidth for d in DATASHEETS)


NAMES = {
    "NVIDIA A100-SXM4-80GB": 2.0e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA B200": 8.0e12,
    "AMD Instinct MI300X": 5.3e12,
    "NVIDIA A100-PCIE-40GB": None,
    "NVIDIA H100 PCIe": None,
    "NVIDIA H100 NVL": None,
    "NVIDIA H200 NVL": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA GB200": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_cards_of_one_family_differ(name):
    """Another memory, other figures: those are measured."""
    known = datasheet(name)
    assert (known and known.bandwidth) == NAMES[name]


@pytest.mark.parametrize(("name", "basis"), [("llama-gqa", "joint"), ("llama-gqa", "identity"), ("gpt2", "joint")])
def test_explain_says_how_long_a_step_takes(name, basis, clean):
    model = FAMILIES[name].build(layers=2)
    ids, mask = prompt(2, 9)
    given = {"attention_mask": mask, cache_name(model): new_cache(model), "use_cache": True}
    options = Options(ratio=0.3, scheduler="uniform", precision="int8", basis=basis, calibration="none")
    report = examined(model, (ids,), given, options)
    coded, dense = report.step_seconds(4096, device=DEVICE)
    assert 0 < coded and 0 < dense and "decode step" in str(report)
    assert {s.query_heads for s in report.sites} == {model.config.num_attention_heads}
    assert report.step_seconds(8192, device=DEVICE)[0] > 1.9 * coded
    if basis == "identity":
        assert coded < dense
    elif name == "llama-gqa":
        assert coded > dense, "joint rotary keys are decoded at each step"


def test_a_form_that_is_timed_is_the_reference():
    """What ``bench.lowerings`` calls is what it says."""
    torch.manual_seed(0)
    for how in ("rows", "latent", "turned", "tiles"):
        (k, keys), (v, values) = (lowerings.operand(way, 70, 2, 2, 16) for way in (how, "latent"))
        about = Attend(k, v, torch.fx.symbolic_trace(lambda scores: scores * 0.25), ())
        query = torch.randn(2, 6, 1, 16)
        got, want = (f(about, query, keys, values, ()).double() for f in (tiled.attend, reference.attend))
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5
