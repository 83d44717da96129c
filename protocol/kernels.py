"""What torch computes with on a CPU, chosen before several threads ask for it at once."""

from __future__ import annotations


def settle() -> None:
    """Have MKL find out what processor this is while one thread asks; imports torch.

    MKL's exp, log, sqrt, tanh and the like note the processor at the first call in a process, by two writes to one
    number. A thread that reads it between them computes by the kernels for another processor, once: exp is then wrong
    by up to 1.5e-4 where 1e-7 was asked for, in a run that goes on and does not come out the same again. Seen in a
    simulation on two threads. Source: github.com/pytorch/pytorch/issues/188792, MKL 2024.2.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.ones(2, 2, dtype=dtype)
        torch.mm(one, one.exp())
