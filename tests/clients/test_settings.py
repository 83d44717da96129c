import re
import stat
import tomllib

import pytest

from murmur.clients.settings import Policy, TaskEntry, load_settings, parse_settings, with_tasks, write_settings
from murmur.protocol.encoding import b64, fingerprint
from murmur.protocol.errors import OperatorError

SMALLEST = {"name": "alpha", "coordinator": "https://host:8443"}
KEY = bytes(range(32))


def test_defaults_are_safe():
    policy = Policy()
    assert (policy.require_secure, policy.min_clients, policy.min_threshold) == (True, 3, 2)


def test_a_file_is_read_and_its_paths_are_made_absolute(tmp_path):
    (tmp_path / "client.toml").write_text(
        """
        name = "alpha"
        coordinator = "https://host:8443/"
        processes = 2
        [policy]
        min_clients = 5
        [tasks.xray]
        reference = "tasks/xray.py:XRay"
        options = {folder = "/data"}
        [tasks.digits]
        reference = "digits:Digits"
        [tasks.abs]
        reference = "/opt/task.py:Task"
        """
    )
    settings = load_settings(tmp_path)
    assert (settings.coordinator, settings.processes, settings.policy.min_clients) == ("https://host:8443", 2, 5)
    assert settings.workdir == tmp_path / "work" and settings.key_file == tmp_path / "identity.pem"
    assert {name: entry.reference for name, entry in settings.tasks.items()} == {
        "xray": f"{tmp_path}/tasks/xray.py:XRay",
        "digits": "digits:Digits",
        "abs": "/opt/task.py:Task",
    }
    assert settings.tasks["xray"].options == {"folder": "/data"}


def test_a_flower_app_is_a_task_by_its_module_its_file_or_its_folder(tmp_path, monkeypatch):
    (tmp_path / "client.toml").write_text(
        """
        name = "alpha"
        coordinator = "https://host:8443/"
        [tasks.module]
        flower = "pytorchexample.client_app:app"
        options = {node_config = {partition-id = 3}}
        [tasks.file]
        reference = "flower:apps/client.py:app"
        [tasks.folder]
        flower = "quickstart"
        """
    )
    settings = load_settings(tmp_path)
    assert {name: entry.reference for name, entry in settings.tasks.items()} == {
        "module": "flower:pytorchexample.client_app:app",
        "file": f"flower:{tmp_path}/apps/client.py:app",
        "folder": f"flower:{tmp_path}/quickstart",
    }
    assert settings.tasks["module"].options == {"node_config": {"partition-id": 3}}
    monkeypatch.chdir("/")
    more = with_tasks(settings, {"joined": TaskEntry(reference="flower:opt/app")})
    assert more.tasks == {**settings.tasks, "joined": TaskEntry(reference="flower:/opt/app")}
    with pytest.raises(OperatorError, match="has a task 'file' already"):
        with_tasks(settings, {"file": TaskEntry(reference="a:b")})
    with pytest.raises(OperatorError, match="join: tasks"):
        with_tasks(settings, {"No Name": TaskEntry(reference="a:b")})


def test_a_task_is_named_by_reference_or_by_flower_and_not_by_both(tmp_path):
    with pytest.raises(OperatorError, match="either reference or flower names the task"):
        parse_settings(SMALLEST | {"tasks": {"t": {"reference": "a:B", "flower": "a:app"}}}, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"procesess": 2}, "procesess: there is no such key; 'processes' is near"),
        ({"zzz": 2}, "zzz: there is no such key; there are name, coordinator"),
        (
            {"policy": {"requires_secure": False}},
            "policy.requires_secure: there is no such key; 'require_secure' is near",
        ),
        (
            {"tasks": {"t": {"reference": "a:B", "option": {}}}},
            "tasks.t.option: there is no such key; 'options' is near",
        ),
        ({"tasks": {"T": {"reference": "a:B"}}}, "tasks.T"),
        ({"tasks": {"t": {}}}, "tasks.t.reference: Field required"),
        ({"name": "Alpha/.."}, "name: String should match"),
        ({"coordinator": "host:8443"}, "https://host:port is needed"),
        ({"coordinator": "https://"}, "https://host:port is needed"),
        ({"coordinator": "https://user@host"}, "https://host:port is needed"),
        ({"coordinator": "https://[::1"}, "https://host:port is needed"),
        ({"coordinator": "http://example.org:80"}, "plain HTTP to example.org would show every request"),
        ({"parallel": {"date": 2}}, "parallel.date: there is no such key; 'data' is near"),
        ({"checkpoint_s": -1}, "checkpoint_s: Input should be greater"),
        ({"policy": {"share_errors": "most"}}, "policy.share_errors"),
        ({"policy": {"min_clients": 1}}, "policy.min_clients: Input should be greater"),
        ({"policy": {"trusted": {"beta": "abcd"}}}, "policy.trusted.beta: a fingerprint"),
        ({"policy": {"trusted": {"beta": b64(bytes(31))}}}, "policy.trusted.beta: a fingerprint"),
        ({"processes": 0}, "processes"),
        ({"processes": "many"}, "processes"),
        ({"proxy": "socks://x"}, "proxy"),
        ({"directory": "/x"}, "directory is not a key of this file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    with pytest.raises(OperatorError) as refused:
        parse_settings({**SMALLEST, **change}, tmp_path)
    assert words in refused.value.detail


@pytest.mark.parametrize(
    ("change", "ranks"),
    [
        ({}, "auto"),
        ({"processes": 4}, 4),
        ({"parallel": {"data": 2}}, 2),
        ({"processes": 4, "parallel": {"data": 2}}, 4),
        ({"parallel": {}}, "auto"),
    ],
)
def test_a_plan_of_the_site_says_how_many_processes_it_has(tmp_path, change, ranks):
    assert parse_settings({**SMALLEST, **change}, tmp_path).ranks == ranks


def test_plain_http_is_taken_on_loopback(tmp_path):
    assert (
        parse_settings({**SMALLEST, "coordinator": "http://127.0.0.1:1"}, tmp_path).coordinator == "http://127.0.0.1:1"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "enrol this client first"), (b"name = ", "is not TOML"), (b'name = "\xff"', "is not TOML")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "client.toml").write_bytes(content)
    with pytest.raises(OperatorError, match=words):
        load_settings(tmp_path)


def test_settings_come_back_from_the_file_they_were_written_to(tmp_path):
    values = {
        **SMALLEST,
        "processes": 3,
        "proxy": "http://proxy:3128",
        "parallel": {"data": 2},
        "policy": {"min_clients": 7, "require_secure": False, "trusted": {"beta.x": fingerprint(KEY), "c": b64(KEY)}},
        "tasks": {
            "x.ray": {
                "reference": "a:B",
                "options": {
                    "text": 'quote " back \\ line\n tab\t del\x7f ünï 𝄞',
                    "number": 1.5e-9,
                    "on": True,
                    "list": [1, "a", [False]],
                    "table": {"a b": 1, "ü": {"x": -2}},
                    "": "empty",
                },
            },
            "plain": {"reference": "c:D"},
        },
    }
    settings = parse_settings(values, tmp_path)
    path = write_settings(settings)
    assert load_settings(tmp_path) == settings
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tomllib.loads(path.read_text())["tasks"]["x.ray"]["options"] == values["tasks"]["x.ray"]["options"]


def test_a_written_file_is_never_overwritten(tmp_path):
    settings = parse_settings(SMALLEST, tmp_path)
    write_settings(settings)
    with pytest.raises(OperatorError, match="is enrolled"):
        write_settings(settings)


def test_the_smallest_file_holds_what_was_told_and_no_defaults(tmp_path):
    settings = parse_settings({**SMALLEST, "tasks": {"t": {"reference": "a:B"}}}, tmp_path)
    assert tomllib.loads(write_settings(settings).read_text()) == {
        **SMALLEST,
        "tasks": {"t": {"reference": "a:B", "options": {}}},
    }


def test_what_may_be_changed_stands_in_the_file_with_its_default(tmp_path):
    text = write_settings(parse_settings(SMALLEST, tmp_path)).read_text()
    assert "\n# checkpoint_s = 60.0    # seconds between two checkpoints" in text
    assert "\n# resume = true    # keep on disk what a killed agent needs" in text
    live = re.sub(r"^# (?=\[policy\]|\w+ = )", "", text, flags=re.MULTILINE)
    (tmp_path / "client.toml").write_text(live)
    assert load_settings(tmp_path) == parse_settings(SMALLEST, tmp_path)


def test_an_option_that_toml_cannot_hold_is_refused(tmp_path):
    settings = parse_settings(SMALLEST, tmp_path)
    settings = settings.model_copy(update={"tasks": {"t": TaskEntry(reference="a:B", options={"x": None})}})
    with pytest.raises(OperatorError, match="cannot hold None"):
        write_settings(settings)


def test_a_trusted_key_is_given_as_a_fingerprint_or_whole():
    policy = Policy(trusted={"a": fingerprint(KEY), "b": b64(KEY)})
    assert policy.key_is_trusted("a", KEY) is True and policy.key_is_trusted("b", KEY) is True
    assert policy.key_is_trusted("a", bytes(32)) is False and policy.key_is_trusted("b", bytes(32)) is False
    assert policy.key_is_trusted("c", KEY) is None
