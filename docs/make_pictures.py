"""Make the README's picture from a real run: start the demo, open its run page in chromium, light and dark.

.venv/bin/python docs/make_pictures.py        needs the test extra and Debian's chromium
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1280, 1010
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "murmur", "demo", "--dir", f"{folder}/demo"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
            try:
                assert demo.stdout is not None
                text = ""
                for line in demo.stdout:
                    text += line
                    if "round 15 of" in line:
                        break
                link = re.search(r"http://\S+link=\S+", text)
                assert link, text
                take(link.group())
            finally:
                demo.terminate()


def take(link: str) -> None:
    """Screenshots of the running run's page."""
    site = link.partition("/login")[0]
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(link)
        page.wait_for_url(f"{site}/")
        page.goto(f"{site}/runs")
        page.locator("main a[href^='/runs/']").first.click()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # pyright: ignore
            page.wait_for_timeout(700)
            page.screenshot(path=str(IMAGES / f"run-{scheme}.png"))
        browser.close()


if __name__ == "__main__":
    main()
