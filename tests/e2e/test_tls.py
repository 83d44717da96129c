"""Enrolment and work over TLS, as it is by default: the real server, the real commands, a real agent."""

import json
import subprocess
import sys
from pathlib import Path

from ..murmur.test_cli import TASK, murmur
from ..waiting import wait_until

RECIPE = 'name = "t"\ntask = "t"\nrounds = 1\nmetrics = ["loss"]\n[cohort]\nmin = 1\n[secure]\non = false\n'


def test_an_agent_enrols_trains_and_delivers_over_tls(tmp_path: Path):
    data, folder, task = tmp_path / "coordinator", tmp_path / "clinic", tmp_path / "task.py"
    task.write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    serve = [sys.executable, "-m", "murmur", "coordinator", "serve", "--data", str(data), "--port", "0"]
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(serve, stdout=log, stderr=log) as server:
        try:
            wait_until((data / "operator.json").exists, 30, "the coordinator", log=tmp_path / "log")
            assert json.loads((data / "operator.json").read_text())["url"].startswith("https://")
            join = json.loads(murmur("coordinator", "invite", "clinic", "--data", data, "--json").out)["join"]
            assert join.startswith("murmur://") and "?ca=" in join
            wrong = join[:-4] + ("0000" if join[-4:] != "0000" else "1111")
            refused = murmur("client", "enroll", wrong, "--name", "clinic", "--dir", tmp_path / "wrong")
            assert refused.code == 1 and "another machine answers" in " ".join(refused.err.split())
            enroll = ("client", "enroll", join, "--name", "clinic", "--dir", folder, "--task", f"t={task}:Line")
            assert murmur(*enroll).code == 0
            with (folder / "client.toml").open("a") as settings:
                settings.write("\n[policy]\nrequire_secure = false\n")  # one client cannot hide among others
            murmur("coordinator", "approve", "clinic", "--data", data)
            agent_log = (tmp_path / "agent.log").open("wb")
            command = [sys.executable, "-m", "murmur", "client", "join", "--dir", str(folder)]
            with agent_log, subprocess.Popen(command, stdout=agent_log, stderr=agent_log) as agent:
                try:
                    start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{task}:Line", "--data", data)
                    done = murmur(*start, "--watch")
                    assert done.code == 0, done.err + done.out + (tmp_path / "agent.log").read_text()
                    assert "is finished" in done.out
                finally:
                    agent.terminate()
                    assert agent.wait(60) == 0
        finally:
            server.terminate()
            assert server.wait(60) == 0
