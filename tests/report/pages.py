"""What pages promise, whatever they show; and a browser, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedgraft.report.template import fill

SORTS = fill("sort.html")
OUTSIDE = r"fetch|XMLHttpRequest|import|src|http|WebSocket|eval|cookie|localStorage"


def only_sorts(page: str) -> bool:
    """Whether the one script of a page is the one that sorts, which asks nobody for anything."""
    scripts = re.findall(r"<script.*?</script>", page, re.DOTALL)
    return scripts == [SORTS] and not re.search(OUTSIDE, SORTS)


def browser() -> str:
    """The browser; the test is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here: sorting is tried in one")
    return found


def after(page: str, script: str, place: Path) -> str:
    """The page as it stands once a browser has shown it and run a script."""
    file = place / "page.html"
    play = f"<script>addEventListener('load', () => {{ {script} }});</script>"
    file.write_text(page.replace("</body>", play + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={place}/profile"]
    done = subprocess.run(
        [browser(), *flags, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout
