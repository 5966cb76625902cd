"""The HTML report in a real browser: nothing in it runs or calls out, it fits a telephone, it is dark when asked to be.

Runs with every Chromium or Chrome on the path. Without one there is nothing to try: what can be known of the page
without a browser is in test_report.py, which needs none.
"""

import html
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from reporting import hostile

from conformance.report.files import write_reports
from conformance.report.html import POLICY
from conformance.report.style import DARK, LIGHT

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSERS = list(dict.fromkeys(os.path.realpath(found) for name in NAMES if (found := shutil.which(name))))
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("browser", BROWSERS)]

# A page around the page: a window of Chromium is never narrower than 500 pixels, a frame is as narrow as it is told.
FRAME = """<!doctype html><title>-</title>
<iframe style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>addEventListener('load', () => {{ const inside = document.querySelector('iframe').contentWindow;
const all = [...inside.document.querySelectorAll('body *')];
document.title = JSON.stringify({{ page: inside.document.documentElement.scrollWidth, window: inside.innerWidth,
elements: all.length, wide: all.filter(e => !e.parentElement.closest('.scroll, .formula, pre, svg')
&& e.getBoundingClientRect().right > inside.innerWidth).map(e => e.tagName + '.' + e.className) }}) }});</script>"""


class Silent(BaseHTTPRequestHandler):
    """Counts who calls."""

    calls: list[str] = []  # noqa: RUF012  (shared by all instances, which the server makes)

    def do_GET(self) -> None:
        self.calls.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A site on this machine that would notice a call; its address."""
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


@pytest.fixture(scope="module")
def page(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report full of hostile strings that would call the server if they could."""
    text = json.dumps(hostile()).replace("http://evil.example", server)
    return write_reports(json.loads(text), tmp_path_factory.mktemp("report"))


def run(browser: str, profile: Path, address: Path, *options: str) -> str:
    """Return what the browser prints for a file."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
        "--no-first-run", f"--user-data-dir={profile / 'profile'}", "--virtual-time-budget=2000", *options,
        address.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout


class Tags(HTMLParser):
    """Names of the elements of a page, and its title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def title(document: str) -> str:
    match = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert match is not None
    return match[1]


def test_browser_reads_hostile_strings_as_text(browser: str, page: Path, tmp_path: Path) -> None:
    """The browser's document has the elements that were written and no other, and no address was called."""
    Silent.calls.clear()
    shown = run(browser, tmp_path, page, "--dump-dom")
    assert title(shown).startswith("Conformance of \"'&gt;&lt;script&gt;document.title='owned'")
    assert Tags(shown).tags == Tags(page.read_text()).tags and "script" not in Tags(shown).tags
    assert Silent.calls == []


def test_browser_policy_stops_what_escaping_would_have_missed(
    browser: str, page: Path, server: str, tmp_path: Path
) -> None:
    """The second wall by itself: harm put into the page as markup neither runs nor calls; without the wall it does."""
    harm = f"<script>document.title='owned'</script><img src='{server}/image'>"
    harm += f"<style>@import '{server}/style';</style>"
    guarded = page.read_text().replace("<main>", f"<main>{harm}")
    for name, text, owned in (
        ("guarded", guarded, False),
        ("bare", guarded.replace(f'content="{POLICY}"', 'content=""'), True),
    ):
        Silent.calls.clear()
        (tmp_path / f"{name}.html").write_text(text)
        shown = run(browser, tmp_path, tmp_path / f"{name}.html", "--dump-dom")
        assert (title(shown) == "owned") is owned
        assert ({"/image", "/style"} <= set(Silent.calls)) is owned and bool(Silent.calls) is owned


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_browser_page_is_never_wider_than_its_window(browser: str, width: int, page: Path, tmp_path: Path) -> None:
    """With every part unfolded; tables, plots and commands scroll in boxes of their own."""
    text = page.read_text().replace(f'content="{POLICY}"', 'content=""').replace("<details>", "<details open>")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=html.escape(text)))
    widths = json.loads(title(run(browser, tmp_path, tmp_path / "frame.html", "--dump-dom")))
    assert widths.pop("elements") > 1000
    assert widths == {"page": width, "window": width, "wide": []}


@pytest.mark.parametrize(("scheme", "palette"), [(1, LIGHT), (0, DARK)], ids=["light", "dark"])
def test_browser_paints_the_scheme_that_is_asked_for(
    browser: str, scheme: int, palette: dict[str, str], page: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "page.png"
    options = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", "--window-size=800,1200")
    run(browser, tmp_path, page, *options)
    pixels = np.rint(matplotlib.image.imread(picture)[..., :3] * 255).astype(int)
    colours = {name: [int(value[i : i + 2], 16) for i in (1, 3, 5)] for name, value in palette.items()}
    assert pixels[4, 4].tolist() == colours["page"]
    for name in ("card", "fail", "ink"):
        assert (pixels == colours[name]).all(-1).sum() > 50, name
