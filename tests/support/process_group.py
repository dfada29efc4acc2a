"""Real processes for tests: `together(count, function, ...)` runs a function in each, connected by gloo.

They are forked from one clean process that has imported torch and transformers once.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from run_fixtures import ROOT, environment, free_port

_FOLDERS = (ROOT, *(ROOT / "tests" / folder for folder in ("support", "library", "runs", "gpu")))
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, _FOLDERS)), "TOKENIZERS_PARALLELISM": "false"}
_IMPORTED = ["torch", "transformers", "peft", "sparsegrad.runs.runner"]


def together(
    count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 240, missing: int = 0
) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` connected processes; fails if one fails, or takes longer.

    `function` is of a test module; its result is sent by pickle. `missing` of them are killed and return nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    answers, port = context.Queue(), free_port()
    started = [
        context.Process(target=_run, args=(rank, count, port, answers, function, arguments)) for rank in range(count)
    ]
    with patch.dict(os.environ, environment(**_ENVIRONMENT)):  # the server is started with the first process
        for process in started:
            process.start()
    try:
        return _collected(answers, count - missing, time.monotonic() + seconds)
    finally:
        for process in started:
            process.join(10)
            process.kill()


def _collected(answers: Any, count: int, end: float) -> list[Any]:
    found = {}
    while len(found) < count:
        rank, value, failure = answers.get(timeout=max(end - time.monotonic(), 0.1))
        assert failure is None, f"process {rank}:\n{failure}"
        found[rank] = value
    return [found[rank] for rank in sorted(found)]


def _run(rank: int, count: int, port: int, answers: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    try:
        answers.put((rank, function(*arguments), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()
