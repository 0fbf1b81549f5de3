"""Saved plans: complete by themselves, bit-equal, readable, and refused with a reason where they do not fit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from calibrating import quiet, text
from families import FAMILIES

import lorc_fx
from helpers import compiled, latents, new_cache, piecewise
from lorc_fx import calibration, plan_file
from lorc_fx.errors import BadPlan
from lorc_fx.packing import MODEL, Segment
from lorc_fx.records import Plan

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")
IDS = text(rows=2, tokens=12, seed=8)
#: what is compared: every field of a codec that holds numbers
FIELDS = ("encode", "shift", "offsets", "spread", "decode", "mean")


def build(name="llama-gqa", layers=2, **more):
    return FAMILIES[name].build(layers=max(layers, FAMILIES[name].fewest), **more)


def cache_of(model, **options):
    """The cache after a prompt in two pieces, under ``options``."""
    cache = new_cache(model, "dynamic", 12)
    piecewise(compiled(model, **options), IDS, cache, [5, 12])
    return [x for pair in latents(cache) for x in pair]


def made(tmp_path, name="llama-gqa", gradients=False, **options):
    """A model, a calibration of it, and the path of a plan made with that."""
    model = build(name)
    known = quiet(copy.deepcopy(model), [text(rows=8, tokens=32)], gradients=gradients)
    options = {"ratio": 0.06, "calibration": known, **options}
    lorc_fx.make_plan(copy.deepcopy(model), IDS, options=options).save(tmp_path / "plan.json")
    return model, options, tmp_path / "plan.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One plan for all who only read it: the options that made it, and its path."""
    _, options, path = made(tmp_path_factory.mktemp("saved"))
    return options, path


@pytest.fixture
def path(saved, tmp_path):
    """A copy of it, to be spoilt."""
    for file in saved[1].parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "plan.json"


def forbidden(*args, **kwargs):
    raise AssertionError("the plan holds this already")


@pytest.mark.parametrize(
    ("name", "gradients"), [("llama-gqa", False), ("llama-gqa", True), ("gpt2", False), ("gemma3", False)]
)
def test_a_plan_alone_gives_the_codecs_that_made_it(name, gradients, tmp_path, monkeypatch):
    """Bit-equal codecs and caches without statistics, and without any factorisation."""
    model, options, path = made(tmp_path, name, gradients)
    want = cache_of(copy.deepcopy(model), **options)
    monkeypatch.setattr(torch.linalg, "eigh", forbidden)
    monkeypatch.setattr(calibration, "basis_of", forbidden)
    got = cache_of(copy.deepcopy(model), plan=str(path))
    assert any(x.codec.rank < x.codec.width for x in got)
    for a, b in zip(got, want, strict=True):
        assert a.codec is not b.codec and a.codec.format == b.codec.format
        for field in FIELDS:
            one, two = getattr(a.codec, field), getattr(b.codec, field)
            assert (one is None and two is None) or torch.equal(one, two), field
        assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_a_round_trip_changes_nothing(gradients, tmp_path):
    """Equal and of one hash, the codec's tensors apart where the basis is not orthonormal (without gradients keys have
    the metric of their scores), once where it is."""
    model, options, path = made(tmp_path, gradients=gradients)
    plan = lorc_fx.make_plan(copy.deepcopy(model), IDS, options=options)
    again = Plan.load(path)
    assert again == plan and hash(again) == hash(plan) and {again: 1}[plan] == 1
    for site, b in zip(again.sites, again.bases, strict=True):
        assert ("synthesis" in b.tensors()) == (gradients or site.kind == "key") and b.basis.absolute == gradients
    assert [b.columns for b in again.bases] == [s.rank for s in again.sites]
    assert plan.nats == gradients and plan.predicted == pytest.approx(sum(s.predicted for s in plan.sites))
    given = lorc_fx.make_plan(copy.deepcopy(model), IDS, options={"plan": again})
    assert given == plan, "planning by a plan is that plan"
    other = replace(plan, bases=plan.bases[1:] + plan.bases[:1])
    assert other != plan, "plans of other tensors are other plans"


def test_the_papers_plan_is_json_alone(tmp_path):
    """Readable: a line per site, sorted keys; and no tensors, since the weights say it all."""
    plan = lorc_fx.make_plan(build(), IDS, options={"ratio": 0.5})
    plan.save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"] and plan.bases == ()
    lines = (tmp_path / "plan.json").read_text().splitlines()
    sites = [json.loads(line.rstrip(",")) for line in lines if '"layer"' in line]
    assert len(sites) == len(plan.sites) and all(list(s) == sorted(s) for s in sites)
    assert Plan.load(tmp_path / "plan.json") == plan


def test_version_2_is_still_read(tmp_path):
    site = '{"layer": 0, "kind": "key", "width": 8, "segments": [[4, "model"]], "choices": 1, "bytes": 16, '
    site += '"dense_bytes": 32, "window": null, "cond": 2.5}'
    (tmp_path / "old.json").write_text(f'{{"lorc_fx_plan": 2, "sites": [\n{site}\n]}}\n')
    plan = Plan.load(tmp_path / "old.json")
    assert plan.sites[0].segments == (Segment(4, MODEL),) and plan.predicted is None and plan.bases == ()


def test_version_3_is_still_read(path):
    """Of plans with tensors: no line said whether the site is projected, and all were."""
    want, data = Plan.load(path), json.loads(path.read_text())
    data["lorc_fx_plan"] = 3
    assert all(line.pop("projected") for line in data["sites"])
    path.write_text(json.dumps(data))
    assert Plan.load(path) == want and want.bases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plan_fits_its_weights_in_another_dtype(dtype, path):
    want = Plan.load(path).ranks
    got = cache_of(build().to(dtype), plan=path)
    assert [x.codec.rank for x in got] == [want[i, kind] for i in range(2) for kind in ("key", "value")]
    assert all(x.codec.dtype == dtype for x in got)


def test_a_plan_serves_another_process(path, tmp_path):
    """The same bits as here, from the two files alone."""
    want = [x.codes for x in cache_of(build(), plan=path)]
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "import test_plan_file as t\n"
        "found = [x.codes for x in t.cache_of(t.build(), plan=sys.argv[2])]\n"
        "torch.save(found, sys.argv[3])\n"
    )
    arguments = [os.path.dirname(__file__), str(path), str(tmp_path / "codes.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=120)
    got = torch.load(tmp_path / "codes.pt", weights_only=True)
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_new_file_under_an_old_name_is_followed(saved, path):
    """Codecs go by what a plan says: the path is read anew at each compile."""
    model = build()
    first = [x.codec.format for x in cache_of(model, plan=str(path))]
    lorc_fx.make_plan(copy.deepcopy(model), IDS, options={**saved[0], "ratio": 0.5}).save(path)
    assert [x.codec.format for x in cache_of(model, plan=str(path))] != first


def test_weights_of_one_layer_changed_in_place(path):
    """A plan without statistics follows them, site by site; one with statistics is refused."""
    model = build()
    plain = lorc_fx.make_plan(copy.deepcopy(model), IDS, options={"ratio": 0.5})
    cache_of(model, plan=plain)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(1.0)
        piecewise(model, IDS, new_cache(model, "dynamic", 12), [12])
        for name, p in model.named_parameters():
            p.copy_(before[name])
        compiled(model, plan=path)
        piecewise(model, IDS, new_cache(model, "dynamic", 12), [12])
        model.model.layers[0].self_attn.k_proj.weight.add_(1.0)
        with pytest.raises(BadPlan, match="layer 0 key has other weights"):
            piecewise(model, IDS, new_cache(model, "dynamic", 12), [12])


# -- what is refused ---------------------------------------------------------------------------------------------------


def edited(path, old, new):
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new, 1))


def cut(path):
    beside = plan_file.tensor_path(path)
    beside.write_bytes(beside.read_bytes()[:-100])


def flipped(path):
    beside = plan_file.tensor_path(path)
    data = bytearray(beside.read_bytes())
    data[-9] ^= 1
    beside.write_bytes(data)


def swapped(path):
    """The tensors of a plan of the same sites and other bytes."""
    plan = Plan.load(path)
    bases = tuple(replace(b, basis=replace(b.basis, energy=b.basis.energy * 2)) for b in plan.bases)
    replace(plan, bases=bases).save(path.with_name("other.json"))
    plan_file.tensor_path(path.with_name("other.json")).replace(plan_file.tensor_path(path))


BAD = {
    "no tensor file": (lambda path: plan_file.tensor_path(path).unlink(), "plan.safetensors is missing"),
    "a tensor file cut off": (cut, "plan.safetensors cannot be read"),
    "a tensor file of another plan": (swapped, "of another plan"),
    "a bit flipped": (flipped, "of another plan"),
    "another version": (lambda path: edited(path, '"lorc_fx_plan": 4', '"lorc_fx_plan": 5'), "5, not 2 or 3 or 4"),
    "no version": (lambda path: path.write_text("{}"), "version None"),
    "no JSON": (lambda path: path.write_text("PK"), "cannot be read as a plan"),
    "a list": (lambda path: path.write_text("[]"), "cannot be read as a plan"),
    "a bad segment": (lambda path: edited(path, '"segments": [[', '"segments": [["x", 5], ['), "is not .columns"),
    "an unknown field": (lambda path: edited(path, '"layer": 1', '"layer": 1, "color": 1'), "color"),
    "a site that has no tensors": (lambda path: edited(path, '"layer": 1', '"layer": 7'), r"'7\.(key|value)'"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_plan_are_refused(name, path):
    spoil, words = BAD[name]
    Plan.load(path)
    spoil(path)
    with pytest.raises(BadPlan, match=words) as raised:
        Plan.load(path)
    assert str(path) in str(raised.value) and "lorc_fx.make_plan" in str(raised.value)


def refused(model, plan, words):
    with pytest.raises(BadPlan, match=words), torch.no_grad():
        compiled(model, plan=plan)(IDS, use_cache=True)


def test_plans_of_other_models_are_refused(path):
    plan = Plan.load(path)
    refused(build(seed=9), plan, "has other weights than the plan was made for")
    refused(build(layers=3), plan, "no rank for layer 2 ")
    refused(build(layers=1), plan, "sites that this model lacks")
    site = plan.sites[0]
    more = replace(site, segments=(Segment(site.rank + 1, MODEL),))
    refused(build(), replace(plan, sites=(more, *plan.sites[1:])), "its tensor file holds")
    with pytest.raises(BadPlan, match=f"{site.name} twice"):
        replace(plan, sites=(site, site), bases=plan.bases[:2]).save(path.with_name("twice.json"))


def test_fewer_columns_than_planned_are_no_trouble(path):
    """The lines are there to be edited: the first columns are the best. (Keys are in two groups here, so by twos.)"""
    plan = Plan.load(path)
    sites = [replace(s, segments=(Segment(4, 8),)) if (s.layer, s.kind) == (0, "key") else s for s in plan.sites]
    got = cache_of(build(), plan=replace(plan, sites=tuple(sites)))
    assert got[0].codec.rank == 4


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_write_that_fails_leaves_the_old_pair_or_one_that_is_refused(name, saved, path, tmp_path, monkeypatch):
    """Cut off before either file is in place; nothing half-written stays."""
    old = Plan.load(path)
    new = lorc_fx.make_plan(build(), IDS, options={**saved[0], "ratio": 0.5})
    whole = plan_file.Path.replace

    def crash(self, target):
        if target.name == name:
            raise KeyboardInterrupt
        return whole(self, target)

    monkeypatch.setattr(plan_file.Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        new.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    if name == "plan.safetensors":
        assert Plan.load(path) == old
    else:
        with pytest.raises(BadPlan, match="of another plan"):
            Plan.load(path)
    monkeypatch.undo()
    new.save(path)
    assert Plan.load(path) == new
