"""Where a launcher has started this process: torchrun or Slurm tell each by its environment. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..protocol.errors import OperatorError

FIRST_PORT, PORTS = 20_000, 10_000  # of Slurm jobs that are given no address: below what Linux hands out by itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Rank `rank` of `world`: number `local` of the `here` on its machine, which is number `node` of `nodes`.

    host, port: of the store at which all ranks meet. served: whether the launcher holds that store; else rank 0 does.
    start: names this start of them, so that nothing meets what was left by the one before.
    """

    rank: int
    world: int
    local: int
    here: int
    node: int
    nodes: int
    host: str
    port: int
    served: bool = False
    start: str = ""


def place(environment: Mapping[str, str], rendezvous: str = "") -> Place:
    """This process's place, from torchrun's variables, or else from those that srun sets.

    rendezvous: "host:port" in place of what the launcher says. Raises OperatorError where no launcher has said enough.
    """
    if "RANK" in environment:
        found = _of_torchrun(environment, bool(rendezvous))
    elif "SLURM_PROCID" in environment:
        found = _of_slurm(environment)
    else:
        raise OperatorError(
            "no launcher has said which rank this is: start it on every node with torchrun (--no-python murmur client "
            "ranks) or with srun"
        )
    if not 0 <= found.rank < found.world or not 0 <= found.node < found.nodes:
        raise OperatorError(f"rank {found.rank} of {found.world} on node {found.node} of {found.nodes}: that cannot be")
    host, port, served = found.host, found.port, found.served
    if rendezvous:
        host, colon, number = rendezvous.rpartition(":")
        if not colon or not host or not number.isdecimal():
            raise OperatorError(f"--rendezvous {rendezvous} is no host:port of rank 0's machine")
        port, served = int(number), False
    return Place(
        rank=found.rank, world=found.world, local=found.local, here=found.here, node=found.node, nodes=found.nodes,
        host=host, port=port, served=served, start=found.start,
    )  # fmt: skip


def _of_torchrun(environment: Mapping[str, str], met_elsewhere: bool) -> Place:
    world, here = _number(environment, "WORLD_SIZE"), _number(environment, "LOCAL_WORLD_SIZE")
    return Place(
        rank=_number(environment, "RANK"),
        world=world,
        local=_number(environment, "LOCAL_RANK"),
        here=here,
        node=_number(environment, "GROUP_RANK"),
        nodes=_number(environment, "GROUP_WORLD_SIZE"),
        host="" if met_elsewhere else _text(environment, "MASTER_ADDR"),
        port=0 if met_elsewhere else _number(environment, "MASTER_PORT"),
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        start=f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )


def _of_slurm(environment: Mapping[str, str]) -> Place:
    job, node = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_NODEID")
    names = environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    tasks = tasks_per_node(_text(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if node >= len(tasks):
        raise OperatorError(f"SLURM_NODEID is {node}, and SLURM_TASKS_PER_NODE tells of {len(tasks)} nodes")
    return Place(
        rank=_number(environment, "SLURM_PROCID"),
        world=_number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local=_number(environment, "SLURM_LOCALID"),
        here=tasks[node],
        node=node,
        nodes=len(tasks),
        host=first_host(names),
        port=FIRST_PORT + job % PORTS,
        start=f"{job}.{environment.get('SLURM_STEP_ID', '0')}",
    )


def first_host(names: str) -> str:
    """The first of Slurm's list of nodes, as "gpu[07-09,12],big1": gpu07."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", names)
    if first is None:
        raise OperatorError(f"SLURM_NODELIST is {names!r}, which names no node")
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first[0])


def tasks_per_node(text: str) -> list[int]:
    """How many tasks Slurm runs on each node, from "4(x2),1": [4, 4, 1]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise OperatorError(f"SLURM_TASKS_PER_NODE is {text!r}, and not of the form 4(x2),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _text(environment: Mapping[str, str], *names: str) -> str:
    for name in names:
        if value := environment.get(name):
            return value
    raise OperatorError(f"the launcher has not set {names[-1]}: start this with torchrun or srun")


def _number(environment: Mapping[str, str], *names: str) -> int:
    text = _text(environment, *names)
    if not text.isdecimal():
        raise OperatorError(f"{names[-1]} is {text!r}, and not a number")
    return int(text)
