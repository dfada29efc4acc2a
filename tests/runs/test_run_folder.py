"""Runs with the same settings, of another name or results folder, and their checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_fixtures import Tiny, write_rows
from test_failed_runs import At, poison
from test_runs import Stop, curves

from sparsegrad.errors import BusyError, FailedRunError, UserError
from sparsegrad.runs import preflight
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.run_folder import OWNER, delete_checkpoints_of_other_data, run_lock
from sparsegrad.runs.runner import run
from sparsegrad.trainer.checkpoints import newest_step


def stop_at(config: RunConfig, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(step)])


def began(config: RunConfig) -> int:
    """The step after which a run begins, which is then complete."""
    watch = Stop()
    run(config, callbacks=[watch])
    return watch.began


@pytest.mark.parametrize("other", ["name=other", "results_dir={}/elsewhere"])
def test_a_finished_run_leaves_the_checkpoints_of_a_stopped_one(tiny: Tiny, tmp_path: Path, other: str) -> None:
    finished, stopped = tiny(), tiny(other.format(tmp_path))
    run(finished)
    stop_at(stopped, 3)
    assert run(finished)[1] is False
    assert newest_step(stopped.checkpoints) == 2
    assert began(stopped) == 2
    assert not stopped.run_folder.exists()


@pytest.mark.parametrize("anew", ["force=true", "resume=false"])
def test_a_new_start_puts_the_checkpoints_of_another_run_aside(tiny: Tiny, anew: str) -> None:
    stopped = tiny("name=stopped")
    stop_at(stopped, 3)
    stop_at(tiny(anew), 4)
    assert began(stopped) == 2
    assert began(tiny()) == 2, "its own were put aside meanwhile"
    assert not stopped.run_folder.exists()


def test_checkpoints_of_another_name_are_continued_and_kept(tiny: Tiny) -> None:
    whole, _ = run(tiny("name=whole"))
    stopped = tiny("name=stopped")
    stop_at(stopped, 3)
    watch = Stop()
    record, _ = run(tiny(), callbacks=[watch])
    assert watch.began == 2
    assert curves(record) == pytest.approx(curves(whole))
    assert newest_step(stopped.checkpoints) == 4
    assert began(stopped) == -1, "nothing is left to train"
    assert not stopped.run_folder.exists()


def test_two_names_never_train_in_one_folder_at_a_time(tiny: Tiny) -> None:
    with run_lock(tiny()), pytest.raises(BusyError), run_lock(tiny("name=other"), wait=0.0):
        pass


def test_a_run_that_diverges_leaves_the_checkpoints_of_another_name(tiny: Tiny) -> None:
    stopped = tiny("name=stopped")
    stop_at(stopped, 3)
    with pytest.raises(FailedRunError):
        run(tiny(), callbacks=[At(3, poison)])
    assert newest_step(stopped.checkpoints) == 2


def test_checkpoints_without_an_owner_are_continued_and_deleted(tiny: Tiny) -> None:
    """As those of earlier versions."""
    stop_at(tiny("name=before"), 3)
    (tiny().checkpoints / OWNER).unlink()
    assert began(tiny()) == 2
    assert not tiny().run_folder.exists()


def test_those_of_a_finished_run_without_an_owner_are_deleted(tiny: Tiny) -> None:
    """An earlier version was killed just after it had written the record."""
    stop_at(tiny(), 3)
    kept = shutil.copytree(tiny().checkpoints, Path(tiny().work_dir) / "kept")
    run(tiny())
    shutil.copytree(kept, tiny().checkpoints)
    (tiny().checkpoints / OWNER).unlink()
    assert run(tiny())[1] is False
    assert not tiny().run_folder.exists()


@pytest.mark.parametrize("moved", [("results", "work"), ("results",), ("work",)])
def test_results_and_work_may_be_moved(tiny: Tiny, tmp_path: Path, moved: tuple[str, ...]) -> None:
    """Together or one alone."""
    stop_at(tiny(f"results_dir={tmp_path}/results", f"work_dir={tmp_path}/work"), 3)
    (tmp_path / "there").mkdir()
    for one in moved:
        shutil.move(tmp_path / one, tmp_path / "there" / one)
    places = [f"{one}_dir={tmp_path}/{'there/' if one in moved else ''}{one}" for one in ("results", "work")]
    assert began(tiny(*places)) == 2
    assert not tiny(*places).run_folder.exists()


def test_a_symbolic_link_leads_to_own_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    stop_at(tiny(f"results_dir={tmp_path}/results"), 3)
    (tmp_path / "link").symlink_to(tmp_path / "results")
    linked = tiny(f"results_dir={tmp_path}/link")
    assert began(linked) == 2
    assert not linked.run_folder.exists()


def test_checkpoints_put_aside_before_a_move_come_back(tiny: Tiny, tmp_path: Path) -> None:
    stop_at(tiny("name=stopped"), 3)
    stop_at(tiny("force=true"), 4)
    shutil.move(tmp_path / "results", tmp_path / "there")
    assert began(tiny("name=stopped", f"results_dir={tmp_path}/there")) == 2


def test_what_looks_like_checkpoints_put_aside_stays(tiny: Tiny) -> None:
    stop_at(tiny(), 3)
    copy = shutil.copytree(tiny().checkpoints, tiny().run_folder / "checkpoints-copy")
    run(tiny())
    assert newest_step(copy) == 2


def test_checkpoints_of_other_data_are_deleted_for_a_search_that_begins_anew(tiny: Tiny, tmp_path: Path) -> None:
    stop_at(tiny(), 3)
    stop_at(tiny("name=other", "seed=1"), 3)
    data = (tiny().checkpoints / "data").read_text()
    delete_checkpoints_of_other_data(tiny(), data)
    assert newest_step(tiny().checkpoints) == 2
    delete_checkpoints_of_other_data(tiny(), "another")
    assert not tiny().checkpoints.exists()
    assert newest_step(tiny("seed=1").checkpoints) == 2, "they are of another name"
    assert began(tiny(f"data.dir={write_rows(tmp_path / 'other', train=20)}")) == 0


def test_another_number_of_processes_counts_for_the_same_name_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop_at(tiny(), 3)
    monkeypatch.setattr(preflight, "config_key", lambda settings: tiny().key)
    other = "seed=1"  # has no checkpoints
    (tmp_path / "link").symlink_to(tmp_path / "results")
    for same in ((), (f"results_dir={tmp_path}/link",)):
        with pytest.raises(UserError, match="is of this run with 1 process"):
            preflight.check_process_count(tiny(other, *same))
    preflight.check_process_count(tiny(other, "name=other"))
