"""The site's own page in a real browser: a run waits for one site's yes, goes on with it, and the site is stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from murmur.clients.receipt import verify_receipt

from ..murmur.test_cli import TASK, murmur
from ..waiting import wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

NAMES = ("east", "north", "west")
RECIPE = """
name = "t"
task = "t"
rounds = 3
metrics = ["loss"]
cohort = {min = 3}
"""


class Sites:
    """A coordinator and three agents; west asks before it takes part."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.data, self._stack = folder, folder / "coordinator", stack
        self.task = folder / "task.py"
        self.task.write_text(TASK)
        (folder / "recipe.toml").write_text(RECIPE)
        self.begin("server", "coordinator", "serve", "--data", str(self.data), "--port", "0")
        self.until(lambda: (self.data / "operator.json").exists(), "the coordinator")
        for name in NAMES:
            join = json.loads(murmur("coordinator", "invite", name, "--data", self.data, "--json").out)["join"]
            home = folder / name
            done = murmur("client", "enroll", join, "--name", name, "--dir", home, "--task", f"t={self.task}:Line")
            assert done.code == 0, done.err
            if name == "west":
                with (home / "client.toml").open("a") as settings:
                    settings.write("\n[policy]\nask = true\n")
            murmur("coordinator", "approve", name, "--data", self.data)
            self.begin(name, "client", "join", "--dir", str(home))
        self.until(lambda: (folder / "west" / "site.json").exists(), "the page")

    def begin(self, name: str, *command: str) -> None:
        log = self._stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen([sys.executable, "-m", "murmur", *command], stdout=log, stderr=log)
        self._stack.callback(process.wait, 60)
        self._stack.callback(process.terminate)

    def until(self, condition, what: str, seconds: float = 120) -> None:
        try:
            wait_until(condition, seconds, what, every_s=0.1)
        except AssertionError as error:
            for path in self.folder.glob("*.log"):
                error.add_note(f"== {path.name}\n{path.read_text()[-2000:]}")
            raise

    def start_run(self) -> str:
        start = ("run", "start", self.folder / "recipe.toml", "--task", f"{self.task}:Line", "--data", self.data)
        subprocess.run([sys.executable, "-m", "murmur", *map(str, start)], check=True, capture_output=True, timeout=120)
        return json.loads(murmur("run", "list", "--data", self.data, "--json").out)[0]["id"]

    def state(self, run: str) -> str:
        return json.loads(murmur("run", "show", run, "--data", self.data, "--json").out)["run"]["state"]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    with ExitStack() as stack:
        yield Sites(tmp_path, stack)


def test_a_run_waits_for_a_sites_yes_and_the_site_is_stopped_in_its_browser(sites: Sites):
    west, complaints, asked = sites.folder / "west", [], []
    run = sites.start_run()
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(murmur("client", "site", "--dir", west).out.strip())
        page.get_by_role("heading", name="west").wait_for()
        page.get_by_role("link", name="Show what changed").or_(
            page.get_by_role("button", name="Approve")
        ).first.wait_for()
        page.reload()
        assert sites.state(run) == "running"
        page.get_by_role("button", name="Approve").click()
        page.get_by_text("It was approved").wait_for()
        address = f"http://{urlsplit(page.url).netloc}"
        page.goto(address)
        page.get_by_text("Delivered").first.wait_for()  # comes without a reload
        sites.until(lambda: sites.state(run) == "finished", "the end of the run")
        for path in ("/", "/sent", "/policy", f"/runs/{run}"):
            page.goto(address + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        with page.expect_download() as download:
            page.goto(address)
            page.get_by_role("button", name="Download").click()
        receipt = verify_receipt(Path(download.value.path()).read_bytes())
        page.get_by_text("Stop…").click()
        page.get_by_role("button", name="Stop west").click()
        page.get_by_text("Nothing is asked for").wait_for()
        assert complaints == [] and {urlsplit(url).netloc for url in asked} == {urlsplit(address).netloc}
        browser.close()
    updates = [m for m in receipt["sent"] if m["kind"] == "update"]
    assert receipt["consents"][0]["state"] == "approved" and all(m["masked"] for m in updates)
    assert len({m["sha256"] for m in updates}) >= 3 and (west / "stopped.json").exists()
    sites.until(lambda: "stopped by the site" in (sites.folder / "west.log").read_text(), "the agent's word", 20)
