"""A page in headless Chromium: how it looks, for docs and for eyes.

    python -m bench.screenshot report.html docs/figures/report.png --width 1280 --height 1060 [--part spectra] [--dark]

Needs the extra ``browser`` and the system's Chromium with its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
"""Of a browser that runs as root and asks nobody for anything."""

PHONE = 600
"""Widths below this are a phone's: the page is laid out as there."""


def missing() -> str | None:
    """What of the system's Chromium is not there, if anything."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"there is no {' and no '.join(absent)} on this system" if absent else None


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A driver with a profile of its own, which is gone afterwards; it keeps what is said on the console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def show(driver: Any, path: Path, width: int, height: int = 900, dark: bool = False, part: str = "") -> None:
    """Open a file in a window of ``width`` x ``height`` CSS pixels, at the section ``part`` if one is named."""
    window = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(path.resolve().as_uri() + (f"#{part}" if part else ""))


def picture(driver: Any, path: Path, whole: bool = False) -> None:
    """Write what is shown, or the ``whole`` page, as PNG."""
    asked = {"format": "png", "captureBeyondViewport": whole}
    if whole:
        box = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        asked["clip"] = {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}
    path.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0, help="of the picture; 0: the whole page")
    parser.add_argument("--part", default="", help="the section that is shown first (with --height)")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args(argv)
    with browser() as driver:
        show(driver, args.page, args.width, args.height or 900, args.dark, args.part)
        picture(driver, args.out, whole=not args.height)
    print(args.out)


if __name__ == "__main__":
    main()
