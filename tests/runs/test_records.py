"""Records are whole or absent, and read back as a table."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sparsegrad.cli.console import main
from sparsegrad.cli.record_rows import read_rows
from sparsegrad.cli.records_command import make_text
from sparsegrad.errors import UserError
from sparsegrad.files import is_of_writing, write_json
from sparsegrad.runs.records import PRUNED, SCHEMA, find_complete, load_records


def record(**more: Any) -> dict[str, Any]:
    named = {name: {"name": f"some_{name}"} for name in ("model", "method", "task", "protocol")}
    return {
        "schema": SCHEMA,
        "status": "complete",
        "config": {**named, "seed": 3, "train": {"lr": 1e-3, "batch_size": 8}},
        "trainable": {"total": 1234, "per_weight": {"up": 5}, "model": 99},
        "result": {"metric": "accuracy", "value": 0.75},
        "speed": {"steps_per_second": 2.0},
        "memory": {"device": "cpu", "baseline_mib": 100.0, "resident_mib": 150.0},
        **more,
    }


FAILED = {"status": "failed", "reason": "diverged", "result": {}, "speed": {}, "memory": {}}
STOPPED = {**FAILED, "reason": f"{PRUNED} after evaluation 2, step 90"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "r.json"
    write_json(path, record())
    assert find_complete(path) == record()
    assert list(path.parent.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_json(path, record())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for where in ("fsync", "getpid"):
        with monkeypatch.context() as patched:
            patched.setattr(os, where, full)
            with pytest.raises((UserError, OSError), match="No space left"):
                write_json(path, record(status="other"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, record(result={"value": float("nan")}))
    assert json.loads(path.read_text()) == record()
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_complete_record_counts_as_done(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert find_complete(path) is None
    write_json(path, record(**FAILED))
    assert find_complete(path) is None


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"architectures": ["BertModel"]}'])
def test_a_file_of_something_else_is_not_to_be_deleted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not a record") as raised:
        find_complete(path)
    assert "delete" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 0}', "\x00\xff"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"bad\.json .*delete it and run again"):
        find_complete(path)


def test_the_table_has_a_row_for_each_record(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "1.json", record())
    write_json(tmp_path / "b" / "2.json", record(**FAILED))
    table = load_records(tmp_path)
    assert list(table["path"]) == [str(tmp_path / "a" / "1.json"), str(tmp_path / "b" / "2.json")]
    assert list(table["status"]) == ["complete", "failed"]
    row = table.iloc[0]
    assert (row["method"], row["value"], row["trainable"], row["seed"]) == ("some_method", 0.75, 1234, 3)
    assert row["peak_mib"] - row["baseline_mib"] == 50
    assert load_records(tmp_path / "nowhere").empty


def test_a_damaged_record_stops_the_table_or_is_reported(tmp_path: Path) -> None:
    write_json(tmp_path / "1.json", record())
    (tmp_path / "2.json").write_text("{")
    with pytest.raises(UserError, match=r"2\.json"):
        load_records(tmp_path)
    said: list[UserError] = []
    assert len(load_records(tmp_path, on_bad=said.append)) == 1
    assert "2.json" in str(said[0])


@pytest.mark.parametrize("written", [[record()], [record(**FAILED)], [record(), record(**FAILED), record(**STOPPED)]])
def test_the_command_shows_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: list[dict[str, Any]]
) -> None:
    for number, content in enumerate(written):
        write_json(tmp_path / f"{number}.json", content)
    (tmp_path / "bad.json").write_text("{")
    assert main(["records", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "bad.json" in shown.err
    for content in written:
        cell = (
            "0.7500" if content["status"] == "complete" else "pruned" if content["reason"] != "diverged" else "failed"
        )
        assert cell in shown.out


def test_the_command_says_where_nothing_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["records", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no records below")


def test_all_results_folders_below_a_folder_are_shown(tmp_path: Path) -> None:
    shown = ("copy.json", "runs/adhoc/1.json", "quickstart/runs/quickstart/2.json", "a/b/runs/runs/3.json")
    shown += ("a/studies/mine/runs/adhoc/6.json",)  # the folder `a` is no results folder, and may have any others
    for name in (*shown, "work/multirun/runs/4.json", "studies/5.json", "quickstart/adapters/x/adapter_config.json"):
        write_json(tmp_path / name, record(**FAILED))
    for name in ("study.json", "models/adhoc/1/config.json"):
        write_json(tmp_path / name, {"architectures": ["BertModel"]})
    bad: list[UserError] = []
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b" / "runs", tmp_path / "a" / "b" / "runs" / "runs"):
        found = [row["path"] for row in read_rows(folder, on_bad=bad.append)]
        assert found == sorted(str(tmp_path / name) for name in shown if (tmp_path / name).is_relative_to(folder))
        assert list(load_records(folder)["path"]) == found
    assert bad == []


def test_a_work_folder_without_results_has_no_records(tmp_path: Path) -> None:
    """As after a first run that was stopped."""
    write_json(tmp_path / "work" / "key" / "checkpoints" / "checkpoint-2" / "manifest.json", {"files": {}})
    assert load_records(tmp_path).empty


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Records of two methods with three seeds each, and of one more with another density."""
    cases = [("lora", seed, {"rank": 7}, 0.70 + 0.01 * seed) for seed in (1, 2, 3)]
    cases += [("sparsegrad", seed, {"density": 0.01}, 0.80 + 0.01 * seed) for seed in (1, 2, 3)]
    cases += [("sparsegrad", 1, {"density": 0.05}, 0.95)]
    for number, (method, seed, settings, value) in enumerate(cases):
        content = record(result={"metric": "matthews_correlation", "value": value}, key=f"{number:016x}")
        content["config"] = {**content["config"], "seed": seed, "method": {"name": method, **settings}}
        write_json(tmp_path / "runs" / f"{number}.json", content)
    return tmp_path


def show(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["records", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_records_are_narrowed_sorted_and_averaged(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(capsys, runs, "--filter", "density=0.05").count("0.9500") == 1
    assert "lora" not in show(capsys, runs, "--filter", "method=sparsegrad", "--filter", "seed=1,2")
    for title in ("score", "matthews_correlation", "matthews"):  # the last is what the table shows
        rows = [line.split(",") for line in show(capsys, runs, "--sort", title, "--reverse", "--csv").splitlines()]
        column = rows[0].index("value")
        assert [float(row[column]) for row in rows[1:]] == pytest.approx([0.95, 0.83, 0.82, 0.81, 0.73, 0.72, 0.71])
    for title, name in (("peak MiB", "peak_mib"), ("per MLP weight", "per_weight"), ("batch", "batch_size")):
        assert show(capsys, runs, "--sort", title) == show(capsys, runs, "--sort", name)
    write_json(runs / "runs" / "other.json", record(key="f" * 16))  # of another metric
    assert main(["records", str(runs), "--sort", "accuracy"]) == 2
    assert "--sort accuracy is not allowed" in capsys.readouterr().err
    means = [line for line in show(capsys, runs, "--mean").splitlines() if "±" in line]
    assert sum("0.7200 ± 0.0100" in line for line in means) == 1
    assert sum("0.8200 ± 0.0100" in line for line in means) == 1  # the run of another density is not part of it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--filter", "metod=lora"), "did you mean method"),
        (("--sort", "scor"), "did you mean score"),
        (("--sort", "steps/"), "did you mean steps/s"),
        (("--filter", "lora"), "key=value"),
        (("--filter", "method=full"), "no record"),
        (("--reverse",), "add --sort KEY"),
    ],
)
def test_what_no_record_has_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert main(["records", str(runs), *words]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_table_leaves_columns_out_but_cuts_nothing(runs: Path, width: int) -> None:
    rows = read_rows(runs, on_bad=lambda error: pytest.fail(str(error)))
    narrow, note, _ = make_text(rows, width).partition("Not shown")
    assert max(map(len, (narrow + note).splitlines())) <= width
    whole = make_text(rows, None)
    words = {word for word in narrow.split() if set(word) != {"-"}}
    assert words <= set(whole.replace(",", "").split()) | set(whole.split())
    assert {"lora", "sparsegrad", "0.7100", "0.05"} <= words
    assert bool(note) == (width < len(max(whole.splitlines(), key=len)))


def test_rows_that_differ_never_look_the_same(tmp_path: Path) -> None:
    settings = {"max_steps": None, "eval_steps": 5, "patience": 3}
    for number, changed in enumerate(({}, {"max_steps": 20}, {"max_steps": 20, "eval_steps": 9}, {"patience": 7})):
        content = record(key=f"abcdef{number}")
        content["config"]["method"] = {"name": "lora" if number < 3 else "full"}
        content["config"]["protocol"] = {"name": "paper", **settings, **changed}
        write_json(tmp_path / f"{number}.json", content)
    text = make_text(read_rows(tmp_path, on_bad=lambda error: pytest.fail(str(error))), 32)
    rows = text.rpartition("---\n")[2].partition("Not shown")[0]
    assert max(map(len, rows.splitlines())) <= 32
    said = [" ".join(one.split()) for one in re.split(r"^\w+ .*$", rows, flags=re.MULTILINE)[1:]]
    assert said == [
        "eval steps 5, patience 3",
        "max steps 20, eval steps 5, patience 3",
        "max steps 20, eval steps 9, patience 3",
        "eval steps 5, patience 7",  # of another method, which would be compared with the others
    ]


def test_peft_runs_have_their_type_in_the_name_and_no_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [{"name": "peft", "config": {"peft_type": kind}} for kind in ("SHIRA", "IA3")]
    for number, node in enumerate([{"name": "sparsegrad", "engine": "exact"}, *nodes]):
        content = record()
        content["config"]["method"] = node
        write_json(tmp_path / f"{number}.json", content)
    shown = show(capsys, tmp_path)
    assert "engine exact (sparsegrad)" in shown
    assert "peft SHIRA" in shown
    assert "peft IA3" in shown
    assert "peft IA3" in show(capsys, tmp_path, "--filter", "method=peft ia3")
    assert "peft IA3" in show(capsys, tmp_path, "--filter", "method=peft")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EDQUOT, "quota", "/data/runs/x"), True),
        (PermissionError(errno.EACCES, "denied", "/data/runs/x"), True),
        (PermissionError(errno.EACCES, "denied", "/data/train.jsonl"), False),
        (FileNotFoundError(errno.ENOENT, "gone", "/data/runs/x"), False),
        (ConnectionResetError(errno.ECONNRESET, "hung up"), False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No" })'), True),
        (SafetensorError("Error while deserializing header: HeaderTooLarge"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("inline_container"), False),
    ],
)
def test_only_errors_of_writing_are_called_so(error: Exception, expected: bool) -> None:
    assert is_of_writing(error, ["/data/runs", "/data/results"]) == expected


def test_steps_of_calibration_are_not_taken_for_those_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (2, 30):
        content = record(key=f"{steps:016x}")
        content["config"] = {**content["config"], "method": {"name": "sparsegrad", "steps": steps}}
        write_json(tmp_path / "runs" / f"{steps}.json", content)
    shown = show(capsys, tmp_path).splitlines()
    assert any("calibration" in one and "steps" in other for one, other in itertools.pairwise(shown))
