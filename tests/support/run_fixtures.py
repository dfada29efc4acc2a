"""What the tests of runs share: the real configuration made small, tiny data, and `run.py` as a process."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from quick_python import quick_python

from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.config import RunConfig, build

ROOT = Path(__file__).parents[2]
# Two layers of width 32 with random weights: every architecture, and no download.
TINY = (
    "model.weights=random",
    "model.tokenizer=asset:minilm",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_attention_heads=2",
    "model.lora_rank=2",
    "model.authors_keep=40",
)
SHORT = (
    "task=sst2",
    "train.batch_size=4",
    "train.lr=1e-2",
    "train.device=cpu",
    "protocol.max_steps=4",
    "protocol.eval_steps=2",
)

# A sweep with the stand-in objective of sweep_fakes.py; each trial takes 0.3 seconds.
FAKE_SWEEP = (
    "sweep=custom",
    "sweep.space={train.lr:{float:[1e-5,1e-1],log:true}}",
    "sweep.runner=sweep_fakes.run",
    "sweep.study=fault",
    "sweep.heartbeat=0.5",
    "protocol.patience=300",
    "task=sst2",
    *TINY,
)

Composer = Callable[..., DictConfig]
Tiny = Callable[..., RunConfig]
RunPy = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def quiet_and_quick() -> None:
    """No bars; and each run collects garbage before it measures memory: leave out what imports made, for good."""
    import peft  # noqa: F401

    import sparsegrad.runs.runner  # noqa: F401
    from sparsegrad.trainer.quiet import quiet_transformers

    quiet_transformers()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def conf() -> Composer:
    """`conf(*overrides)`: the real conf/, composed as run.py does it (test_composing.py)."""

    def composed(*overrides: str) -> DictConfig:
        return compose_run(overrides, ROOT / "conf")

    return composed


def write_rows(folder: Path, train: int = 24, validation: int = 10) -> Path:
    """A folder with sst2 as JSON lines: `good` words are positive, `bad` ones negative."""
    target = folder / "sst2"
    target.mkdir(parents=True)
    words = ("bad awful dull", "good great fine")
    for part, count in (("train", train), ("validation", validation)):
        rows = [{"sentence": f"{words[i % 2]} film number {part} {i}", "label": i % 2} for i in range(count)]
        (target / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for data.dir with 24 training and 10 validation rows of sst2; not to be changed."""
    return write_rows(tmp_path_factory.mktemp("glue"))


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Within, this process can write no file larger than `size` bytes, as on a disk that is full.

    Only around the command itself: pytest's own progress may go to a log file that is larger.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, str]:
    """Overrides that keep records and work files of one test in its own folder."""
    return f"results_dir={tmp_path / 'results'}", f"work_dir={tmp_path / 'work'}"


@pytest.fixture
def small(glue: Path, places: tuple[str, str]) -> tuple[str, ...]:
    """Overrides for a run of about a second; later ones win."""
    return (*TINY, *SHORT, f"data.dir={glue}", *places)


@pytest.fixture
def tiny(conf: Composer, small: tuple[str, ...]) -> Tiny:
    """`tiny(*overrides)`: the checked configuration of a run of about a second."""

    def built(*overrides: str) -> RunConfig:
        return build(conf(*last_wins(*small, *overrides)))

    return built


def last_wins(*overrides: str) -> list[str]:
    """Overrides without those that a later one repeats: Hydra takes the choice of a group only once."""
    return list({override.split("=", 1)[0]: override for override in overrides}.values())


def environment(**more: str) -> dict[str, str]:
    """Of a process of its own: one thread, no hub, and assets where this process finds them."""
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}  # of tests before
    return {**kept, "OMP_NUM_THREADS": "1", **unreachable, **more}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def run_py(tmp_path: Path) -> RunPy:
    """`run_py(*overrides, **environment)`: run.py in a process of its own, in an empty folder and without a hub.

    `python` names another Python than the quick one.
    """

    def run(*overrides: str, python: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        command = [python or quick_python(), str(ROOT / "run.py"), *overrides]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(**env), capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture
def start_run_py(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The same, with a Python of its own and without waiting for its end; it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "run.py"), *overrides]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        # A shell's background job has Ctrl-C ignored, and so would what the tests start from one.
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment(), text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def small_bert() -> Any:
    """A BERT classifier of the right architecture, small, without dropout."""
    from distributed_cases import bert

    return bert(torch.float32)
