"""Where launchers say a rank is: variables as torchrun and srun set them."""

from __future__ import annotations

import pytest

from murmur.clients.places import first_host, place, tasks_per_node
from murmur.protocol.errors import OperatorError

# Of the third process of torchrun --nnodes 2 --nproc-per-node 2, as torch 2.13 sets them.
TORCHRUN = {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
# Of the last task of srun --nodes 3 --ntasks 9, by the names in srun's manual, "output environment variables".
SLURM = {
    "SLURM_PROCID": "8", "SLURM_NTASKS": "9", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "4", "SLURM_NODELIST": "gpu[07-09]", "SLURM_TASKS_PER_NODE": "4(x2),1",
}  # fmt: skip


def test_torchrun_says_all():
    found = place(TORCHRUN)
    assert (found.rank, found.world, found.local, found.here, found.node, found.nodes) == (2, 4, 0, 2, 1, 2)
    assert (found.host, found.port, found.served, found.start) == ("node0", 29500, True, "run/3")


def test_slurm_says_all_but_where_to_meet_which_is_the_first_node_at_a_port_of_the_job():
    found = place(SLURM)
    assert (found.rank, found.world, found.local, found.here, found.node, found.nodes) == (8, 9, 0, 1, 2, 3)
    assert (found.host, found.port, found.served, found.start) == ("gpu07", 24567, False, "1234567.4")


def test_a_step_may_have_fewer_nodes_than_its_allocation():
    step = {"SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    found = place(SLURM | step | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"})
    assert (found.world, found.here, found.nodes, found.host) == (2, 2, 1, "gpu08")


def test_torchrun_inside_of_slurm_counts():
    assert place(SLURM | TORCHRUN).rank == 2


def test_another_meeting_place_is_held_by_rank_0_and_not_by_the_launcher():
    found = place(TORCHRUN, "10.0.0.1:4000")
    assert (found.host, found.port, found.served) == ("10.0.0.1", 4000, False)


@pytest.mark.parametrize(
    ("names", "first"),
    [("gpu[07-09,12],big1", "gpu07"), ("a,b", "a"), ("only", "only"), ("r[2-3]n[01,05]", "r2n01"), ("n[5]", "n5")],
)
def test_the_first_of_slurms_nodes(names, first):
    assert first_host(names) == first


def test_tasks_of_each_node():
    assert tasks_per_node("4(x2),1") == [4, 4, 1] and tasks_per_node("3") == [3]


@pytest.mark.parametrize(
    ("environment", "rendezvous", "words"),
    [
        ({}, "", "start it on every node with torchrun"),
        ({k: v for k, v in TORCHRUN.items() if k != "GROUP_RANK"}, "", "has not set GROUP_RANK"),
        (TORCHRUN | {"RANK": "two"}, "", "RANK is 'two', and not a number"),
        (TORCHRUN | {"RANK": "4"}, "", "rank 4 of 4"),
        (TORCHRUN, "node0", "no host:port"),
        (SLURM | {"SLURM_TASKS_PER_NODE": "many"}, "", "SLURM_TASKS_PER_NODE is 'many'"),
        (SLURM | {"SLURM_NODEID": "3"}, "", "tells of 3 nodes"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment, rendezvous, words):
    with pytest.raises(OperatorError, match=words):
        place(environment, rendezvous)
