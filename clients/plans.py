"""Which plans cannot train a job, told before a process starts. No torch here."""

from __future__ import annotations

from ..protocol.errors import OperatorError
from .job import Job

# Of torch.optim: each element of a weight moves by its own history, so a part of a weight moves as within the whole.
ELEMENTWISE = frozenset(
    {"SGD", "ASGD", "Adagrad", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"}
)


def check_plan(job: Job, gpus: int) -> None:
    """Raise OperatorError, which says what would work, where this job cannot be trained by its plan.

    gpus: of this machine.
    """
    plan = job.parallel
    if plan.offload and not gpus:
        raise OperatorError(
            "parallel.offload moves weights from GPUs to the machine's memory, and there is no GPU: set offload = false"
        )
    if job.kind == "evaluate":
        return
    if job.dp.mode == "local" and (plan.model > 1 or plan.activation_checkpoint):
        raise OperatorError(
            "local differential privacy needs the gradients of single examples, on a process that has the whole model: "
            "spread the data only (parallel.data), without activation_checkpoint"
        )
    train = job.train
    alone = {
        'strategy.name = "scaffold"': job.algorithm == "scaffold",
        "train.distill": train.distill.weight > 0,
        "train.compile": train.compile,
        "train.qat": train.qat,
        "train.keep_zeros": train.keep_zeros,
    }
    for setting, asked in alone.items():
        if plan.model > 1 and asked:
            raise OperatorError(
                f"{setting} needs the whole model on each process: spread the data only (parallel.data), or leave it "
                "out"
            )
    if plan.shard * plan.tensor > 1 and job.train.optimizer not in ELEMENTWISE:
        raise OperatorError(
            f"train.optimizer = {job.train.optimizer!r} looks at whole weights, of which each process has a part: use "
            f"one of {', '.join(sorted(ELEMENTWISE))}, or set parallel.shard and parallel.tensor to 1"
        )
