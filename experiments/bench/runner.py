"""Run the benchmark: one process per measurement, arms interleaved, results written after each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.bench import machine, reflections, render, results
from experiments.bench.arms import find_arm
from experiments.bench.bars import measured_bars
from experiments.bench.decompose import stacked_mib
from experiments.bench.plot import write_plot
from experiments.bench.presets import Calibration, Decomposition, Planned, Schedule
from experiments.bench.settings import Setting
from experiments.paths import ROOT
from sparsegrad import progress
from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.runs.environment import describe_environment, now, read_device_name

_NEVER = ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG")  # debugging settings that change timings
TIMEOUT = 1200  # seconds for one process, compilation included


@dataclass(kw_only=True)
class Bench:
    """One call of the benchmark.

    Attributes:
        out: results file.
        work: folder of the bases; they are calibrated where it has none.
        device, threads, schedule: options of the command.
        force: measure again even where results exist.
        bases: `calibrated`, or `reflections` (see `bench.reflections`).
        tell: called with each line of progress.
        document: the results.
    """

    out: Path
    work: Path
    device: torch.device
    threads: int
    schedule: Schedule
    force: bool = False
    bases: str = "calibrated"
    tell: Callable[[str], None] = print
    document: results.Document = field(default_factory=results.empty)
    _start: float = field(default_factory=time.monotonic)
    _kept: list[str] = field(default_factory=list)  # settings that `force` did not reach in time

    def run(self, planned: list[tuple[Planned, list[str]]], apart: list[Decomposition | Calibration]) -> None:
        """Measure what the results lack.

        A failed measurement is recorded. The next call repeats it, unless the GPU's memory was too small for it.

        Raises:
            UserError: when the results are of another device, thread count or bases, or cannot be read.
        """
        before = results.read(self.out)
        self._check_conditions(before, [chosen.setting.key for chosen, _ in planned])
        self.document = {**before, **self._head()}
        left, total = 0, len(apart) + self.schedule.repeats * sum(len(arms) for _, arms in planned)
        with progress.job("benchmark", total, unit="measurements") as bar:
            for one in apart:
                if isinstance(one, Decomposition):
                    self._decomposition(one)
                else:
                    self._calibration(one)
                bar.step()
            for chosen, arms in planned:
                left += self._setting(chosen, arms, bar)
        self.document["finished"] = now()
        self.write()
        if left:
            self.tell(self._describe_left(left))

    def _setting(self, chosen: Planned, arms: list[str], bar: progress.Job) -> int:
        """Measure the arms of a setting in turn; the number of measurements that there was no time for."""
        key, left = chosen.setting.key, 0
        self._note(chosen)
        if self.force and not self._is_over_time():
            # Cells of an earlier call would decide the number of steps, and stay beyond the present repeats.
            results.drop_cells(self.document, key, arms)
        elif self.force and any(cell["setting"] == key and cell["arm"] in arms for cell in self.document["cells"]):
            self._kept.append(key)
        for repeat, arm in interleaved(arms, self.schedule.repeats):
            bar.update(note=arm)
            if self._is_over_time():
                left += self.force or not results.is_final(results.find_cell(self.document, key, arm, repeat))
            else:
                self._cell(chosen, arm, repeat)
            bar.step()
        return left

    def _describe_left(self, left: int) -> str:
        said = f"{left} measurements left after {self.schedule.minutes:g} minutes: "
        if not self.force:
            return f"{said}the same command continues with them"
        if not self._kept:
            return f"{said}the same command without --force continues with them"
        return (
            f"{said}the same command without --force continues with those that have no result. Still with earlier "
            f"results, which only --force with more --minutes measures again: {', '.join(self._kept)}"
        )

    def write(self) -> None:
        """Write results, table and plot."""
        self.document["summary"] = results.summarise(self.document)
        self.document["bars"] = measured_bars(self.document)
        write_json(self.out, self.document)
        render.write_table(self.document, self.out.with_suffix(".md"))
        try:
            write_plot(self.document, self.out.with_suffix(".png"))
        except UserError as error:
            self.tell(str(error))

    def _check_conditions(self, before: results.Document, settings: Sequence[str]) -> None:
        """Refuse to add to results that were measured otherwise."""
        known = before.get("hardware", {})
        name = read_device_name(known)
        if known and name != (own := read_device_name(machine.facts(self.device))):
            raise UserError(f"{self.out} was measured on {name}, not on {own}: choose another --out")
        given: list[tuple[str, Any, Any, str]] = [("threads", known.get("threads", self.threads), self.threads, "")]
        noted = {key: before["settings"][key] for key in settings if key in before["settings"]}
        given += [("bases", of.get("bases", self.bases), self.bases, f" of {key}") for key, of in noted.items()]
        for option, earlier, now_given, place in given:
            if earlier != now_given:
                raise UserError(
                    f"{option}={now_given} is not allowed: {self.out}{place} was measured with {option}={earlier}; "
                    f"choose another --out, or --{option} {earlier}"
                )

    def _head(self) -> dict[str, Any]:
        found = describe_environment(self.device)
        slug = machine.slug(self.device, self.threads)
        facts = {**machine.facts(self.device), "threads": self.threads}
        schedule = asdict(self.schedule)
        return {
            "name": slug,
            "schedule": schedule,
            "hardware": facts,
            "versions": found["versions"],
            "git": found["git"],
        }

    def _note(self, chosen: Planned) -> None:
        known = self.document["settings"].get(chosen.setting.key, {})
        presets = sorted({*known.get("presets", []), chosen.preset})
        note = {**results.describe(chosen.setting), "presets": presets, "bases": self.bases}
        self.document["settings"][chosen.setting.key] = note

    def _cell(self, chosen: Planned, arm: str, repeat: int) -> None:
        setting = chosen.setting
        if not self.force and results.is_final(results.find_cell(self.document, setting.key, arm, repeat)):
            return
        bases = self._bases(setting) if find_arm(arm).bases else None
        if isinstance(bases, str):
            answer = {"status": "failed", "reason": bases}  # no bases, so the arm cannot run
        else:
            answer = self._measure(chosen, arm, repeat, bases)
        # Written after each measurement: an interrupted benchmark loses one process at most.
        cell = {"setting": setting.key, "arm": arm, "repeat": repeat, **answer, **self._stamp()}
        results.put_cell(self.document, cell)
        write_json(self.out, self.document)
        self.tell(f"{setting.key} {arm} {repeat}: {_format_answer(cell)}")

    def _measure(self, chosen: Planned, arm: str, repeat: int, bases: Path | None) -> dict[str, Any]:
        setting, (warmup, steps, seconds) = chosen.setting, self._step_counts(chosen)
        return self._process(
            "measure",
            setting=setting.as_json(),
            arm=arm,
            device=self.device.type,
            bases=str(bases),
            seed=repeat,
            warmup=warmup,
            steps=steps,
            seconds=seconds,
        )

    def _step_counts(self, chosen: Planned) -> tuple[int, int, float | None]:
        """Warm-up steps, measured steps and time limit.

        The first arm of a setting stops at the time limit; all others then run as many steps, so that they compare.
        """
        for cell in self.document["cells"]:
            if cell["setting"] == chosen.setting.key and cell["status"] == "complete":
                return cell["warmup_steps"], cell["steps"], None
        seconds = self.schedule.seconds
        return self.schedule.warmup, self.schedule.steps, seconds and seconds * chosen.share

    def _bases(self, setting: Setting) -> Path | str:
        """The file with the bases of the setting's model, calibrated if necessary; or the reason why there is none."""
        blocks, _ = setting.architecture.cut(setting.blocks)
        key = f"{setting.shape}-{blocks}"
        if self.bases == "reflections":
            return reflections.write(setting.architecture, self.work / f"{key}-reflections.safetensors")
        path = self.work / f"{key}.safetensors"
        if path.is_file() and self.document["calibrations"].get(key, {}).get("status") == "complete":
            return path
        steps = self.schedule.calibration_steps
        # All settings of a shape share these bases; a small batch keeps the calibration short.
        fields = {**setting.as_json(), "batch": min(setting.batch, 4)}
        arguments = {"device": self.device.type, "bases": str(path), "seed": 0, "steps": steps}
        answer = self._process("calibrate", setting=fields, **arguments)
        self.document["calibrations"][key] = {**answer, **self._stamp()}
        self.tell(f"{key} calibration: {_format_answer(answer)}")
        return path if answer["status"] == "complete" else f"{results.NO_BASES}{answer['reason']}"

    def _decomposition(self, wanted: Decomposition) -> None:
        found = self.document["decompositions"]
        if results.is_final(found.get(wanted.key)) and not self.force:
            return
        sizes = {"out_features": wanted.out_features, "in_features": wanted.in_features, "count": wanted.count}
        answer = self._process("decompose", method=wanted.method, **sizes, seed=0)
        arithmetic = {"stacked_tensor_mib": round(stacked_mib(**sizes), 3)}
        found[wanted.key] = {"method": wanted.method, **sizes, **arithmetic, **answer, **self._stamp()}
        write_json(self.out, self.document)
        self.tell(f"decomposition {wanted.key}: {_format_answer(answer)}")

    def _calibration(self, wanted: Calibration) -> None:
        found = self.document["calibrations"]
        if results.is_final(found.get(wanted.key)) and not self.force:
            return
        setting = Setting(shape=wanted.shape, task=wanted.task, batch=wanted.batch, padding="longest").as_json()
        arguments = {"device": self.device.type, "bases": str(self.work / "unused.safetensors"), "seed": wanted.repeat}
        answer = self._process("calibrate", setting=setting, **arguments, steps=wanted.steps)
        found[wanted.key] = {**answer, **self._stamp()}
        write_json(self.out, self.document)
        self.tell(f"calibration {wanted.key}: {_format_answer(answer)}")

    def _process(self, job: str, **arguments: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
            request.write_text(json.dumps({"job": job, "threads": self.threads, **arguments}))
            command = [sys.executable, "-m", "experiments.bench.worker", str(request), str(answer)]
            return run_process(command, answer, self._environment())

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _NEVER}
        # The worker is started by module name, and this package need not be installed.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}

    def _stamp(self) -> dict[str, Any]:
        return {"commit": self.document["git"].get("commit"), "time": now()}

    def _is_over_time(self) -> bool:
        minutes = self.schedule.minutes
        return minutes is not None and time.monotonic() - self._start > 60 * minutes


def interleaved(arms: list[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(repeat, arm): every arm once, then all again, so that drift of the machine affects all arms alike."""
    for repeat in range(repeats):
        for arm in arms:
            yield repeat, arm


def run_process(command: Iterable[str], answer: Path, env: dict[str, str]) -> dict[str, Any]:
    """The answer of the process, or a failure with the way it ended."""
    try:
        ended = subprocess.run(list(command), env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took longer than {TIMEOUT} seconds"}
    if answer.is_file():  # also after a crash at exit, when the measurement itself was complete
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
    if ended.returncode < 0:
        hint = ", probably out of memory" if ended.returncode == -signal.SIGKILL else ""
        return {"status": "failed", "reason": f"killed by signal {-ended.returncode}{hint}"}
    lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
    return {"status": "failed", "reason": lines[-1][:300]}


def _format_answer(answer: dict[str, Any]) -> str:
    if answer["status"] != "complete":
        return f"failed: {answer['reason']}"
    if "steps_per_second" in answer:
        speed = f"{answer['steps_per_second']:.3g} steps/s ({answer['steps']} steps)"
        return f"{speed}, peak {answer['peak_mib']:.0f} MiB"
    return f"{answer['seconds']:.1f} s, peak {answer['peak_mib']:.0f} MiB"
