"""A hospital's rows as numbers a model can take: parsing, the split, imputation, scaling. Only numpy is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from murmur.protocol.errors import OperatorError

# N = rows, F = features

Array = np.ndarray[Any, Any]
COLUMNS = (
    "age",
    "sex",
    "cp",
    "trestbps",
    "chol",
    "fbs",
    "restecg",
    "thalach",
    "exang",
    "oldpeak",
    "slope",
    "ca",
    "thal",
)
MEASURED: dict[str, tuple[float, float]] = {
    # Centre and width by which a measurement is scaled, the same at every hospital. Round numbers that the hospitals
    # can agree on beforehand; nothing here was computed from anybody's rows.
    "age": (55, 10),  # years
    "trestbps": (130, 20),  # mm Hg
    "chol": (240, 50),  # mg/dl
    "thalach": (140, 25),  # beats a minute
    "oldpeak": (1, 1),  # mm of ST depression
    "ca": (0, 1),  # vessels
}
YES_NO = ("sex", "fbs", "exang")
KINDS: dict[str, tuple[int, ...]] = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2), "slope": (1, 2, 3), "thal": (3, 6, 7)}
OFTEN_MISSING = ("trestbps", "chol", "fbs", "thalach", "oldpeak", "slope", "ca", "thal")
IMPOSSIBLE_ZEROS = ("trestbps", "chol")  # nobody alive has a blood pressure or a cholesterol of 0: not measured
FEATURES = len(MEASURED) + len(YES_NO) + sum(map(len, KINDS.values())) + len(OFTEN_MISSING)
TRAIN_FRACTION = 0.66

Scaling = Literal["agreed", "own"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A split of one hospital: (N, F) float32 inputs, (N,) float32 targets of 0 and 1."""

    inputs: Array
    targets: Array


def read(path: Path) -> tuple[Array, Array]:
    """The file's columns as (N, 13) float64 with NaN for what is missing, and the diagnosis as (N,) of 0 and 1.

    Missing are `?`, -9, and the zeros that no patient can have. Raises OperatorError for a file of another kind.
    """
    try:
        lines = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"cannot read the hospital's file {path}: {error}") from None
    try:
        table = np.array([[np.nan if v.strip() == "?" else float(v) for v in line] for line in lines], np.float64)
    except ValueError as error:
        raise OperatorError(f"{path} is not a processed Heart Disease file: {error}") from None
    if table.ndim != 2 or table.shape[1] != len(COLUMNS) + 1 or np.isnan(table[:, -1]).any():
        raise OperatorError(f"{path} is not a processed Heart Disease file: 14 columns with a diagnosis were expected")
    columns, diagnosis = table[:, :-1], table[:, -1]
    columns[columns == -9] = np.nan
    for name in IMPOSSIBLE_ZEROS:
        column = columns[:, COLUMNS.index(name)]
        column[column == 0] = np.nan
    return columns, (diagnosis > 0).astype(np.float32)


def split(targets: Array, seed: int) -> tuple[Array, Array]:
    """Indices of train and test rows: of each diagnosis 66 % train, drawn by the seed, in the file's order."""
    rng = np.random.default_rng(seed)
    train = np.zeros(len(targets), bool)
    for value in (0, 1):
        rows = rng.permutation(np.flatnonzero(targets == value))
        train[rows[: round(TRAIN_FRACTION * len(rows))]] = True
    return np.flatnonzero(train), np.flatnonzero(~train)


def prepare(path: Path, seed: int, scaling: Scaling = "agreed") -> dict[str, Rows]:
    """The hospital's rows as "train" and "test"; every statistic used comes from this hospital's train rows alone."""
    columns, targets = read(path)
    train, test = split(targets, seed)
    if not len(train) or not len(test):
        raise OperatorError(f"{path} has {len(targets)} rows: too few to train and to test")
    inputs = _features(columns, train, scaling)
    return {
        "train": Rows(inputs=inputs[train], targets=targets[train]),
        "test": Rows(inputs=inputs[test], targets=targets[test]),
    }


def _features(columns: Array, train: Array, scaling: Scaling) -> Array:
    """(N, F): scaled measurements, answers of yes and no, kinds one by one, and which values were missing."""
    by_name = dict(zip(COLUMNS, columns.T, strict=True))
    found: list[Array] = []
    for name, (centre, width) in MEASURED.items():
        column = by_name[name]
        known = column[train][~np.isnan(column[train])]
        filled = np.where(np.isnan(column), np.median(known) if len(known) else centre, column)
        if scaling == "own":  # worse when federated: it hides how the hospitals' patients differ; see README.md
            centre, width = filled[train].mean(), filled[train].std() or 1.0
        found.append((filled - centre) / width)
    for name in YES_NO:
        column = by_name[name]
        known = column[train][~np.isnan(column[train])]
        usual = float(known.mean() > 0.5) if len(known) else 0.0
        found.append(np.where(np.isnan(column), usual, column))
    for name, kinds in KINDS.items():
        found += [by_name[name] == kind for kind in kinds]  # a missing kind is none of them
    found += [np.isnan(by_name[name]) for name in OFTEN_MISSING]
    return np.stack(found, axis=1).astype(np.float32)
