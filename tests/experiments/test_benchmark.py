"""The benchmark: pairing of measurements, results file, no repeated measurements. No timing is tested."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import __main__ as benchmark
from experiments.bench import results, worker
from experiments.bench.arms import ARMS, REFERENCES
from experiments.bench.bars import _list_bars, measured_bars
from experiments.bench.presets import Decomposition, Planned, Schedule
from experiments.bench.render import write_table
from experiments.bench.runner import Bench, interleaved, run_process
from experiments.bench.settings import Setting, setting_from
from sparsegrad.errors import ResourceError, UserError

CPU = torch.device("cpu")
SETTING = Setting(shape="mlp_tiny", batch=2, length=8, padding="none", density=0.05)
SPEEDS = {
    "full": 2.0, "lora_peft": 4.0, "exact": 1.0, "fast": 5.0, "layer_regular": 0.5, "layer_sparse_dense": 2.0,
}  # fmt: skip
SCHEDULE = Schedule(repeats=2, warmup=2, steps=3, calibration_steps=2)
# Packages that a GPU machine may lack, and that the benchmark must not import.
BLOCKED = ("hydra", "omegaconf", "datasets", "evaluate", "optuna", "pandas", "sklearn", "tensorly")


class Fake(Bench):
    """Answers with a fixed speed per arm instead of starting processes; records requests, and fails for `failing`."""

    failing, reason = "", "out of memory"

    def _process(self, job: str, **arguments: Any) -> dict[str, Any]:
        self.__dict__.setdefault("asked", []).append((job, arguments))
        if job != "measure":
            Path(arguments["bases"]).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments["bases"]).touch()
            return {"status": "complete", "seconds": 1.0, "peak_mib": 1.0, "steps": 2, "tokens": 16}
        if arguments["arm"] == self.failing:
            return {"status": "failed", "reason": self.reason}
        speed = SPEEDS[arguments["arm"]] * (1 + arguments["seed"])  # the machine drifts between the repeats
        steps = min(arguments["steps"], 3)
        return {
            "status": "complete",
            "steps_per_second": speed,
            "peak_mib": 10 * speed,
            "steps": steps,
            "warmup_steps": 2,
            "step_ms": [1000 / speed] * steps,
        }

    @property
    def measured(self) -> list[tuple[str, int]]:
        return [(arguments["arm"], arguments["seed"]) for job, arguments in self.asked if job == "measure"]


def fake(folder: Path, **more: Any) -> Fake:
    bench = Fake(out=folder / "x.json", work=folder / "w", device=CPU, threads=1, schedule=SCHEDULE, **more)
    bench.tell = lambda line: None
    bench.__dict__["asked"] = []
    return bench


def run(bench: Bench, arms: tuple[str, ...] = ("full", "lora_peft", "exact", "fast")) -> dict[str, Any]:
    bench.run([(Planned(preset="core", setting=SETTING), list(arms))], [])
    return dict(json.loads(bench.out.read_text()))


def test_arms_take_turns_within_a_repeat() -> None:
    assert list(interleaved(["a", "b"], 2)) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_ratios_are_taken_within_a_repeat(tmp_path: Path) -> None:
    summary = run(fake(tmp_path))["summary"][SETTING.key]
    # Every pair agrees although the speeds of the repeats differ by a factor of two.
    assert summary["fast"]["speed"]["lora_peft"] == {"median": 1.25, "min": 1.25, "max": 1.25, "n": 2}
    assert summary["exact"]["memory"]["full"]["median"] == 0.5
    assert summary["fast"]["steps_per_second"] == {"median": 7.5, "min": 5.0, "max": 10.0, "n": 2}


def test_cells_of_different_length_are_not_compared(tmp_path: Path) -> None:
    document = run(fake(tmp_path))
    cell = results.find_cell(document, SETTING.key, "fast", 1)
    assert cell is not None
    cell["steps"] += 1
    assert results.summarise(document)[SETTING.key]["fast"]["speed"]["full"]["n"] == 1


def test_all_arms_take_the_steps_that_the_first_had_time_for(tmp_path: Path) -> None:
    bench = fake(tmp_path)
    bench.schedule = replace(SCHEDULE, steps=50, warmup=20, seconds=1.0)
    run(bench)
    asked = [(a["warmup"], a["steps"], a["seconds"]) for job, a in bench.asked if job == "measure"]
    assert asked[0] == (20, 50, 1.0)
    assert set(asked[1:]) == {(2, 3, None)}


def test_what_is_there_is_not_measured_again_unless_forced(tmp_path: Path) -> None:
    run(fake(tmp_path), ("full", "exact"))
    again = fake(tmp_path)
    run(again, ("full", "exact", "fast"))
    assert again.measured == [("fast", 0), ("fast", 1)]
    assert [job for job, _ in again.asked].count("calibrate") == 0
    forced = fake(tmp_path, force=True)
    document = run(forced, ("full", "exact"))
    assert len(forced.measured) == 4
    assert len(document["cells"]) == 6  # replaced, not doubled


def test_a_failure_is_a_result_and_stops_no_other(tmp_path: Path) -> None:
    bench = fake(tmp_path)
    bench.failing = "full"
    document = run(bench)
    assert [cell["reason"] for cell in document["cells"] if cell["arm"] == "full"] == ["out of memory"] * 2
    summary = document["summary"][SETTING.key]
    assert summary["full"]["failed"] == ["out of memory"]
    assert summary["exact"]["speed"]["full"] is None
    assert summary["fast"]["speed"]["lora_peft"]["median"] == 1.25
    assert "failed: out of memory" in bench.out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("reason", "repeats"),
    [
        (worker.reason(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), False),
        (f"{results.NO_BASES}{worker.reason(torch.OutOfMemoryError('CUDA out of memory'))}", False),
        ("took longer than 1200 seconds", True),
        ("killed by signal 9, probably out of memory", True),
        (worker.reason(RuntimeError("CUDA error: an illegal memory access was encountered")), True),
    ],
)
def test_a_failure_is_measured_again_unless_memory_is_short(tmp_path: Path, reason: str, repeats: bool) -> None:
    bench, second = fake(tmp_path), fake(tmp_path)
    bench.failing, bench.reason = "full", reason
    run(bench)
    run(second)
    assert second.measured == [("full", 0), ("full", 1)] * repeats


def test_nothing_new_is_started_after_the_minutes(tmp_path: Path) -> None:
    bench, lines = fake(tmp_path), []
    bench.schedule, bench.tell = replace(SCHEDULE, minutes=1e-9), lines.append
    assert run(bench)["cells"] == []
    assert "8 measurements left" in lines[-1]


def test_the_bars_are_read_from_the_summary(tmp_path: Path) -> None:
    found = {bar["bar"]: bar for bar in measured_bars(run(fake(tmp_path)))}
    assert found["fast, speed over peft LoRA"]["met"] is True
    assert found["fast, memory over peft LoRA"]["met"] is False
    assert "exact, speed over full fine-tuning" not in found  # has a bar only at 4,096 tokens


def test_every_bar_has_a_reference_that_ratios_are_computed_to(tmp_path: Path) -> None:
    document = run(fake(tmp_path), ("full", "lora_peft", "layer_regular", "layer_sparse_dense", "exact"))
    found = {bar["bar"]: bar for bar in measured_bars(document)}
    assert found["exact, speed over the paper's layer, Sparse-by-Dense"]["measured"]["median"] == 0.5
    for gpu, stack, tokens in product((True, False), (True, False), (180, 512, 2048, 4096)):
        for _, arm, _, reference, _, _ in _list_bars(gpu, stack, tokens):
            assert arm in ARMS
            assert reference in REFERENCES


def test_calibration_is_compared_at_the_same_count_or_extrapolated_and_says_so() -> None:
    shape = {"status": "complete", "out_features": 8, "in_features": 4, "stacked_tensor_mib": 100.0, "peak_mib": 4.0}
    counts = {("gram", 2): 1.0, ("gram", 10): 2.0, ("stacked", 2): 6.0, ("stacked", 4): 8.0}
    document = results.empty()
    for (method, count), seconds in counts.items():
        document["decompositions"][f"{method}{count}"] = {
            **shape, "method": method, "count": count, "seconds": seconds,
        }  # fmt: skip
    speed = [bar for bar in measured_bars(document) if "speed" in bar["bar"]]
    assert [(bar["measured"]["median"], bar["how"][:8]) for bar in speed] == [(6.0, "measured"), (7.0, "stacked:")]
    assert all(bar["met"] for bar in measured_bars(document))
    document["decompositions"]["stacked4"]["seconds"] = 5.0  # less than for two gradients: not usable
    assert len([bar for bar in measured_bars(document) if "speed" in bar["bar"]]) == 1


def test_the_document_has_the_fields_that_its_schema_names(tmp_path: Path) -> None:
    document = run(fake(tmp_path))
    assert document["schema"] == results.SCHEMA
    assert benchmark.__doc__ is not None
    schema = benchmark.__doc__.partition("Schema of")[2]
    for name in document:
        assert name == "schema" or re.search(rf"\b{name}\b", schema), name
    setting = document["settings"][SETTING.key]
    assert setting["tokens"] == 16
    assert setting["presets"] == ["core"]
    assert setting_from({name: setting[name] for name in Setting.__dataclass_fields__}) == SETTING
    assert set(setting["predicted"]["full"]) == set(ARMS)
    assert setting["predicted"]["full"]["full"] == 1


def test_a_table_and_a_plot_lie_beside_the_results(tmp_path: Path) -> None:
    run(fake(tmp_path))
    table = (tmp_path / "x.md").read_text()
    assert "`fast`: " + ARMS["fast"].about in table
    assert "2 processes per arm, 3 steps after 2 warm-up steps. Fewer than required" in table
    pytest.importorskip("matplotlib")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_table_of_nothing_is_written_too(tmp_path: Path) -> None:
    bench = fake(tmp_path)
    bench.run([], [])
    write_table(json.loads(bench.out.read_text()), tmp_path / "t.md")
    assert "# Speed and memory" in (tmp_path / "t.md").read_text()


def test_rendering_again_does_not_change_when_the_results_were_finished(tmp_path: Path) -> None:
    before = run(fake(tmp_path))
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**before, "finished": "then", "summary": {}}))
    assert benchmark.main(["--render", "--out", str(path)]) == 0
    assert json.loads(path.read_text()) == {**before, "finished": "then"}


def test_results_of_another_schema_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(UserError, match="schema 99"):
        run(fake(tmp_path))
    assert path.read_text() == '{"schema": 99}'


def test_results_that_cannot_be_read_now_are_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()  # stands for any failure of the disk
    with pytest.raises(ResourceError, match="nothing was deleted"):
        results.read(tmp_path / "x.json")


def test_a_process_that_dies_leaves_its_reason(tmp_path: Path) -> None:
    assert "signal 9" in run_process(["bash", "-c", "kill -9 $$"], tmp_path / "a.json", {})["reason"]
    assert run_process(["bash", "-c", "echo no >&2; exit 1"], tmp_path / "a.json", {})["reason"] == "no"


def test_a_real_run_needs_only_torch_transformers_and_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocks)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--shape", "tiny", "--task", "cola", "--batch", "2", "--length", "16", "--repeats", "1"]
    counts = ["--warmup", "2", "--steps", "3", "--threads", "1", "--device", "cpu", "--calibration-steps", "2"]
    out = ["--out", str(tmp_path / "x.json"), "--work", str(tmp_path / "w")]
    arms = ("lora_peft", "exact")
    assert benchmark.main([*arguments, *counts, *out, "--density", "0.05", "--arms", ",".join(arms)]) == 0
    document = json.loads((tmp_path / "x.json").read_text())
    assert [(cell["arm"], cell.get("reason")) for cell in document["cells"]] == [(arm, None) for arm in arms]
    for cell in document["cells"]:
        assert len(cell["step_ms"]) == cell["steps"] == 3
        assert cell["memory"]["device"] == "cpu"
        assert cell["trainable"] > 0
    (summary,) = document["summary"].values()
    assert all(summary[arm]["speed"]["lora_peft"]["n"] == 1 for arm in arms)
    assert document["calibrations"]["tiny-2"]["steps"] == 2


def test_a_decomposition_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    bench = Bench(out=tmp_path / "x.json", work=tmp_path, device=CPU, threads=1, schedule=SCHEDULE)
    bench.tell = lambda line: None
    bench.run([], [Decomposition(method="gram", out_features=16, in_features=8, count=3)])
    (found,) = bench.document["decompositions"].values()
    assert found["status"] == "complete"
    assert found["stacked_tensor_mib"] == round(16 * 8 * 3 * 8 / 2**20, 3)


def test_reflections_spare_the_calibration_and_the_results_say_so(tmp_path: Path) -> None:
    bench = fake(tmp_path, bases="reflections")
    document = run(bench, ("full", "exact"))
    assert [job for job, _ in bench.asked].count("calibrate") == 0
    assert document["calibrations"] == {}
    assert document["settings"][SETTING.key]["bases"] == "reflections"
    assert {cell["status"] for cell in document["cells"]} == {"complete"}
