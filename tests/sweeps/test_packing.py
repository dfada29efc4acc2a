"""Several trials on one device: memory is never promised twice, and no trial waits forever."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sweep_fakes
import torch
from omegaconf import DictConfig
from run_fixtures import Composer, last_wins

from sparsegrad.errors import UserError
from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.models.outline import load_outline
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.memory_estimate import GIB, estimate_run
from sparsegrad.sweeps import packing
from sparsegrad.sweeps.admission import Device, Entry, fits, pass_waiting
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.packing import check_packing, count_slots
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.study import load_study

FORK = multiprocessing.get_context("fork")
FAKE = (
    "sweep=custom", "sweep.trials=4", "sweep.space={train.batch_size:{choice:[4,8,16,32]}}", "sweep.sampler=grid",
    "sweep.runner=sweep_fakes.run", "protocol.patience=null", "sweep.study=s", "sweep.heartbeat=0.2",
    "train.lr=1e-3", "sweep.device_share=0.25",
)  # fmt: skip
Sweep = Callable[..., DictConfig]


@pytest.fixture
def composed(conf: Composer, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """`composed(*overrides)`: four trials of the stand-in with 4 to 32 rows, which need as many GiB of 40."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(packing, "estimate_run", lambda config: config.train.batch_size * GIB)
    monkeypatch.setattr(packing, "memory_of", lambda device: int(40 / 0.9 * GIB) + 1)
    given = [one for one in small if not one.startswith(("train.lr", "train.batch_size"))]
    return lambda *overrides: conf(*last_wins(*given, *FAKE, *overrides))


def entry(ticket: int, size: int, *, is_running: bool = False) -> Entry:
    return Entry(worker={"pid": ticket}, ticket=ticket, size=size, is_running=is_running)


def test_smaller_trials_pass_a_waiting_one_but_not_forever() -> None:
    others = [entry(1, 6, is_running=True), entry(2, 8)]
    passed = 0
    while fits(others, entry(3 + passed, 1), capacity=10):
        others = pass_waiting(others, ticket=3 + passed)
        passed += 1
    assert passed == 8
    assert fits([others[1]], entry(99, 1), capacity=10) is False  # also where there is room: the waiting one is next
    assert fits([], others[1], capacity=10)


def worker(folder: Path, seed: int, sizes: list[int]) -> None:
    device, draw = Device("cpu", 10, folder), random.Random(seed)
    for size in sizes:
        with device.reserve(size, lambda _: time.sleep(0.002)):
            assert sum(one.size for one in device.entries() if one.is_running) <= 10
            (folder / f"ran-{os.getpid()}-{size}-{draw.random()}").touch()
            time.sleep(draw.random() / 100)


def test_processes_never_reserve_more_than_there_is(tmp_path: Path) -> None:
    sizes = [[3, 1, 7, 2], [10, 2, 5, 5], [4, 4, 4, 99]]  # 99: the whole device is the most that one can have
    processes = [FORK.Process(target=worker, args=(tmp_path, seed, own)) for seed, own in enumerate(sizes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("ran-*"))) == 12
    assert Device("cpu", 10, tmp_path).entries() == []


@contextmanager
def held(size: int, capacity: int, folder: Path | None = None) -> Iterator[BaseProcess]:
    """Within: another process has reserved memory."""

    def hold() -> None:
        with Device("cpu", capacity, folder).reserve(size, lambda _: None):
            signal.pause()

    process, device = FORK.Process(target=hold), Device("cpu", capacity, folder)
    process.start()
    end = time.monotonic() + 20
    while not device.entries() and time.monotonic() < end:
        time.sleep(0.01)
    assert device.entries(), "nothing was reserved"
    yield process
    process.kill()
    process.join(20)


def test_a_killed_worker_keeps_nothing_reserved(tmp_path: Path) -> None:
    device = Device("cpu", 10, tmp_path)
    with held(10, 10, tmp_path) as process:
        assert [one.worker["pid"] for one in device.entries()] == [process.pid]
    with device.reserve(10, lambda reason: pytest.fail(reason)):
        assert [one.worker["pid"] for one in device.entries()] == [os.getpid()]


def test_a_damaged_list_is_replaced(tmp_path: Path) -> None:
    device = Device("cpu", 10, tmp_path)
    with device.reserve(4, lambda reason: pytest.fail(reason)):
        next(tmp_path.glob("cpu-*.json")).write_text('{"trials": [{"size": ')
    with device.reserve(4, lambda reason: pytest.fail(reason)):
        assert [one.size for one in device.entries()] == [4]


def test_a_trial_that_is_estimated_above_the_device_runs_alone(composed: Sweep) -> None:
    """Estimates are upper bounds: what they say must not end a trial."""
    sweep = composed("sweep.space={train.batch_size:{choice:[4,8,16,64]}}")
    run_sweep(sweep)
    trials = load_study(make_plan(sweep).sweep.storage, "s").trials
    assert [one.state.name for one in trials] == ["COMPLETE"] * 4


def test_a_finished_run_needs_no_memory(composed: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    run_sweep(composed())
    with held(40 * GIB, 40 * GIB):
        run_sweep(composed("sweep.overwrite=true"))
    assert "waits" not in capsys.readouterr().out


def test_a_trial_that_runs_out_of_memory_is_run_again_alone(composed: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def run(config: Any, **rest: Any) -> Any:
        sizes.append(sum(one.size for one in Device("cpu", 40 * GIB).entries()) // GIB)
        if config.train.batch_size == 32 and sizes[-1] < 40:
            raise torch.OutOfMemoryError
        return original(config, **rest)

    original = sweep_fakes.run
    monkeypatch.setattr(sweep_fakes, "run", run)
    sweep = composed()
    run_sweep(sweep)
    states = [one.state.name for one in load_study(make_plan(sweep).sweep.storage, "s").trials]
    assert states == ["COMPLETE"] * 4
    assert sorted(sizes) == [4, 8, 16, 32, 40]


def test_a_trial_that_trained_before_is_not_given_up_when_memory_is_short(
    composed: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has fitted: another program holds the memory, at most `sweep.retries` times."""
    tried: list[int] = []

    def run(config: Any, **rest: Any) -> Any:
        rows = config.train.batch_size
        tried.append(rows)
        if rows == 8 or (rows == 16 and tried.count(16) <= 2):  # each attempt is repeated alone
            (config.checkpoints / "checkpoint-2").mkdir(parents=True, exist_ok=True)
            (config.checkpoints / "checkpoint-2" / "manifest.json").touch()
            raise torch.OutOfMemoryError
        return original(config, **rest)

    original = sweep_fakes.run
    monkeypatch.setattr(sweep_fakes, "run", run)
    sweep = composed("sweep.device_share=1", "sweep.retries=2")
    run_sweep(sweep)
    trials = load_study(make_plan(sweep).sweep.storage, "s").trials
    states: dict[int, list[str]] = {rows: [] for rows in (4, 8, 16, 32)}
    for trial in trials:
        states[trial.params["train.batch_size"]].append(trial.state.name)
    assert states == {4: ["COMPLETE"], 8: ["FAIL", "FAIL", "PRUNED"], 16: ["FAIL", "COMPLETE"], 32: ["COMPLETE"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sweep.device_share=0",), "sweep.device_share=0 is not allowed"),
        (("sweep.device_share=1.5",), "sweep.device_share=1.5 is not allowed"),
        (("sweep.workers=5",), "sweep.workers=5 is not allowed: .* room for 4 .* use at most 4"),
        (("sweep.device_share=0.05",), r"is 2\.0 GiB .*smallest trial needs about 4\.0 GiB.*use at least 0\.1"),
        (("sweep.device_share=0.05", "sweep.space={train.batch_size:{choice:[64]}}"), "use a smaller model, batch"),
    ],
)
def test_shares_without_room_are_refused_before_anything_runs(
    composed: Sweep, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_packing(make_plan(composed(*overrides, "train.batch_size=64")))


def test_slots_are_shares_of_all_devices(composed: Sweep) -> None:
    assert count_slots(make_plan(composed("sweep.device_share=0.1", "train.device=cpu"))) == 10
    assert count_slots(make_plan(composed("sweep.device_share=0.34", "train.device=cpu"))) == 2


def test_an_outline_has_the_shapes_of_the_model_and_no_weights(tiny: Callable[..., RunConfig]) -> None:
    config = tiny()
    outline = load_outline(config.model, config.task)
    loaded = load_model(config.model, config.task, load_tokenizer(config.model))
    shapes = [{name: one.shape for name, one in model.named_parameters()} for model in (outline, loaded)]
    assert shapes[0] == shapes[1]
    assert {one.device.type for one in outline.parameters()} == {"meta"}
    assert estimate_run(tiny("train.batch_size=32")) > estimate_run(tiny("train.batch_size=8")) > GIB


def test_a_configuration_that_makes_no_model_is_named() -> None:
    config: Any = SimpleNamespace(
        weights="random", name="m", trust_remote_code=False, architecture={"model_type": "nothing"}
    )
    with pytest.raises(UserError, match="model=m has a configuration that makes no model"):
        load_outline(config, SimpleNamespace(is_language=False))  # type: ignore[arg-type]
