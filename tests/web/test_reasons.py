"""Reasons of the coordinator and of sites in the viewer's language, by the shapes that they have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from murmur.web.language import speaking
from murmur.web.reasons import SENTENCES, told
from murmur.web.refusals import in_words

ROOT = Path(__file__).parents[2]
CODE = [
    (ROOT / "protocol" / "audit.py"),
    (ROOT / "protocol" / "views.py"),
    *(ROOT / "coordinator").rglob("*.py"),
    *(ROOT / "clients").glob("*.py"),
    *(ROOT / "privacy" / "dp").glob("*.py"),
]


@pytest.fixture(scope="module")
def written() -> str:
    """The code that writes them, with the literals that run over several lines put together."""
    return re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in CODE))


@pytest.mark.parametrize("sentence", SENTENCES)
def test_each_shape_is_one_that_is_written(sentence: str, written: str) -> None:
    for piece in re.split(r"\{\w+\}|: |, ", sentence):
        assert piece.strip(" .;") in written, piece


def test_a_reason_of_a_known_shape_keeps_its_numbers_and_another_stays() -> None:
    reason = "not heard for 60 s while collecting"
    assert told(reason) == "not heard for 60 s while training and sending"
    with speaking("zh-Hans"):
        assert told(reason) == "在训练和发送时 60 秒没有消息"
        assert (
            told("the disk of the coordinator's blobs is full: 1.2 GB are free")
            == "协调器存放数据的磁盘已满：可用 1.2 GB"
        )
        assert told("out of memory on a {strange} device") == "out of memory on a {strange} device"


def test_a_site_s_own_reason_is_told_with_what_it_is_about() -> None:
    why = "the run trains without local differential privacy, and this site allows its data an epsilon of 3"
    assert in_words(f"privacy_refusal:policy_dp: {why}").endswith(f"({why})")
    with speaking("zh-Hans"):
        assert told(why) == "此运行的训练不使用本地差分隐私，而本站点为其数据设定了 ε 上限 3"
        assert in_words(f"privacy_refusal:policy_dp: {why}").endswith(f"({told(why)})")
