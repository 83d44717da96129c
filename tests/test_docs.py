"""The pages: their links lead somewhere, and the table of settings is whole."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from murmur.coordinator.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)\"""")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [a or b for a, b in LINK.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path):
    broken: list[str] = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_operators_table_names_every_setting_and_no_other():
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    named = re.findall(r"^\| .*\| `MURMUR_(\w+)` \|", section, re.MULTILINE)
    assert [name.lower() for name in named] == list(Settings.model_fields)


def test_every_test_that_the_threats_name_is_there():
    text = (ROOT / "docs" / "threats.md").read_text()
    named = re.findall(r"`([a-z_0-9/]+\.py)::(\w+)`", text)
    tests = {file: (ROOT / "tests" / file).read_text() for file in {file for file, _ in named}}
    assert len(named) > 40 and not [(file, name) for file, name in named if f"def {name}(" not in tests[file]]


def test_every_file_that_the_architecture_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`", text)
    roots = [ROOT, ROOT / "coordinator", ROOT / "clients"]
    assert named and not [name for name in named if not any((root / name).exists() for root in roots)]


@pytest.mark.parametrize("folder", ["coordinator", "coordinator/store", "coordinator/blobs"])
def test_the_architecture_names_every_file_of_the_coordinator(folder: str):
    text = (ROOT / "docs" / "architecture.md").read_text()
    plain = {"__init__.py", "migrate.py", "tables.py", "times.py"}  # what they are their names say
    files = {p.name for p in (ROOT / folder).glob("*.py")} - plain
    prefix = folder.removeprefix("coordinator").removeprefix("/")
    assert not {name for name in files if f"`{prefix + '/' if prefix else ''}{name}`" not in text}


def test_the_page_of_commands_is_the_command_lines():
    spec = spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
    assert spec and spec.loader
    maker = module_from_spec(spec)
    spec.loader.exec_module(maker)
    published = (ROOT / "docs" / "commands.md").read_text()
    assert published == maker.page(), "write it anew: python docs/make_commands.py > docs/commands.md"
