"""Many virtual clients on this machine: the tasks, strategies, masks and sums of a real run, without a network."""

from .cohorts import Backend
from .federation import Federation, as_federation, find_federation
from .history import History, Round
from .huggingface import from_huggingface
from .running import simulate
from .testing import CentralTest

__all__ = [
    "Backend",
    "CentralTest",
    "Federation",
    "History",
    "Round",
    "as_federation",
    "find_federation",
    "from_huggingface",
    "simulate",
]
