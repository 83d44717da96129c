"""What a machine has for training: Python and packages, GPUs against torch and the driver, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from murmur import __version__
from murmur.clients.finding import Finding, green, red, yellow

EXTRAS = {  # what each extra brings, and what it is for
    "opacus": ("dp", "local differential privacy"),
    "optuna": ("tune", "murmur tune"),
    "psycopg": ("postgres", "a coordinator on PostgreSQL"),
    "obstore": ("s3", "models in a bucket"),
    "ray": ("ray", "simulations over many machines"),
}
LEAST_SHARED, LEAST_MEMORY, LEAST_DISK = 1 << 30, 2 << 30, 5 << 30  # bytes below which something is said
NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "glusterfs", "ceph", "lustre", "beegfs", "afs")


def machine() -> Iterator[Finding]:
    """All that can be said of a machine before anything of Murmur's is set up on it."""
    yield green("murmur", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield from _torch()
    missing = [f"{extra} ({use})" for package, (extra, use) in EXTRAS.items() if find_spec(package) is None]
    yield green("extras", "not installed: " + ", ".join(missing) if missing else "all installed")
    yield from memory(_meminfo())
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < LEAST_SHARED:
        yield yellow("shared memory", f"{size >> 20} MB: simulations would write models to the disk instead",
                     "in a container, start it with --shm-size=2g")  # fmt: skip
    yield disk(Path.cwd())


@dataclass(frozen=True, kw_only=True, slots=True)
class Cuda:
    """What torch and the system say of GPUs. built_for: CUDA that torch was built with; None: a build for CPUs."""

    driver: str | None
    built_for: str | None
    names: tuple[str, ...]
    warned: str


def _torch() -> Iterator[Finding]:
    try:
        found = version("torch")
    except PackageNotFoundError:
        yield red("torch", "not installed: this machine can coordinate, not train", "pip install murmur")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch

        names = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        available = torch.cuda.is_available()
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} processors"
    yield green("torch", f"{found}, {threads}")
    yield gpus(
        Cuda(
            driver=_driver(),
            built_for=torch.version.cuda,
            names=names if available else (),
            warned=" ".join(str(w.message) for w in caught),
        )
    )


def gpus(cuda: Cuda) -> Finding:
    """Whether torch can use the GPUs that the machine has, and what to do where it cannot."""
    if cuda.names:
        return green("GPU", f"{len(cuda.names)} x {cuda.names[0]}, driver {cuda.driver or '?'}, CUDA {cuda.built_for}")
    if cuda.driver is None:
        return green("GPU", "none: training runs on the processor")
    if cuda.built_for is None:
        return red("GPU", f"there is a driver ({cuda.driver}), but this torch is a build for processors only",
                   "install torch from https://pytorch.org/get-started for the driver's CUDA")  # fmt: skip
    if "too old" in cuda.warned:
        said = f"the driver {cuda.driver} is too old for this torch, which was built for CUDA {cuda.built_for}"
        return red("GPU", said, "update the driver, or install a torch that was built for an older CUDA")
    return red("GPU", f"there is a driver ({cuda.driver}), and torch for CUDA {cuda.built_for} finds no device",
               "see whether nvidia-smi shows one, whether CUDA_VISIBLE_DEVICES hides it, and in a container whether "
               "it was started with --gpus all")  # fmt: skip


def _driver() -> str | None:
    """The version of NVIDIA's kernel module, where it is loaded."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "?")


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}


def memory(info: dict[str, int]) -> Iterator[Finding]:
    """info: bytes by their name in /proc/meminfo; empty where there is none."""
    if "MemAvailable" not in info:
        return
    free, total = info["MemAvailable"], info["MemTotal"]
    said = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < LEAST_MEMORY:
        yield yellow("memory", said, "end what is not needed: a training process begins at half a GB")
    else:
        yield green("memory", said)


def disk(place: Path, subject: str = "disk") -> Finding:
    """Room where a folder lies."""
    free = shutil.disk_usage(place).free
    said = f"{free / 1e9:.1f} GB free at {place}"
    return yellow(subject, said, "make room, or choose another folder") if free < LEAST_DISK else green(subject, said)


def network_disk(place: Path, mounts: str | None = None) -> str:
    """The kind of the network file system that a folder lies on; empty for a local disk. mounts: as /proc/mounts."""
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text()
        except OSError:
            return ""
    best, kind = "", ""
    for fields in (line.split() for line in mounts.splitlines()):
        at = fields[1].replace("\\040", " ") if len(fields) > 2 else ""
        if at and len(at) >= len(best) and place.resolve().is_relative_to(at):
            best, kind = at, fields[2]
    return kind if kind.startswith(NETWORK) else ""
