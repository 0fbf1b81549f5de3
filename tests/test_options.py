"""Options: defaults, every refusal, hashing."""

import copy
import dataclasses
import json
import pickle
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorc_fx import Calibration, errors
from lorc_fx.options import CHOICES, PAPER, Options
from lorc_fx.packing import MODEL, Segment
from lorc_fx.records import Plan, PlannedSite, SiteSpec


@dataclasses.dataclass(frozen=True)
class FakePlan:
    ranks: tuple[int, ...] = (1, 2)
    bases: tuple[int, ...] = ()


def site(layer=0, dense=512, fixed=4, window=None):
    return SiteSpec(layer, "key", dense // 2, 2, fixed, dense, 10.0, (1.0,) * (dense // 2), window)


def test_defaults_learn_from_the_first_prompt():
    options = Options.parse(None)
    assert options == Options.parse({}) == Options()
    assert options.ratio == 0.45 and options.bytes_per_token is None
    assert (options.calibration, options.scheduler, options.precision) == ("first-prompt", "loss", "auto")
    paper = Options.parse(PAPER)
    assert {name: getattr(paper, name) for name in PAPER} == dict(PAPER)
    assert paper == Options(calibration="none", basis="joint"), "without data the defaults are the paper's"
    assert (options.basis, options.objective) == ("auto", "balanced")
    assert options.inner == "inductor" and options.strict is False


def backend(gm, inputs):
    return gm


GOOD = [
    {"ratio": 1},
    {"ratio": 1e-4},
    {"ratio": Fraction(1, 3)},
    {"ratio": None, "bytes_per_token": 4096},
    {"scheduler": "uniform"},
    {"scheduler": "energy"},
    {"d_min": 1, "d_max": 1},
    {"d_min": 7, "protect_first": 2, "protect_last": 1},
    {"mode": "max-autotune"},
    {"mode": None},
    {"mode": "default", "inner": "eager"},
    {"basis": ("joint", "joint")},
    {"basis": "identity"},
    *[{"objective": o} for o in ("balanced", "bytes", "time")],
    {"basis": ("identity", "joint")},
    {"inner": "eager"},
    {"inner": "aot_eager"},
    {"inner": backend},
    {"plan": FakePlan()},
    {"strict": True},
    {"scheduler": "loss"},
    *[{"precision": p} for p in ("int8", "int4", "auto")],
    {"calibration": Calibration(())},
    {"calibration": "first-prompt"},
    {"scheduler": None},
]


@pytest.mark.parametrize("options", GOOD, ids=[f"{i}-{'-'.join(o)}" for i, o in enumerate(GOOD)])
def test_accepted(options):
    parsed = Options.parse(options)
    assert hash(parsed) == hash(Options.parse(dict(options)))
    assert Options.parse(parsed) == parsed
    assert {parsed: 1}[Options.parse(options)] == 1


BAD = [
    ({"ration": 0.5}, errors.UnknownOption, "Did you mean 'ratio'"),
    ({3: 0.5}, errors.UnknownOption, "3"),
    *[({"ratio": r}, errors.BadOption, r"\(0, 1\]") for r in (0, -0.1, 1.0001, True, "0.5", float("nan"), [0.5])],
    *[({"bytes_per_token": b}, errors.BadOption, "at least 1") for b in (0, -4, 1.5, True, "many")],
    ({"ratio": 0.5, "bytes_per_token": 100}, errors.ConflictingOptions, "ratio and bytes_per_token"),
    ({"scheduler": "progresive"}, errors.UnknownScheduler, "Did you mean 'progressive'"),
    ({"scheduler": backend}, errors.BadOption, "register_scheduler"),
    ({"basis": ("joint", "groupd")}, errors.BadOption, "'grouped'"),
    *[({"calibration": c}, errors.BadCalibration, "cannot be read") for c in ("wiki.calib", Path("/no/such/file"))],
    ({"calibration": 3}, errors.BadOption, "default 'first-prompt'"),
    *[({"group_size": 2, "basis": b}, errors.ConflictingOptions, "basis='grouped'") for b in ("auto", "joint")],
    *[({name: "nonsense"}, errors.BadOption, "nonsense") for name in ("precision", "basis", "objective")],
    *[({name: 3}, errors.BadOption, f"{name}=3") for name in CHOICES],
    *[({name: 3}, errors.BadOption, "default 'auto'") for name in ("precision", "basis")],
    ({"precision": 3, "calibration": "none"}, errors.BadOption, "default 'model'"),
    ({"scheduler": 3}, errors.BadOption, "default 'loss'"),
    ({"basis": (("joint", "identity"), "joint")}, errors.BadOption, "a pair of these"),
    ({"basis": ("joint", "joint", "joint")}, errors.BadOption, "basis"),
    ({"calibration": "first-promt"}, errors.BadOption, "first-prompt"),
    ({"calibration": ""}, errors.BadOption, "calibration"),
    *[({"group_size": g}, errors.BadOption, "group_size") for g in (0, True, "two")],
    *[({name: v}, errors.BadOption, name) for name in ("d_min", "d_max") for v in (0, -1, 1.0, True, "8")],
    *[({name: v}, errors.BadOption, name) for name in ("protect_first", "protect_last") for v in (-1, 1.5, True, None)],
    ({"d_min": 9, "d_max": 8}, errors.ConflictingOptions, "d_min=9 is above d_max=8"),
    ({"scheduler": "uniform", "d_min": 9}, errors.ConflictingOptions, "progressive"),
    ({"scheduler": "energy", "protect_last": 2}, errors.ConflictingOptions, "progressive"),
    ({"mode": "fast"}, errors.BadOption, "reduce-overhead"),
    ({"mode": 1}, errors.BadOption, "mode"),
    ({"mode": "max-autotune", "inner": "eager"}, errors.ConflictingOptions, "no modes"),
    ({"inner": "inductr"}, errors.UnknownBackend, "Did you mean 'inductor'"),
    ({"inner": "lorc"}, errors.UnknownBackend, "lorc"),
    ({"inner": None}, errors.UnknownBackend, "None"),
    ({"plan": 7}, errors.BadPlan, "neither"),
    ({"plan": ""}, errors.BadPlan, "empty"),
    *[({"plan": p}, errors.BadPlan, "cannot be read") for p in ("no-such-plan.json", Path("/no/such/plan.json"))],
    ({"plan": SimpleNamespace(ranks=[1])}, errors.BadPlan, "hashed"),
    ({"plan": FakePlan(), "ratio": 0.5}, errors.ConflictingOptions, "plan and ratio"),
    ({"plan": FakePlan(), "d_min": 4}, errors.ConflictingOptions, "plan and d_min"),
    ({"strict": 1}, errors.BadOption, "True or False"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD, ids=[f"{i}-{b[1].__name__}" for i, b in enumerate(BAD)])
def test_refused(options, error, words):
    with pytest.raises(error, match=words) as caught:
        Options.parse(options)
    assert type(caught.value) is error


@pytest.mark.parametrize("options", [7, "ratio", [("ratio", 0.5)]], ids=str)
def test_options_must_be_a_mapping(options):
    with pytest.raises(errors.BadOption, match="mapping"):
        Options.parse(options)


def test_keywords():
    assert Options.parse({"ratio": 0.3}, mode="default", d_min=None) == Options(ratio=0.3, mode="default")
    assert Options.parse({"ratio": 0.3}, ratio=0.3).ratio == 0.3
    with pytest.raises(errors.ConflictingOptions, match="0.3"):
        Options.parse({"ratio": 0.3}, ratio=0.4)
    with pytest.raises(errors.UnknownOption, match="'mod'"):
        Options.parse(None, mod=None)


def test_a_plans_path_is_read_and_its_content_counts(tmp_path):
    """Two paths of equal plans are equal options; a plan that is written anew is another."""
    line = PlannedSite(0, "key", 8, (Segment(4, MODEL),), 1, 16, 32, None, 1.0)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for path in (one, two):
        Plan((line,)).save(path)
    before = Options(plan=str(one))
    assert before == Options(plan=two) and hash(before) == hash(Options(plan=two))
    Plan((dataclasses.replace(line, segments=(Segment(3, MODEL),)),)).save(one)
    assert Options(plan=one) != before


def test_a_plan_waits_for_no_prompt():
    assert Options(plan=FakePlan(), calibration="first-prompt").calibration == "none"
    with pytest.raises(errors.ConflictingOptions, match="plan and calibration"):
        Options(plan=FakePlan(bases=(1,)), calibration=Calibration(()))


def test_construction_validates_too():
    with pytest.raises(errors.BadOption):
        Options(ratio=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().ratio = 0.5  # type: ignore[misc]


def test_given_names_what_differs():
    assert Options().given() == {}
    assert Options(bytes_per_token=99, d_min=3).given() == {"bytes_per_token": 99, "d_min": 3}


def test_paper_is_immutable_and_travels():
    for change in (
        lambda: PAPER.__setitem__("ratio", 1),
        lambda: PAPER.update(ratio=1),
        lambda: PAPER.pop("basis"),
        lambda: PAPER.clear(),
    ):
        with pytest.raises(TypeError, match="immutable"):
            change()
    assert copy.deepcopy(PAPER) is PAPER and pickle.loads(pickle.dumps(PAPER)) == PAPER
    assert json.loads(json.dumps(PAPER)) == PAPER
    more = PAPER | {"ratio": 1.0}
    assert type(more) is dict and "ratio" not in PAPER
    same = PAPER
    same |= {"ratio": 1.0}
    assert "ratio" not in PAPER and Options.parse(same).ratio == 1.0


def test_budget_of_a_ratio_is_exact_and_positions_come_on_top_at_one_only():
    group = [site(0), site(1)]
    assert Options(ratio=0.45).budget(group) == 460  # floor(0.45 * 1024)
    assert Options(ratio=0.999).budget(group) == 1022
    assert Options(ratio=1.0).budget(group) == 1024 + 8


def test_budget_in_bytes_is_shared_by_dense_bytes():
    full, sliding = [site(0), site(1)], [site(2, dense=256, window=64)]
    options = Options(bytes_per_token=1000)
    assert options.budget(full + sliding) == 1000
    shares = [options.budget(group, full + sliding) for group in (full, sliding)]
    assert shares == [800, 200]
    with pytest.raises(errors.ConflictingOptions, match="plan"):
        Options(plan=FakePlan()).budget(full)


@given(st.integers(1, 10**6), st.lists(st.integers(1, 4096), min_size=1, max_size=5))
def test_shares_of_a_byte_budget_never_exceed_it(budget, widths):
    groups = [[site(i, dense=2 * width, window=i)] for i, width in enumerate(widths)]
    everything = [one for group in groups for one in group]
    assert sum(Options(bytes_per_token=budget).budget(group, everything) for group in groups) <= budget


def test_every_documented_option_exists():
    """And each option has a row: the first column of the first table."""
    page = Path(__file__).parents[1] / "docs" / "options.md"
    table = re.search(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE)
    assert table is not None
    columns = [row.split("|")[1] for row in table.group().splitlines()[2:]]
    assert {name for column in columns for name in re.findall(r"`(\w+)`", column)} == {
        field.name for field in dataclasses.fields(Options)
    }
