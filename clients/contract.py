"""What a task declares of its data, for every site to be checked against before its first round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..protocol.errors import OperatorError

Shape = tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A task's attribute `contract`: this, or a mapping of the same names. What is left out is not checked.

    columns: names of the input's last dimension, in their order; a data set with `columns` of its own must have these.
    input_shape, target_shape: of one example, () for a number; None for a length that varies.
    input_dtype, target_dtype: as torch calls them, "float32". labels: all that a target may be.
    ranges: smallest and largest value by column, or of the whole "input" or "target"; None leaves a side open.
    """

    columns: tuple[str, ...] = ()
    input_shape: Shape | None = None
    input_dtype: str = ""
    target_shape: Shape | None = None
    target_dtype: str = ""
    labels: tuple[Any, ...] = ()
    ranges: Mapping[str, tuple[float | None, float | None]] = field(
        default_factory=dict[str, tuple[float | None, float | None]]
    )

    def __post_init__(self) -> None:
        for name, bounds in self.ranges.items():
            if name not in (*self.columns, "input", "target"):
                raise OperatorError(f"the contract has a range for {name!r}, which is no column of it")
            if len(bounds) != 2:
                raise OperatorError(f"the contract's range of {name!r} is {bounds!r}: a pair (low, high) is needed")


def contract_of(task: Any) -> Contract | None:
    """The contract that a task declares; raises OperatorError for one that is none."""
    declared: Any = getattr(task, "contract", None)
    if declared is None or isinstance(declared, Contract):
        return declared
    if not isinstance(declared, Mapping):
        raise OperatorError(f"the task's contract is a {type(declared).__name__}: a murmur.Contract is needed")
    known = Contract.__dataclass_fields__
    if unknown := sorted(map(str, set(declared) - set(known))):
        raise OperatorError(f"the task's contract has {unknown[0]!r}; a contract has {', '.join(known)}")
    return Contract(**declared)
