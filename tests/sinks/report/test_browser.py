from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import List, NamedTuple

import pytest
from tests.sinks.report.written_runs import diverging, lost, straggling, write_run

from plarv_sinks.report.page import page
from plarv_sinks.report.source import of_folder
from plarv_sinks.report.story import read_story

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        for found in [shutil.which(name)]
        if found
    ),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


class Shown(NamedTuple):
    """What a browser made of a page."""

    dom: str
    console: List[str]  # what scripts and the page's own policy had to say


@pytest.fixture
def browse(tmp_path: Path) -> object:
    profile = tmp_path / "profile"

    def shown(file: Path) -> Shown:
        done = subprocess.run(
            [
                str(BROWSER),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={profile}",
                "--enable-logging=stderr",
                "--virtual-time-budget=2000",
                "--dump-dom",
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return Shown(done.stdout, re.findall(r".*CONSOLE.*", done.stderr))

    return shown


def written(folder: Path, extra: str = "") -> Path:
    file = folder.parent / f"{folder.name}.html"
    text = page(read_story(of_folder(folder, print)))
    file.write_text(text.replace("</main>", f"</main>{extra}"), encoding="utf-8")
    return file


# Moves over the first curve and writes what it then says where --dump-dom shows it; it is allowed
# here alone, by taking the page's policy away.
MOVES = """<script>addEventListener("load", () => {
  const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
});</script>"""


def test_a_browser_shows_the_marks_and_complains_of_nothing(tmp_path: Path, browse: object) -> None:
    assert callable(browse)
    shown: Shown = browse(written(write_run(tmp_path / "wrong", diverging, 900)))
    assert shown.console == []
    assert 'data-mark="cause"' in shown.dom
    assert 'data-mark="critical"' in shown.dom
    assert 'data-mark="action"' in shown.dom
    assert "It began at step 700" in shown.dom
    assert shown.dom.count("<svg") == 5


def test_the_pages_policy_stops_whatever_would_load_or_run(tmp_path: Path, browse: object) -> None:
    assert callable(browse)
    extra = (
        "<script>document.title = 'owned'</script>"
        "<img src='http://192.0.2.1/pixel.png'>"
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>"
    )
    shown: Shown = browse(written(write_run(tmp_path / "wrong", lost, 60), extra))
    refused = [line for line in shown.console if "Content Security Policy" in line]
    assert len(refused) == 3
    assert "<title>owned" not in shown.dom


def test_the_pointer_reads_a_value_off_the_curve(tmp_path: Path, browse: object) -> None:
    assert callable(browse)
    file = written(write_run(tmp_path / "four", straggling, 200, ranks=4), MOVES)
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text), encoding="utf-8")
    shown: Shown = browse(file)
    assert shown.console == []
    assert re.search(r"<output>step 1?\d\d: loss [\d.]+</output>", shown.dom)
