"""One measurement in a process of its own: `python -m experiments.bench.worker REQUEST.json ANSWER.json`.

The request names a job (`measure`, `calibrate` or `decompose`) and its arguments. The answer is written atomically; of
a failed job it holds the reason.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.bench import decompose, measure
from experiments.bench.results import OUT_OF_MEMORY
from sparsegrad.errors import first_line
from sparsegrad.files import write_json

JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "measure": measure.measure_arm,
    "calibrate": measure.calibrate_shape,
    "decompose": decompose.measure_decomposition,
}


def main(request_path: str, answer_path: str) -> None:
    """Run the requested job and write its answer."""
    warnings.filterwarnings("ignore")
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request.pop("threads"))
    job = JOBS[request.pop("job")]
    try:
        answer = {"status": "complete", **job(**request)}
    except Exception as error:  # a failing arm is a result, and must not stop the others
        answer = {"status": "failed", "reason": reason(error)}
    write_json(Path(answer_path), answer)


def reason(error: Exception) -> str:
    """The error in one line."""
    first = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{OUT_OF_MEMORY}: {first}"
    return f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    main(*sys.argv[1:])
