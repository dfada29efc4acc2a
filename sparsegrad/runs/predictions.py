"""The predictions of a run on the validation rows, one per row of the data set and in its order, beside its record:
what paired statistics need.

`KEY.npz` beside `KEY.json` holds for a classification `predicted` and `label` (the smallest unsigned integers that
fit), for a regression the same in float16, each of them in float32 if one of its numbers is too large, for a language
model `nll` (float32, the sum over a row's tokens) and `tokens` (uint32). The record has the hash of these arrays, so
that no file is taken for another run's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsegrad.errors import UserError, first_line
from sparsegrad.files import unreadable, write_bytes
from sparsegrad.hashing import SHORT, tensors_sha256
from sparsegrad.tasks.base import Task

Arrays = dict[str, np.ndarray[Any, Any]]
AGAIN = "run it again with force=true"  # ends the errors of `read_predictions` that a new run mends


def make_arrays(task: Task, predictions: Any, labels: Any, rows: Sequence[int]) -> Arrays:
    """The arrays of one split, in the order of the data set: comparisons of runs with different seeds pair its rows.

    Args:
        task: decides what is kept.
        predictions: what the Trainer's `predict` gives: logits (rows, num_labels), or (rows, 2) of `token_losses`.
        labels: (rows,); not used for a language task.
        rows: the number of each row in the data set.
    """
    arrays, order = _read_output(task, predictions, labels), np.argsort(np.asarray(rows))
    return {name: array[order] for name, array in arrays.items()}


def _read_output(task: Task, predictions: Any, labels: Any) -> Arrays:
    found = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if task.is_language:
        return {"nll": found[:, 0].astype(np.float32), "tokens": found[:, 1].astype(np.uint32)}
    if task.is_regression:
        arrays = {"predicted": found.reshape(len(found)), "label": _flat(labels)}
        # Each by itself: the labels of all runs must be equal, whatever a run predicts.
        return {name: array.astype(smallest_float(array)) for name, array in arrays.items()}
    dtype = np.min_scalar_type(found.shape[-1] - 1)  # uint8 up to 256 classes
    return {"predicted": found.argmax(-1).astype(dtype), "label": _flat(labels).astype(dtype)}


def smallest_float(numbers: np.ndarray[Any, Any]) -> type[np.floating[Any]]:
    """The type in which numbers are stored: float16, or float32 if one of them is too large."""
    return np.float16 if np.abs(numbers).max(initial=0) <= np.finfo(np.float16).max else np.float32


def _flat(labels: Any) -> np.ndarray[Any, Any]:
    return np.asarray(labels).reshape(-1)


def predictions_path(record: Path) -> Path:
    """The file of the predictions that belong to a record."""
    return record.with_suffix(".npz")


def describe_arrays(arrays: Arrays) -> dict[str, Any]:
    """What the record says of them: rows and hash."""
    return {"rows": len(next(iter(arrays.values()))), "sha256": _hash(arrays)}


def write_predictions(record: Path, arrays: Arrays) -> None:
    """Write the arrays beside a record, compressed; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    # Without allow_pickle, which numpy 2.0 would store as one more array.
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(predictions_path(record), buffer.getvalue())


def read_predictions(path: Path, record: Mapping[str, Any]) -> Arrays:
    """The predictions that belong to the record at `path`.

    Raises:
        UserError: when there are none, they are damaged, or they are another run's.
        ResourceError: when the disk does not let them be read.
    """
    about, file = record.get("predictions"), predictions_path(path)
    if not isinstance(about, Mapping):
        raise UserError(f"{path} was made without predictions: {AGAIN}")
    try:
        content = file.read_bytes()  # whole, because zipfile takes a failure of the disk for a damaged archive
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {AGAIN}") from None
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        own = _hash(arrays)
    except Exception as error:  # zip, zlib, struct and numpy each raise types of their own for a damaged archive
        raise UserError(f"{file} cannot be read ({first_line(error)}): {AGAIN}") from None
    if own != about.get("sha256"):
        raise UserError(f"{file} does not belong to {path.name}: {AGAIN}")
    return arrays


def _hash(arrays: Arrays) -> str:
    named = sorted(arrays.items())
    # As bytes: torch has no uint32 on every build.
    return tensors_sha256(
        (f"{name}{one.dtype}{one.shape}", torch.from_numpy(np.ascontiguousarray(one).view(np.uint8)))
        for name, one in named
    )[:SHORT]
