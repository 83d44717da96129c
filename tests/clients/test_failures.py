import pytest

from murmur.clients.failures import CHARACTERS, describe, scrub
from murmur.protocol.errors import BadUpdate, PrivacyRefusal
from murmur.protocol.messages import Failure


@pytest.mark.parametrize(
    ("error", "share", "told"),
    [
        (BadUpdate("element 3 is nan"), True, ("bad_update", "element 3 is nan")),
        (BadUpdate("element 3 is nan"), False, ("bad_update", "The update cannot be counted")),
        (ValueError("row 5: Jane Doe"), True, ("client_error", "ValueError: row 5: Jane Doe")),
        (ValueError("row 5: Jane Doe"), False, ("client_error", "ValueError")),
        (PrivacyRefusal("too_few", "2 of 3"), False, ("privacy_refusal:too_few", "2 of 3")),
    ],
)
def test_a_coordinator_is_told_what_the_site_allows(error, share, told):
    assert describe(error, share=share) == told
    code, detail = told
    Failure(fence=1, code=code, detail=detail)


def test_the_last_lines_are_kept():
    assert scrub("one\n\ntwo\nthree\r\n  four  \n\n") == "two\nthree\nfour"


def test_what_a_terminal_would_obey_is_taken_out():
    assert scrub("a\x1b[31mred\x07 \u202eleft\u2028x") == "a [31mred   left\nx"


def test_a_long_text_keeps_its_end():
    found = scrub("x" * 5000 + "the end")
    assert len(found) == CHARACTERS and found.startswith("…") and found.endswith("xthe end")
