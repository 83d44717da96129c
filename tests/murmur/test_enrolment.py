import pytest

from murmur.clients.settings import TaskEntry
from murmur.enrolment import flower_tasks
from murmur.protocol.errors import OperatorError


def test_flower_apps_on_the_command_line_are_tasks_by_name():
    found = flower_tasks(["app.client:app", "digits=./digits"], {"partition-id": 3}, {})
    options = {"node_config": {"partition-id": 3}}
    assert found == {
        "flower": TaskEntry(reference="flower:app.client:app", options=options),
        "digits": TaskEntry(reference="flower:./digits", options=options),
    }


@pytest.mark.parametrize(
    ("apps", "node_config", "words"),
    [([], {"partition-id": 3}, "are for the app that --flower names"), (["a:b", "c:d"], {}, "two Flower apps")],
)
def test_what_cannot_be_meant_is_refused_with_words(apps, node_config, words):
    with pytest.raises(OperatorError, match=words):
        flower_tasks(apps, node_config, {})
