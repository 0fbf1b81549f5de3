"""``lorc report``: what stands on the page, that it needs nothing from elsewhere, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import reported
import tiny
import torch
from commands import run

import lorc_fx
from lorc_fx import html_report, models, plan_plot
from lorc_fx.calibration import SiteStatistics, covariance
from lorc_fx.errors import BadOption, LorcWarning, QualityWarning
from lorc_fx.html_report import figures, gather, parts
from lorc_fx.html_report.pieces import size
from lorc_fx.records import Miss
from lorc_fx.report import Report

pytestmark = pytest.mark.usefixtures("clean")
EVIL = "<script>alert('x')</script>\"&<img src=x onerror=alert(1)>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Every element with its attributes and the text in it; unclosed or crossed elements are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported.checkpoint(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def full(folder: Path) -> tuple[str, dict[str, Any]]:
    page, data = reported.everything(folder)
    return page.read_text(encoding="utf-8"), json.loads(data.read_text())


# ---------------------------------------------------------------------------------------------------------- the page


def test_every_part_is_there(full: tuple[str, dict[str, Any]]) -> None:
    page = Page(full[0])
    assert tuple(attributes["id"] for attributes in page.all("section")) == reported.SECTIONS
    names = [str(attributes["id"]).removeprefix("figure-") for attributes in page.all("figure")]
    spectra = ["weights-key", "weights-value", "statistics-key", "statistics-value"]
    rest = [
        "condition",
        "cumulative",
        "bytes",
        "predicted",
        "measured",
        "needles-dense",
        "needles-coded",
        "steps",
        "timed",
    ]
    assert names == spectra + rest
    assert "absent" not in [attributes.get("class") for attributes in page.all("p")], "all was asked for"
    assert len(page.all("figcaption")) == len(names) == len(page.all("svg"))
    for svg in page.all("svg"):
        assert svg["role"] == "img" and svg["aria-label"] and svg["viewbox"]
    for name in ("lorc_fx", "torch", "transformers", "Python", "machine", "options"):
        assert name in page.words.partition("Misses")[0]
    assert f"torch {torch.__version__}" in page.words and "Retrieval A sentence" in page.words


def test_nothing_comes_from_elsewhere(full: tuple[str, dict[str, Any]]) -> None:
    html = full[0]
    page = Page(html)
    assert "://" not in html and "@import" not in html
    assert not page.all("script") and not page.all("img") and not page.all("iframe") and not page.all("object")
    assert "default-src 'none'" in html
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids)), "two elements have one id"
    for tag, attributes in page.found:
        assert not {"src", "srcset", "onclick", "onload"} & attributes.keys()
        for name, value in attributes.items():
            if name == "href":
                assert value == "data:," or str(value).removeprefix("#") in ids, (tag, value)
            if value and "url(" in value:
                assert value.partition("url(#")[2].partition(")")[0] in ids, value
    assert figures.INK not in html and figures.GRID not in html, "a colour that is none of the page's"
    assert not {figures.WRONG, figures.RIGHT} & figures.THEME.keys(), "white text on what is light in the dark"


def test_numbers_are_those_of_the_plan(folder: Path, full: tuple[str, dict[str, Any]]) -> None:
    html, found = full
    model = tiny.llama(heads=8, kv_heads=8)
    for site in found["sites"]:
        attention = model.model.layers[site["layer"]].self_attn
        weight = (attention.k_proj if site["kind"] == "key" else attention.v_proj).weight
        want = torch.linalg.svdvals(weight.detach().double())
        torch.testing.assert_close(torch.tensor(site["singular"], dtype=torch.float64), want, rtol=1e-4, atol=1e-6)
        assert site["cond"] == pytest.approx(float(want[0] / want[-1]), rel=1e-3)
    logs = [point["log10"] for point in found["cumulative"]]
    both = [[s["cond"] for s in found["sites"] if s["layer"] == n] for n in (0, 1)]
    want_last = torch.tensor(both[1]).log10().sum().item()
    assert logs == pytest.approx([torch.tensor(both[0]).log10().sum().item() + want_last, want_last], rel=1e-4)
    # the first prompt is the first half of the text: what a calibration on it says
    ids = torch.tensor([tiny.LETTERS[letter] for letter in reported.TEXT])
    known = lorc_fx.calibrate(model, [ids[: len(ids) // 2]], progress=False)
    plan = lorc_fx.make_plan(model, torch.arange(1, 17)[None], options={"ratio": 0.3, "calibration": known})
    assert found["bytes_per_token"] == plan.bytes_per_token <= 0.3 * plan.bytes_per_token_dense
    words = Page(html).words
    assert f"{plan.bytes_per_token:,}" in words and f"dense {plan.bytes_per_token_dense:,}" in words
    assert found["loss"]["points"][1]["predicted"] == pytest.approx(plan.predicted, rel=1e-4)
    assert found["loss"]["tokens"] == len(ids) - len(ids) // 2 - 1, "measured on the other half"
    points = found["loss"]["points"]
    assert [p["bytes_per_token"] for p in points] == sorted((p["bytes_per_token"] for p in points), reverse=True)
    assert found["needles"]["dense"]["of"] == found["needles"]["coded"]["of"] == 5
    assert [p["tokens"] for p in found["steps"]["points"]] == list(gather.CONTEXTS) == [2**n for n in range(9, 18)]
    assert [p["tokens"] for p in found["measured"]["points"]] == [16, 32]
    assert all(p["coded_s"] > 0 and p["dense_s"] > 0 for p in found["steps"]["points"] + found["measured"]["points"])


def test_what_was_not_asked_for_says_how_to_get_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    code, text = reported.report(folder, out, "--sweep", "", "--calibration", "none")
    assert code == 0, text
    page = Page(out.read_text())
    assert tuple(attributes["id"] for attributes in page.all("section")) == reported.SECTIONS
    assert [attributes.get("class") for attributes in page.all("p")].count("absent") == 4
    for word in ("give --calibration FILE", "add --sweep", "add --needle", "add --time"):
        assert word in page.words
    assert list(tmp_path.iterdir()) == [out]


def test_a_ratio_without_room_is_left_out(folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "page.html", tmp_path / "page.json"
    code, text = reported.report(
        folder, out, "--sweep", "0.5,0.25,0.005,0.002", "--calibration", "none", "--json", str(data)
    )
    assert code == 0, text
    result = json.loads(data.read_text())["loss"]
    assert sorted(result["refused"]) == [0.002, 0.005] and len(result["points"]) == 3, "of 0.5, 0.45 and 0.25"
    words = Page(out.read_text()).words
    assert "Ratio 0.005 is left out" in words and "add --text FILE --measure" in words


def test_everything_is_escaped(full: tuple[str, dict[str, Any]]) -> None:
    found = copy.deepcopy(full[1])
    found |= {"model": EVIL, "warnings": [EVIL], "options": {EVIL: EVIL}, "misses": [dict.fromkeys(
        ("node", "kind", "reason", "source", "step"), EVIL)]}  # fmt: skip
    found["statistics"]["source"] = found["needles"]["text"] = found["steps"]["device"] = EVIL
    found["sites"][0] |= {"epilogue": EVIL, "segments": EVIL, "lowering": EVIL}
    found["about"]["machine"] = EVIL
    html = html_report.render(found)
    page = Page(html)
    assert "<script" not in html and not page.all("img")
    assert page.words.count("<script>alert('x')</script>") >= 12


def test_misses_are_listed_and_are_all_of_a_model_without_sites(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miss = Miss("cat_1", "mixes tokens", "cumsum sums over tokens", "model.py:7", "register a rule")
    monkeypatch.setattr(gather, "examined", lambda *args: Report((), (miss,), None))
    out = tmp_path / "page.html"
    code, text = reported.report(
        folder, out, "--sweep", "0.5", "--text", str(folder / "text.txt"), "--measure", "--time"
    )
    assert code == 0, text
    page = Page(out.read_text())
    assert [attributes["id"] for attributes in page.all("section")] == ["matched"] and not page.all("figure")
    for word in (
        "cat_1",
        "mixes tokens",
        "cumsum sums over tokens",
        "model.py:7",
        "register a rule",
        "nothing else to show",
    ):
        assert word in page.words


def test_warnings_are_on_the_page_and_others_go_on() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gather.heard() as said:
            warnings.warn("few tokens", QualityWarning, stacklevel=1)
            warnings.warn("few tokens", QualityWarning, stacklevel=1)
            warnings.warn("something else", DeprecationWarning, stacklevel=1)
    assert said == ["few tokens"]
    assert [str(w.message) for w in caught] == ["something else"] and not issubclass(caught[0].category, LorcWarning)


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("groups", [1, 4])
def test_spreads_are_those_of_the_tokens(groups: int) -> None:
    y = torch.randn(50, 8, dtype=torch.float64) * torch.arange(1, 9) + 3
    outer = torch.stack([part.T @ part for part in y.split(8 // groups, 1)])
    zero = torch.zeros(8, dtype=torch.float64)
    site = SiteStatistics(0, "key", zero, len(y), y.sum(0), outer, 0, zero, 0.0)
    mean, cov = covariance(site)
    torch.testing.assert_close(mean, y.mean(0))
    whole = torch.cov(y.T, correction=0)
    for i, block in enumerate(whole.split(8 // groups)):
        torch.testing.assert_close(cov[i], block[:, i * 8 // groups : (i + 1) * 8 // groups])
    found = gather._statistics(lorc_fx.Calibration((site,)), "test")["sites"][0]["spread"]
    assert found == sorted(found, reverse=True) and len(found) == 8
    assert sum(s * s for s in found) == pytest.approx(float(whole.trace()), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ refused


REFUSED = {
    "a folder that is not there": (["/no/such/folder/r.html"], "a file in a folder that exists"),
    "a folder": (["/tmp"], "a file in a folder that exists"),
    "json nowhere": (["r.html", "--json", "/no/such/folder/r.json"], "json='/no/such/folder/r.json'"),
    "nothing to measure on": (["r.html", "--measure"], "--measure and no --text conflict"),
    "a text that is not used": (["r.html", "--text", __file__, "--calibration", "none"], "nothing reads the text"),
    "a text that is not there": (["r.html", "--text", "/no/such.txt"], "text='/no/such.txt'"),
    "two budgets": (["r.html", "--ratio", "0.5", "--bytes-per-token", "64"], "conflict"),
    "a bad ratio": (["r.html", "--ratio", "7"], "ratio=7.0"),
    "a bad ratio in the sweep": (["r.html", "--sweep", "0.5,2"], "ratio=2.0"),
    "no ratios": (["r.html", "--sweep", "half"], "sweep='half'"),
    "a scheduler that is not there": (["r.html", "--scheduler", "los"], "Did you mean 'loss'?"),
    "a calibration that is not there": (["r.html", "--calibration", "/no/such"], "cannot be read"),
    "no length": (["r.html", "--time", "--time-tokens", "0"], "time_tokens='0'"),
    "a compiler that is not there": (["r.html", "--time", "--inner", "inductr"], "Did you mean 'inductor'?"),
    "needles of words": (["r.html", "--needle", "--needle-lengths", "long"], "needle_lengths='long'"),
    "no page": ([], "Missing argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_model_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "load_model", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("a model was loaded"))
    arguments, words = REFUSED[name]
    code, text = run("report", *arguments)
    assert code == 2 and words in text and "Traceback" not in text, text


def test_refused_of_the_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    code, text = reported.report(folder, out, "--needle", "--needle-lengths", "2048")
    assert code == 2 and "at most" in text and "for this model" in text
    (tmp_path / "short.txt").write_text("ab")
    code, text = reported.report(folder, out, "--text", str(tmp_path / "short.txt"), "--measure")
    assert code == 2 and "a text of at least four tokens" in text
    code, text = run("report", str(out), "--model", "/nowhere")
    assert code == 1 and "Model '/nowhere' cannot be used" in text
    assert not out.exists()


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_plot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gather, "load_model", lambda *args: pytest.fail("a model was loaded"))
    code, text = run("report", "r.html")
    assert code == 1 and "lorc report needs matplotlib" in text and "pip install 'lorc-fx[plot]'" in text


def test_help_has_examples() -> None:
    code, text = run("report", "--help")
    assert code == 0 and text.count("lorc report") >= 2
    for option in (
        "--sweep",
        "--text",
        "--measure",
        "--needle",
        "--time",
        "--json",
        "--calibration",
        "--bytes-per-token",
    ):
        assert option in text


# ------------------------------------------------------------------------------------------------- files and figures


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    html_report.write(out, "old")
    inner = Path.write_text

    def full_disk(path: Path, text: str, **kwargs: Any) -> int:
        inner(path, text[:2], **kwargs)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(BadOption, match="no space left"):
            html_report.write(out, "the new one")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    html_report.write(out, "the new one")
    assert out.read_text() == "the new one" and list(tmp_path.iterdir()) == [out]


def test_equal_figures_give_equal_pages(full: tuple[str, dict[str, Any]]) -> None:
    assert html_report.render(full[1]) == full[0]


def test_losses_in_nats_share_one_figure(full: tuple[str, dict[str, Any]]) -> None:
    """Also where a measured one is below the dense model's."""
    found = copy.deepcopy(full[1])
    found["loss"] |= {"nats": True, "unit": "nats per token"}
    found["loss"]["points"][0]["nats"] = found["loss"]["dense_nats"] - 0.01
    loss = parts._loss(found)
    assert [figure.name for figure in loss.figures] == ["loss"]
    assert "predicted" in loss.figures[0].svg and "measured" in loss.figures[0].svg
    assert loss.tables[0].rows[0][3] == "-0.0100"


def test_long_spectra_are_thinned_and_keep_their_ends() -> None:
    at = figures._thinned(5000)
    assert len(at) == figures.MOST_POINTS and (at[0], at[-1]) == (0, 4999) and at == sorted(set(at))
    assert figures._thinned(3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.07e+03 GiB")]
)
def test_sizes(count: int, words: str) -> None:
    assert size(count) == words
