"""What the scripts of the peers share. Beside it only simulated_models, torch and safetensors are imported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Rounds:
    """Seconds, and CPU seconds of this process and all below it, of each round."""

    def __init__(self) -> None:
        self.seconds, self.cpu_s = list[float](), list[float]()

    def begin(self) -> None:
        self._began, self._cpu_s = time.monotonic(), cpu_s()

    def end(self) -> None:
        self.seconds.append(time.monotonic() - self._began)
        self.cpu_s.append(cpu_s() - self._cpu_s)

    def write(self, asked: dict[str, Any], module: torch.nn.Module, *packages: str) -> None:
        versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
        save_file({name: t.contiguous() for name, t in module.state_dict().items()}, asked["model"])
        found = {"seconds": self.seconds, "cpu_s": self.cpu_s, "versions": versions}
        Path(asked["result"]).write_text(json.dumps(found))


@cache
def loaded(path: str) -> dict[str, torch.Tensor]:
    """A file's tensors, read once in each process, which then computes on one thread."""
    torch.set_num_threads(1)
    return load_file(path)


def cpu_s() -> float:
    """Of this process and all that it has started, alive; Linux."""
    parents, spent = dict[int, int](), dict[int, float]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        spent[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return sum(s for pid, s in spent.items() if ours(pid))
