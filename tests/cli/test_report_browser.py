"""The page of `hf-osd report` in a real browser, without a network, at the widths of a desktop and of a phone."""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_osd.cli.main import main


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = [1400, 390]
SECTIONS = ["runs", "loss", "schedule", "subspaces", "memory", "throughput", "configuration"]
BLUE, RED = (0x2F, 0x5F, 0xA8), (0xC4, 0x44, 0x2F)  # of the first and of the second run

# The page itself may run no script, so another page looks into it.
PROBE = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe><pre id="found"></pre>
<script>
onload = () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document, found = {};
  const all = selector => [...page.querySelectorAll(selector)];
  const shown = e => view.getComputedStyle(e).display !== "none" && e.getBoundingClientRect().height > 0;
  const box = e => e.getBoundingClientRect();
  found.width = view.innerWidth;
  found.overflow = page.documentElement.scrollWidth - view.innerWidth;
  found.beyond = all("body *").filter(e => !e.closest(".scroll, .toggles") && box(e).right > view.innerWidth + 1)
    .map(e => e.tagName + "." + e.className.baseVal);
  found.sections = all("main section").filter(shown).map(e => e.id);
  found.pictures = all("svg").filter(e => box(e).width > 250 && box(e).height > 100).length;
  found.images = all("svg image").filter(e => box(e).width > 5 && box(e).height > 50).length;
  found.cut = all("svg text").filter(e => {
    const text = box(e), svg = box(e.closest("svg"));
    return text.left < svg.left - 1 || text.right > svg.right + 1 || text.bottom > svg.bottom + 1;
  }).map(e => e.textContent);
  found.text = Math.min(...all("svg text").map(e => box(e).height));
  found.requests = view.performance.getEntriesByType("resource").map(e => e.name.slice(0, 40));
  const lines = () => all("svg .run-0").map(shown);
  found.before = lines();
  page.querySelector("#show-0").click();
  found.after = lines();
  document.querySelector("#found").textContent = JSON.stringify(found);
};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = "no Chromium is installed (Debian, Ubuntu: apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


@pytest.fixture(scope="module")
def page(finished_runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "page.html"
    main(["report", *map(str, finished_runs.values()), "--output", str(path)])
    return path


def chromium(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess:
    """Open a file with every host unknown, which is how a browser without a network sees the world."""
    command = [
        browser,
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--allow-file-access-from-files",
        f"--user-data-dir={page.parent / 'profile'}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def complaints(done: subprocess.CompletedProcess) -> list[str]:
    """What the page wrote to the console: errors, and what its content policy has refused."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(browser: str, page: Path, width: int) -> dict[str, Any]:
    path = page.with_name(f"probe{width}.html")
    path.write_text(PROBE.replace("WIDTH", str(width)), encoding="utf-8")
    done = chromium(browser, path, "--dump-dom", "--window-size=1500,1000", "--virtual-time-budget=5000")
    assert not complaints(done)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(found.group(1))


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_there_and_nothing_sticks_out(width, browser, page):
    found = probe(browser, page, width)
    assert found["width"] == width
    assert found["overflow"] == 0 and found["beyond"] == [] and found["cut"] == []
    assert found["sections"] == SECTIONS
    assert found["pictures"] == 8 and found["images"] == 4  # each heat map and its scale
    assert found["text"] > 8  # pixels: letters that can be read
    assert all(name.startswith("data:") for name in found["requests"])
    # the line of each chart and the two bands, and none after a click
    assert found["before"] == [True] * len(found["before"]) and len(found["before"]) >= 8
    assert not any(found["after"])


@pytest.mark.parametrize("width", WIDTHS)
def test_the_screenshot_shows_the_runs(width, browser, page):
    from PIL import Image

    path = page.with_name(f"screenshot{width}.png")
    done = chromium(browser, page, f"--screenshot={path}", f"--window-size={width},5000")
    assert not complaints(done)
    with Image.open(path) as picture:
        assert picture.size == (width, 5000)
        counts = Counter(picture.convert("RGB").get_flattened_data())
    assert counts[BLUE] > 1000 and counts[RED] > 1000  # lines and bars of both runs
    assert len(counts) > 200  # a heat map's colours
    assert counts.most_common(1)[0][1] < 0.9 * width * 5000


def test_a_script_in_a_page_would_be_noticed(browser, page):
    """The check of the console can fail, and the content policy holds."""
    spoilt = page.with_name("spoilt.html")
    html = page.read_text(encoding="utf-8")
    spoilt.write_text(html.replace("</main>", '<script>document.title = "x"</script></main>'), encoding="utf-8")
    done = chromium(browser, spoilt, "--dump-dom", "--virtual-time-budget=2000")
    assert complaints(done) and "<title>x</title>" not in done.stdout
