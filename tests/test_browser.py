"""What ``lorc report`` writes, in headless Chromium: nothing on the console, figures that are seen and can be read.

`make browser`, with the extra `browser` and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="the extra `browser` is not installed (`make browser` does)")

import reported

from bench import screenshot

absent = screenshot.missing()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(absent is not None, reason=str(absent))]

MEASURED = """
const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = text => rgb(text).map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const contrast = (a, b) => {
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + .05) / (low + .05);
};
const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.right, r.width, r.height]; };
return {
  width: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor,
  asked: performance.getEntriesByType("resource").map(entry => entry.name),
  figures: [...document.querySelectorAll("figure")].map(figure => ({
    name: figure.id,
    box: box(figure.querySelector("svg")),
    caption: box(figure.querySelector("figcaption")),
    texts: [...figure.querySelectorAll("text")].map(text => {
      const {left, right, top, bottom, height} = text.getBoundingClientRect(), fill = getComputedStyle(text).fill;
      const cell = figure.id.includes("needles") && [...figure.querySelectorAll("path")].find(path => {
        const r = path.getBoundingClientRect(), filled = getComputedStyle(path).fill !== "none";
        return filled && r.left <= left && r.right >= right && r.top <= top && r.bottom >= bottom;
      });
      const behind = cell ? getComputedStyle(cell).fill : getComputedStyle(figure).backgroundColor;
      return {words: text.textContent.trim(), left, right, height, contrast: contrast(fill, behind)};
    }),
  })),
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported.everything(reported.checkpoint(tmp_path_factory.mktemp("browser")))[0]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with screenshot.browser() as found:
        yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_figures_are_seen(driver: Any, page: Path, width: int, dark: bool) -> None:
    screenshot.show(driver, page, width, dark=dark)
    found = driver.execute_script(MEASURED)
    assert driver.get_log("browser") == []
    assert found["asked"] == [], "the page asks for something"
    assert found["width"] <= width, "the page scrolls sideways"
    assert (found["background"] == "rgb(255, 255, 255)") != dark
    assert len(found["figures"]) == 13
    for figure in found["figures"]:
        for left, right, wide, high in (figure["box"], figure["caption"]):
            assert left >= 0 and right <= width and wide > min(width, 400) / 2 and high > 15, figure
        assert figure["box"][3] > 150, figure["name"]
        assert figure["texts"], figure["name"]
        for text in figure["texts"]:
            assert text["contrast"] >= 4.5, (figure["name"], text)
            assert text["height"] >= 8, (figure["name"], text)
            assert figure["box"][0] - 1 <= text["left"] and text["right"] <= figure["box"][1] + 1, (
                figure["name"],
                text,
            )


def test_labels_do_not_lie_on_each_other(driver: Any, page: Path) -> None:
    screenshot.show(driver, page, 390)
    overlaps = driver.execute_script("""
        const found = [];
        for (const figure of document.querySelectorAll("figure")) {
          const texts = [...figure.querySelectorAll("text")]
            .map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
          texts.forEach(([a, x], i) => texts.slice(i + 1).forEach(([b, y]) => {
            const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
            const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
            if (wide > 1 && high > 3) found.push([figure.id, a, b]);
          }));
        }
        return found;""")
    assert overlaps == []


def test_tables_scroll_in_their_own_boxes(driver: Any, page: Path) -> None:
    screenshot.show(driver, page, 390)
    boxes = driver.execute_script("""
        return [...document.querySelectorAll(".scroll")].map(b => [b.clientWidth, b.scrollWidth, b.tabIndex])""")
    assert len(boxes) == 5 and all(seen <= 390 and tab == 0 for seen, _, tab in boxes)
    assert any(whole > seen for seen, whole, _ in boxes), "a table of eleven columns fits on a phone?"
