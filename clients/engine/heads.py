"""Several tasks on one trunk: what each task's loss weighs, fixed or learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...protocol.errors import OperatorError


class TaskWeights(nn.Module):
    """One number per task, learned with the model: s = log σ², the uncertainty that the task's loss is left with.

    It belongs into the model, whose forward() gives `weights()` out with the heads' outputs; the task's loss then is
    `TaskWeights.total(output["weights"], losses, counts)`. Per example a task adds exp(-s) · loss + s / 2, and half of
    the first term where it is a regression by squared error. At the optimum exp(s) is a classification's mean loss
    times two, a regression's mean squared error, so that no task drowns the others by its unit.
    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", section 3,
    arXiv:1705.07115.
    """

    def __init__(self, tasks: Sequence[str], *, regression: Sequence[str] = ()) -> None:
        super().__init__()
        if unknown := set(regression) - set(tasks):
            raise OperatorError(f"TaskWeights: {sorted(unknown)[0]!r} is a regression, and no task")
        self.tasks, self._factors = tuple(tasks), {t: 0.5 if t in regression else 1.0 for t in tasks}
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks)))

    def forward(self) -> dict[str, tuple[float, Tensor]]:
        """By task: the factor of its loss, and s."""
        return {task: (self._factors[task], s) for task, s in zip(self.tasks, self.log_variance, strict=True)}

    @staticmethod
    def total(
        weights: Mapping[str, tuple[float, Tensor]], losses: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> Tensor:
        """The sum over the batch, a scalar: of each task's sum of losses over so many examples.

        Tasks that are not in `losses` have no example in this batch and add nothing.
        """
        parts = [
            factor * (-s).exp() * losses[task] + 0.5 * s * counts[task]
            for task, (factor, s) in weights.items()
            if task in losses
        ]
        if len(parts) != len(losses):
            raise OperatorError(f"TaskWeights: losses of {sorted(losses)}, and weights of {sorted(weights)}")
        return torch.stack(parts).sum()
