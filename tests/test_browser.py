"""Pages in a real browser: no errors on its console, every chart drawn, read by keyboard, a sample opens.

Needs playwright (no requirement of anything else here) and a Chromium: playwright's own, or the one on PATH.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runner.tracking import report
from tests.test_live import do, run_at
from tests.test_report import make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = str(own) if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if found is None:
            pytest.skip("no Chromium: playwright install chromium")
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["light", "dark"])
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tab on a phone's width that fails its test for anything on the console."""
    opened = browser.new_page(color_scheme=request.param, viewport={"width": 390, "height": 844})
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    opened.close()
    assert said == []


def test_a_report_is_drawn_whole_and_read_by_keyboard(tab: Any, tmp_path: Path) -> None:
    tab.goto(report.write_report(make_run(tmp_path / "run")).as_uri())
    for figure in tab.locator("main > .grid svg.chart").all():
        box = figure.bounding_box()
        assert box["width"] > 200 and box["height"] > 100
        assert figure.locator("path.line, rect, circle").count() > 0
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out of a phone
    first = tab.locator("svg.chart").first
    first.focus()
    tab.keyboard.press("End")
    assert "step 20" in tab.locator("#tip").inner_text() and "0.69" in tab.locator("#tip").inner_text()
    tab.keyboard.press("ArrowLeft")
    assert "step 19" in tab.locator("#tip").inner_text()
    tab.keyboard.press("Escape")
    assert not tab.locator("#tip").is_visible()
    tab.emulate_media(media="print")
    assert not tab.locator("details").first.is_visible() and tab.locator("svg.chart").first.is_visible()


@contextmanager
def watched(folder: Path) -> Iterator[str]:
    """The address of `runner watch` of this folder, in a process of its own."""
    command = [sys.executable, "-m", "runner", "watch", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.send_signal(signal.SIGINT)


def test_a_watched_run_grows_and_a_sample_opens(tab: Any, tmp_path: Path) -> None:
    tracker = run_at(tmp_path, steps=2)
    with watched(tmp_path) as address:
        tab.goto(address)
        tab.get_by_role("link", name="2", exact=True).wait_for()
        do(tracker, 2)
        tab.get_by_role("link", name="3", exact=True).wait_for(timeout=15_000)  # without a reload
        tab.get_by_role("link", name="3", exact=True).click()
        tab.get_by_text("token by token").click()
        assert tab.locator(".token.far").inner_text() == "<b>" and tab.locator(".token.far").is_visible()
        tab.get_by_role("link", name="back to the run").click()
        tab.get_by_text("Timeline", exact=True).wait_for()
