"""A run that is interrupted, killed or stopped early continues as if nothing had been."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from run_fixtures import Composer, Tiny, last_wins
from test_runs import METHODS, Stop, curves, method, steps

from sparsegrad.cli.running import run_command
from sparsegrad.errors import BUSY, BusyError, UserError
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.result_lines import describe_stop
from sparsegrad.runs.run_folder import run_lock
from sparsegrad.runs.runner import run
from sparsegrad.trainer import signals
from sparsegrad.trainer.checkpoints import last_checkpoint, newest_step, read_manifest


def test_early_stopping_stops_and_survives_an_interruption(tiny: Tiny) -> None:
    stopping = ("protocol.max_steps=40", "protocol.patience=3", "train.lr=1e-9")  # a score that never improves
    whole, _ = run(tiny(*stopping))
    assert steps(whole) == [2, 4, 6, 8]
    for number, step in enumerate((7, 0)):  # before the last evaluation, and after it
        config = tiny(*stopping, f"work_dir={tiny().work_dir}-{number}", "force=true")
        with pytest.raises(KeyboardInterrupt):
            run(config, callbacks=[Stop(step)])
        config = tiny(*stopping, f"work_dir={tiny().work_dir}-{number}", "name=resumed" + str(number))
        again = Stop()
        resumed, _ = run(config, callbacks=[again])
        assert again.began == (6 if step else -1)
        assert curves(resumed) == pytest.approx(curves(whole))
        assert resumed["result"] == whole["result"]


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_continues_as_if_nothing_had_been(tiny: Tiny, name: str) -> None:
    long = (
        *method(name),
        "protocol.max_steps=14",
        "protocol.eval_steps=4",
        "train.lr=1e-3",
        "train.grad_accumulation=2",
    )
    whole, _ = run(tiny(*long, "name=whole"))
    config = tiny(*long, f"work_dir={tiny().work_dir}-again")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(10)])
    assert not config.record_path.exists()
    again = Stop()
    resumed, is_new = run(config, callbacks=[again])
    assert (again.began, is_new) == (8, True)
    assert curves(resumed) == pytest.approx(curves(whole), rel=1e-5)
    assert resumed["result"] == whole["result"]


@pytest.mark.parametrize("protocol", ["paper", "heldout"])
def test_a_run_interrupted_after_its_last_step_trains_no_further(tiny: Tiny, protocol: str) -> None:
    whole, _ = run(tiny(f"protocol={protocol}", "name=whole"))
    config = tiny(f"protocol={protocol}", f"work_dir={tiny().work_dir}-again")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(0)])
    clock = read_manifest(last_checkpoint(config.checkpoints) or "")["clock"]
    again = Stop()
    resumed, _ = run(config, callbacks=[again])
    assert again.began == -1  # not trained at all
    assert resumed["speed"]["timed_steps"] == whole["speed"]["timed_steps"] == clock["steps"] == 1
    assert resumed["environment"]["seconds"] > clock["run_seconds"] > 0
    assert resumed["memory"] == clock["memory"], "the last process took no step"
    assert resumed["memory"]["resident_mib"] > resumed["memory"]["baseline_mib"]
    (trained,) = resumed["environment"]["continued_from"]
    assert (trained["first_step"], trained["last_step"]) == (1, 4)
    assert "continued_from" not in whole["environment"]
    assert curves(resumed) == pytest.approx(curves(whole))
    assert resumed["result"] == whole["result"]


def test_resume_false_begins_anew(tiny: Tiny) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), callbacks=[Stop(3)])
    again = Stop()
    run(tiny("resume=false"), callbacks=[again])
    assert again.began == 0


def test_a_half_written_checkpoint_is_passed_over(tiny: Tiny) -> None:
    config = tiny("protocol.max_steps=6")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(5)])
    folder = config.run_folder / "checkpoints"
    whole = Path(last_checkpoint(folder) or "")
    assert whole.name == "checkpoint-4"
    for number, state in ((6, None), (8, '{"epoch": 1.')):
        shutil.copytree(whole, folder / f"checkpoint-{number}")
        broken = folder / f"checkpoint-{number}" / "trainer_state.json"
        broken.unlink() if state is None else broken.write_text(state)
    again = Stop()
    record, _ = run(config, callbacks=[again])
    assert again.began == 4
    assert steps(record) == [2, 4, 6]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < end, "the run took too long to begin"
        time.sleep(0.01)


LONG = ("protocol.max_steps=100", "protocol.eval_steps=20", "protocol.patience=null", "train.lr=1e-4")


class Press(Stop):
    """Presses Ctrl-C at the end of a step, a number of times."""

    def __init__(self, step: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times = step, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at - 1:
            for _time in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal; a shell starts background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_before_the_first_evaluation_leaves_a_checkpoint(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    rare = ("protocol.max_steps=6", "protocol.eval_steps=6")
    config = tiny(*rare)
    assert describe_stop(config) == "no checkpoint was written yet, so the same command starts over"
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Press(3)])
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert describe_stop(config) == "the same command continues after step 3"
    assert describe_stop(tiny(*rare, "resume=false")).startswith("the same command, without resume=false, continues")
    forced = tiny(*rare, "force=true")
    assert describe_stop(forced) == "the same command starts over, because of force=true"
    rest = "the same command takes the finished runs from their records and runs the rest"
    assert describe_stop(config, is_one_of_several=True) == f"{rest}; this run continues after step 3"
    assert describe_stop(forced, is_one_of_several=True).startswith("the same command starts all runs over")
    again = Stop()
    resumed, _ = run(config, callbacks=[again])
    assert again.began == 3
    whole, _ = run(tiny(*rare, f"work_dir={config.work_dir}-whole", "name=whole"))
    assert curves(resumed) == pytest.approx(curves(whole))
    assert resumed["result"] == whole["result"]


@pytest.mark.usefixtures("_ctrl_c")
def test_a_second_ctrl_c_stops_at_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "KEYS", -1.0)  # however quickly it follows
    config = tiny("protocol.max_steps=6", "protocol.eval_steps=6")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Press(3, times=2)])
    assert signals.SAVING in capfd.readouterr().err, "the first one was taken"
    assert newest_step(config.checkpoints) is None


def test_an_interrupted_process_leaves_no_record_and_is_continued(
    tiny: Tiny, small: tuple[str, ...], start_run_py: Callable[..., subprocess.Popen[str]]
) -> None:
    """By Ctrl-C; test_checkpoints.py kills processes in other ways."""
    config = tiny(*LONG)
    process = start_run_py(*last_wins(*small, *LONG))
    wait_for(lambda: last_whole(config), process)
    process.send_signal(signal.SIGSTOP)  # it must not end while we look
    with pytest.raises(UserError, match=f"run {config.key} is at work in another process: wait for it, or stop it"):
        run(config)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "interrupted: the same command continues" in error
    assert not [path for path in Path(config.results_dir).rglob("*") if path.is_file()]
    again = Stop()
    resumed, _ = run(config, callbacks=[again])
    assert 20 <= again.began < 100
    whole, _ = run(tiny(*LONG, f"work_dir={config.work_dir}-whole", "name=whole"))
    assert len(whole["evaluations"]) == 5
    assert curves(resumed) == pytest.approx(curves(whole), rel=1e-4)


def test_a_process_that_only_asks_whether_a_run_is_at_work_does_not_stop_it(tiny: Tiny) -> None:
    config = tiny()
    with run_lock(config):
        pass
    has_asked = threading.Event()

    def ask() -> None:
        with FileLock(Path(config.work_dir) / "locks" / f"{config.key}.lock"):
            has_asked.set()
            time.sleep(0.2)

    asking = threading.Thread(target=ask)
    asking.start()
    assert has_asked.wait(10)
    with run_lock(config):
        pass
    asking.join()
    with run_lock(config), pytest.raises(BusyError), run_lock(config, wait=0.0):
        pass


def test_a_run_that_is_at_work_elsewhere_has_a_status_of_its_own(
    conf: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BusyError("run k is at work in another process")

    monkeypatch.setattr("sparsegrad.cli.running._run", refuse)
    with pytest.raises(SystemExit) as ended:
        run_command(conf())
    assert ended.value.code == BUSY != UserError.status


def last_whole(config: RunConfig) -> bool:
    """Whether the run at work has a checkpoint; looks without touching."""
    return any((config.run_folder / "checkpoints").glob("checkpoint-*/manifest.json"))
