"""Every refusal says the value, what is allowed and the next step."""

import inspect

import pytest

from lorc_fx import errors

KNOWN = ["ratio", "scheduler", "plan"]

#: class -> (instance, words that its message must hold: the value, what is allowed, the next step)
CASES = {
    "UnknownOption": (errors.UnknownOption("ration", KNOWN), ["'ration'", "Did you mean 'ratio'?", "plan, ratio"]),
    "BadOption": (errors.BadOption("ratio", 2, "a number in (0, 1]", 0.45), ["ratio=2", "(0, 1]", "default 0.45"]),
    "ConflictingOptions": (
        errors.ConflictingOptions(("ratio", "bytes_per_token"), "both set the budget", "Give one of them"),
        ["ratio and bytes_per_token", "Give one of them."],
    ),
    "UnknownBackend": (
        errors.UnknownBackend("inductr", ["inductor", "eager"]),
        ["'inductr'", "Did you mean 'inductor'?", "eager, inductor"],
    ),
    "BadCertificate": (
        errors.BadCertificate("it is traced in several graphs"),
        ["several graphs", "traced in one graph", "lorc_fx.explain"],
    ),
    "BadCalibration": (
        errors.BadCalibration("a.safetensors", "it is too old"),
        ["a.safetensors", "too old", "lorc_fx.calibrate"],
    ),
    "BadPlan": (errors.BadPlan(7, "a int is neither"), ["plan=7", "made for this model", "lorc_fx.make_plan"]),
    "BudgetTooSmall": (errors.BudgetTooSmall(3, 12, 1024, 6), ["3 bytes", "12 bytes", "0.011719", "bytes_per_token"]),
    "KnobsDoNotFit": (
        errors.KnobsDoNotFit({"d_max": 64}, 128, 100, 256, "d_max=50"),
        ["d_max=64", "128 bytes", "budget is 100", "d_max=50", "ratio 0.5"],
    ),
    "UnknownScheduler": (
        errors.UnknownScheduler("unifrom", ["uniform", "energy"]),
        ["'unifrom'", "Did you mean 'uniform'?", "energy, uniform", "register_scheduler"],
    ),
    "AlreadyRegistered": (errors.AlreadyRegistered("scheduler", "x", "f"), ["scheduler 'x'", "by f", "not in use"]),
    "BadBasis": (errors.BadBasis("mine", "layer 0 key", "shapes [2]"), ["'mine'", "layer 0 key", "P [n, k]"]),
    "BadSchedule": (errors.BadSchedule("mine", "3 entries for 2 sites"), ["'mine'", "3 entries", "1 <= k <= width"]),
    "StrictMiss": (errors.StrictMiss(["miss one", "miss two"]), ["2 cached", "- miss one", "strict=False"]),
    "NoSites": (errors.NoSites(["a near miss"]), ["a near miss", "use_cache=True", "strict=False"]),
    "BadWeight": (errors.BadWeight("layer 3 key"), ["layer 3 key", "NaN or inf", "finite", "checkpoint"]),
    "UnloadedWeights": (
        errors.UnloadedWeights([f"w{i}" for i in range(6)]),
        ["6 weight(s)", "'meta'", "w0, w1, w2, w3 and 2 more", "with data", "assign=True"],
    ),
    "TooManyValues": (errors.TooManyValues("s0, s1", 8), ["s0, s1", "8 values", "recompile_limit"]),
    "UnreadableGraph": (errors.UnreadableGraph("aten.nonzero"), ["aten.nonzero", "lorc_fx.explain"]),
    "GradRequired": (errors.GradRequired(), ["inference only", "torch.no_grad()"]),
    "ForeignCache": (errors.ForeignCache("of another plan"), ["another plan", "fresh cache"]),
    "BadCacheFile": (errors.BadCacheFile("a.cache", "it is cut off"), ["a.cache", "cut off", "save_cache", "anew"]),
    "GraphInvariant": (errors.GraphInvariant("rewrite", "no orphan", "%a"), ["'rewrite'", "no orphan", "%a", "report"]),
    "MissingExtra": (
        errors.MissingExtra("--plot", "matplotlib", "plot"),
        ["--plot needs matplotlib", "pip install 'lorc-fx[plot]'"],
    ),
    "BadModel": (errors.BadModel("/x", "no such path"), ["'/x'", "no such path", "safetensors"]),
}


def catalogue(base):
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, base) and c is not base]
    return {c.__name__ for c in found}


def test_every_error_has_a_case():
    assert catalogue(errors.LorcError) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    error, words = CASES[name]
    assert type(error).__name__ == name
    for word in words:
        assert word in str(error)


def test_option_errors_are_value_errors():
    for name in ("UnknownOption", "BadOption", "ConflictingOptions", "BudgetTooSmall", "UnknownScheduler"):
        assert isinstance(CASES[name][0], ValueError)


def test_warnings_can_be_filtered_as_one():
    assert catalogue(errors.LorcWarning) == {
        "NoSitesWarning", "DenseCacheWarning", "KernelWarning", "QualityWarning", "EagerWarning"
    }  # fmt: skip
    assert issubclass(errors.LorcWarning, UserWarning)


@pytest.mark.parametrize("name", ["zzz", "", 7])
def test_no_suggestion_where_nothing_is_close(name):
    assert errors.did_you_mean(name, KNOWN) == ""


@pytest.mark.parametrize(("needed", "dense"), [(12, 1024), (1, 3), (7, 7), (63, 2049), (999_999, 1_000_000)])
def test_the_ratio_named_is_enough(needed, dense):
    from lorc_fx.formulas import budget_bytes

    assert budget_bytes(errors.ratio_for(needed, dense), dense) >= needed


def test_no_ratio_is_named_where_none_works():
    assert errors.ratio_for(9, 8).startswith("none")
    assert "none" in str(errors.BudgetTooSmall(1, 9, 8, 1))


def test_long_lists_of_misses_are_cut():
    text = str(errors.StrictMiss([f"miss {i}" for i in range(50)]))
    assert "50 cached" in text and "miss 19" in text and "miss 20" not in text and "30 more" in text
