"""Starts coordinators by fork, from a process that has imported them: a start costs a tenth of a second, not two.

Reads a JSON line {"arguments": [...], "log": path} for each, and answers {"pid": ...} and later
{"pid": ..., "code": ...}. What runs is the command `murmur`, in a session of its own. When its input ends, so do all.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import traceback
from typing import Any

import murmur.coordinator.serve  # noqa: F401  imported here, so that no child has to
from murmur.cli import main


def start(wanted: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["murmur", *wanted["arguments"]]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def say(value: dict[str, int]) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def serve() -> None:
    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    running: set[int] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        held = b""
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if ended in ready:
                os.read(ended, 4096)
            while running and (found := os.waitpid(-1, os.WNOHANG))[0]:
                running.discard(found[0])
                say({"pid": found[0], "code": os.waitstatus_to_exitcode(found[1])})
            if 0 in ready:
                data = os.read(0, 65_536)
                if not data:
                    break
                *lines, held = (held + data).split(b"\n")
                for line in lines:
                    running.add(pid := start(json.loads(line)))
                    say({"pid": pid})
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
