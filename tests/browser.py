"""Pages in headless Chromium: what it complains about, and what became of the pictures."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing here is part of the page: it reports on a copy of it, from outside the page's policy.
_PROBE = """
<script>
window.addEventListener("load", () => {
  const pictures = [...document.images].map(i => [i.alt, i.complete, i.naturalWidth]);
  const fetched = performance.getEntriesByType("resource").map(e => e.name);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const report = document.createElement("pre");
  report.id = "report";
  report.textContent = JSON.stringify({ pictures, fetched, wide });
  document.body.append(report);
});
</script>
"""
_FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --enable-logging=stderr --v=0
""".split()


@dataclasses.dataclass(frozen=True)
class Opened:
    """pictures: (alt, loaded, width in pixels). fetched: addresses of resources. wide: pixels that
    the page is wider than the window. console: what scripts and the browser had to say."""

    pictures: list[tuple[str, bool, int]]
    fetched: list[str]
    wide: int
    console: list[str]


def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def open_page(browser: str, page: Path, folder: Path, width: int = 1200) -> Opened:
    """Opens a page as it is for the console, and a copy that reports on itself.

    Args:
        folder: for the copy and the browser's profile.
    """
    console = _messages(_run(browser, page, folder, width).stderr)
    text = page.read_text()
    # The page's own policy would refuse the probe.
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert copy != text
    probed = folder / "probed.html"
    probed.write_text(copy.replace("</body>", f"{_PROBE}</body>"))
    dom = _run(browser, probed, folder, width).stdout
    found = re.search(r'<pre id="report">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    report = json.loads(html.unescape(found[1]))
    pictures = [tuple(picture) for picture in report["pictures"]]
    return Opened(pictures, report["fetched"], report["wide"], console)


def _run(browser: str, page: Path, folder: Path, width: int) -> subprocess.CompletedProcess:
    # A profile for each start: a browser that ends late would keep the next one out.
    profile = folder / f"profile-{len(list(folder.iterdir()))}"
    flags = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},1000"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done


def _messages(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]
