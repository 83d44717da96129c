"""Every reason to refuse that stands anywhere in the code has words that pages show, and no words are left over."""

import ast
from pathlib import Path

from murmur.protocol.refusals import REASONS
from murmur.web.refusals import in_words

ROOT = Path(__file__).parents[2]


def test_every_reason_has_words_and_all_words_are_used():
    used: set[str] = set()
    for folder in ("privacy", "clients", "coordinator", "simulation"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                    reason = node.args[0]
                    if node.func.id in ("refusal", "PrivacyRefusal") and isinstance(reason, ast.Constant):
                        used.add(str(reason.value))
    assert used == REASONS.keys()


def test_the_words_are_what_the_pages_say():
    for reason, words in REASONS.items():
        assert in_words(f"privacy_refusal:{reason}: 3 of 4") == f"refused: {words} (3 of 4)"
        assert words[0].islower() and not words.endswith(".")
