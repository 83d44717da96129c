"""Distillation from the round's model: what is trained is also held to what the incoming model answers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...protocol.errors import OperatorError
from ...protocol.sections import Distill
from ..task import optional
from .session import Session

# B = examples of a piece, C = classes


class Teacher:
    """The round's version as it came, which answers beside the model in training; a second model in memory.

    Its answers are taken without dropout and with the incoming statistics, and train nothing.
    Source: Yao et al. 2021, "Local-Global Knowledge Distillation in Heterogeneous Federated Learning with Non-IID
    Data" (FedGKD), section 3, arXiv:2107.00051, with the one global model of the round.
    """

    def __init__(self, session: Session, settings: Distill) -> None:
        """To be made while the session's model holds the round's version."""
        assert session.task is not None, "load() sets it"
        self.settings, self.own = settings, optional(session.task, "distill")
        self.module = copy.deepcopy(session.module).eval().requires_grad_(requires_grad=False)

    def loss(self, inputs: Any, output: Any) -> Tensor:
        """What is added to the task's loss, a sum over the batch as well."""
        with torch.no_grad():
            answer = self.module(inputs)
        return self.settings.weight * (
            self.own(output, answer) if self.own else divergence(output, answer, self.settings.temperature)
        )


def divergence(output_BC: Any, answer_BC: Any, temperature: float) -> Tensor:
    """The sum over examples of T^2 * KL(teacher | student), both softened by T; T^2 keeps the gradients' size.

    Raises OperatorError for outputs that are no logits of examples by classes.
    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2, arXiv:1503.02531.
    """
    for given in (output_BC, answer_BC):
        if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point():
            what = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise OperatorError(
                f"train.distill compares logits of shape (examples, classes), and the model gives {what}: write "
                "distill(output, teacher_output) in the task, a sum over the batch"
            )
    student, teacher = (functional.log_softmax(x.float() / temperature, 1) for x in (output_BC, answer_BC))
    return functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
