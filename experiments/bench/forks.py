"""Measurements in forks of a process that has imported the slow packages already.

On a machine with a GPU, starting Python with torch, transformers and peft takes longer than most measurements. The
server has no CUDA context, so each fork still starts with an empty device. On a CPU every measurement is a Python of
its own (`runner.run_process`), because memory is measured for the whole process there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from experiments.bench import worker

PRELOADED = [
    "experiments.bench.worker",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
    "transformers.models.llama.modeling_llama",
    "peft",
]


def start_server(environment: Mapping[str, str]) -> None:
    """Start the server with these environment variables, unless it runs."""
    forkserver.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.clear()
    # Packages ask for CUDA when they are imported. Asked through the driver's library, the answer leaves forks usable.
    os.environ.update({**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_fork(request: Path, answer: Path, seconds: float) -> dict[str, Any]:
    """The answer of a fork, or a failure with the way it ended; it is killed after `seconds`."""
    process = multiprocessing.get_context("forkserver").Process(target=worker.main, args=(str(request), str(answer)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return {"status": "failed", "reason": f"took longer than {seconds:g} seconds"}
    if answer.is_file():
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
    status = process.exitcode or 0
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return {"status": "failed", "reason": how}
