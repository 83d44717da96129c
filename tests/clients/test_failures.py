import re

import pytest

from murmur.clients.failures import CHARACTERS, describe, scrub
from murmur.clients.trainer import OutOfMemory, TrainerFailed
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


TRACEBACK = """Traceback (most recent call last):
  File "/opt/murmur/clients/engine/loop.py", line 90, in _train
    loss = session.loss(output, target)
  File "/srv/hospital a/tasks/xray.py", line 31, in loss
    weight = self.weights[patient]
  File "/usr/lib/python3.11/site-packages/torch/x.py", line 7, in get
KeyError: 'patient 123'
"""


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (True, "weight = self.weights[patient]\nFile \"x.py\", line 7, in get\nKeyError: 'patient 123'"),
        ("place", "Training failed: KeyError (xray.py, line 31, in loss)"),
        (False, "Training failed: KeyError"),
    ],
)
def test_a_trainers_error_is_told_by_its_words_its_place_or_its_kind(share, told):
    assert describe(TrainerFailed(0, "KeyError", TRACEBACK), share=share) == ("trainer_failed", told)


def test_the_agents_own_error_has_a_place_as_well():
    try:
        raise KeyError("patient 123")
    except KeyError as error:
        code, detail = describe(error, share="place")
    place = r"KeyError \(test_failures.py, line \d+, in test_the_agents_own_error_has_a_place_as_well\)"
    assert code == "client_error" and re.fullmatch(place, detail)


@pytest.mark.parametrize("share", [True, "place", False])
def test_out_of_memory_has_its_own_code_and_says_what_to_do(share):
    error = OutOfMemory(1, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 MiB.")
    code, detail = describe(error, share=share)
    assert code == "out_of_memory" and "a smaller train.micro_batch needs less of it" in detail
    assert ("20.00 MiB" in detail) is (share is True)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "[Errno 2] No such file or directory: '/data/Jane Doe/scan 1.dcm'",
            "[Errno 2] No such file or directory: '…'",
        ),
        ("cannot read /data/Jane Doe/scan.dcm, gave up", "cannot read …, gave up"),
        ("cannot read ~/scans/7.dcm", "cannot read …"),
        ("cannot read C:\\scans\\7.dcm", "cannot read …"),
        ('File "/srv/tasks/xray.py", line 3', 'File "xray.py", line 3'),
        ("there is no file /srv/xray.py (looked in /home/jane)", "there is no file xray.py (looked in …)"),
        ("'/srv/site a/xray.py:XRay' gave a list", "'xray.py:XRay' gave a list"),
        ("x=/data/a", "x=…"),
        ("3/4 of 1.5 MB/s, and/or https://host:8443/v1/blobs", "3/4 of 1.5 MB/s, and/or https://host:8443/v1/blobs"),
        ("a / b", "a / b"),
    ],
)
def test_paths_of_this_machine_stay_here(text, left):
    assert scrub(text) == left
