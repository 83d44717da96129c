import pytest

from murmur.protocol.mistakes import line_of

TEXT = """name = "a"
rounds = 0

[train]          # what a client does
lr = 1
optimizer_options = {momentum = 2}

[train.mixture]
mode = "x"
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("rounds",), 2),
        (("train", "lr"), 5),
        (("train", "optimizer_options", "momentum"), 6),
        (("train", "mixture", "mode"), 9),
        (("train", "mixture", "weights"), 8),  # not there: its table is
        (("train",), 4),
        (("task",), None),
    ],
)
def test_a_key_is_found_on_its_line_of_the_file(path, line):
    assert line_of(TEXT, path) == line
