"""Make the pictures of README and docs from a real run: the demo's hospitals, its pages in chromium, light and dark.

.venv/bin/python docs/make_pictures.py        needs the test extra and Debian's chromium
.venv/bin/python docs/make_pictures.py LINK RUN   of a coordinator that is up: its login link, and a run in its course
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from murmur.client import Client, find_access
from murmur.protocol.recipe import load_recipe

IMAGES = Path(__file__).parent / "images"
HOSPITALS = Path(__file__).parents[1] / "examples" / "hospitals"
DP = {
    "cohort__size": 4,
    "train__epochs": 20,  # so that a round lasts long enough to be seen
    "dp__mode": "distributed",
    "dp__clip_norm": 1.0,
    "dp__noise_multiplier": 0.7,
    "dp__budget": 120.0,
}
WIDTH = 1280
MOST = 250_000  # bytes of a picture: they lie in the repository
COLOURS = 256
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main(*given: str) -> None:
    if given:
        return take(*given)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "murmur", "demo", "--rounds", "3", "--dir", f"{folder}/demo"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
            try:
                assert demo.stdout is not None
                text = ""
                for line in demo.stdout:
                    text += line
                    if "stays up" in line:
                        break
                link = re.search(r"http://\S+link=\S+", text)
                assert link, text
                take(link.group(), in_its_course(Path(folder) / "demo"))
            finally:
                demo.terminate()


def in_its_course(demo: Path) -> str:
    """A run of the demo's hospitals with differential privacy, once it is in round 16."""
    recipe = load_recipe(HOSPITALS / "recipe.toml", metrics=["loss", "accuracy"], name="heart-dp", **DP)
    with Client(find_access(demo / "coordinator")) as coordinator:
        for name, n in (("production", 1), ("production", 2), ("staging", 3)):
            coordinator.promote(coordinator.runs()[-1].id, n, name)
        run = coordinator.start_run(recipe, demo / "first.safetensors")
        while coordinator.run(run).run.round < 15:
            time.sleep(0.2)
    return run


def take(link: str, run: str) -> None:
    """Pictures of the run in its course, and of the pages around it."""
    site = link.partition("/login")[0]
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(link)
        page.wait_for_url(f"{site}/")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # pyright: ignore
            page.set_viewport_size({"width": WIDTH, "height": 1140})
            page.goto(f"{site}/runs/{run}")
            page.get_by_text("Masked update sent").nth(1).wait_for()  # some have sent, others train
            keep(page, f"run-{scheme}")
            page.set_viewport_size({"width": WIDTH, "height": 1010})
            page.locator("#h-sum").evaluate("sum => scrollTo(0, sum.closest('.card').offsetTop - 24)")
            keep(page, f"run-privacy-{scheme}")
            page.set_viewport_size({"width": WIDTH, "height": 760})
            page.goto(f"{site}/models")
            keep(page, f"models-{scheme}")
        browser.close()


def keep(page: Page, name: str) -> None:
    """What the page shows as a PNG, with a palette where Pillow is installed: a third of the bytes."""
    path = IMAGES / f"{name}.png"
    page.wait_for_timeout(700)
    path.write_bytes(page.screenshot())
    try:
        from PIL import Image
    except ImportError:
        pass
    else:
        picture = Image.open(path).convert("RGB")
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MOST, f"{path} has {path.stat().st_size} bytes"


if __name__ == "__main__":
    main(*sys.argv[1:])
