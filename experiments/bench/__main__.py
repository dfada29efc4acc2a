"""Measure speed and memory of the methods: `python -m experiments.bench` (`make bench`).

An arm is a method, in one variant; a setting is a model with its batches and precision. Each arm, setting and repeat is
measured in its own process. The arms take turns within a repeat, and ratios are computed within a repeat; those of arms
that different commits measured, in separate calls, are marked. Another thread count or device than that of an existing
file is refused, and so are other bases of one of its settings; `--force` drops an arm's earlier cells, and names the
settings that `--minutes` does not reach, which keep theirs. Results that exist are not measured again, so the same
command continues an interrupted benchmark; it repeats failed measurements, except those that ran out of GPU memory. A
GPU measures more settings than a CPU. The benchmark runs from a checkout without installing the package; it needs
torch, transformers, peft, psutil and safetensors.

Schema of `results/bench/HARDWARE.json` (schema 1):

    name, hardware, versions, git, schedule, finished   of the last call: machine, code, repeats and step counts
    settings    key -> what all arms share: shape, blocks (of the model; None: all), batch, length, padding
                (max_length, longest, none), task (the source of the token lengths), rest (trained, frozen), precision,
                mode, density; tokens per step, label (how the model was cut), lora_rank, presets, and predicted:
                reference -> arm -> predicted ratio of steps/s, from the arithmetic of the MLP linears
                (`bench.arithmetic`)
    cells       one per setting, arm and repeat: status (complete or failed, with reason), steps, step_ms (of each
                measured step), steps_per_second (from their median), warmup_steps, first_step_seconds, peak_mib (GPU:
                allocated; CPU: resident above the loaded model), memory (raw), trainable, trainable_per_weight,
                last_loss, commit, time. All arms of a setting run the same number of steps on the same batches
    calibrations    shape-blocks -> seconds, peak_mib, steps, tokens: the cost of the bases, which cells do not
                include; and shape-task-bBATCH-REPEAT, calibrations with as many steps as in the paper
    decompositions  method-OUTxIN-COUNT -> seconds, peak_mib of the HOSVD of random gradients; stacked_tensor_mib is
                computed: the size of that tensor in float64
    summary     setting -> arm -> steps_per_second, peak_mib, and speed, memory: reference -> ratio to it (speed
                above 1 is faster, memory below 1 is smaller); each as median, min, max and n over repeats, and
                mixed: the number of these repeats whose two cells are of different commits, if there are any
    bars        targets of the engines: required value, measured value, whether it is met

Preset `paper` measures Tables 3, 7 and 8: RoBERTa-base with the paper's arms `full`, `lora_peft`, `layer_sparse_dense`
and `layer_regular`, and with our engines `exact` and `fast`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.bench import machine
from experiments.bench.arms import ARMS, arms_of, find_arm
from experiments.bench.presets import (
    PRESETS,
    Calibration,
    Decomposition,
    Planned,
    Schedule,
    calibrations,
    decompositions,
    default_schedule,
    plan,
)
from experiments.bench.reflections import BASES
from experiments.bench.render import predictions
from experiments.bench.results import read
from experiments.bench.runner import Bench
from experiments.bench.settings import MODES, PRECISIONS, RESTS, Setting
from experiments.bench.shapes import SHAPES, find_shape
from sparsegrad.device import pick_device
from sparsegrad.errors import UserError, check_choice, check_integer, check_number, run_as_command
from sparsegrad.files import check_writable
from sparsegrad.progress import say

_FIELDS = ("shape", "blocks", "batch", "length", "padding", "task", "rest", "precision", "mode", "density")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0, or 2 and one line with the remedy after bad input."""
    try:
        run(parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Check all options, then measure, list or render.

    Raises:
        UserError: for an option that is not allowed, or results that cannot be read or written.
    """
    if options.predict:
        print("\n".join(predictions()))
        return
    # Everything is checked before the first measurement: a benchmark runs for hours.
    device = pick_device(options.device, "--device")
    schedule = _schedule(options, device)
    planned, apart = _choose(options, device, schedule)
    for chosen, _ in planned:
        machine.check_precision(chosen.setting.precision, device)
    if options.list:
        _list(planned, apart)
        return
    bench = _make_bench(options, device, schedule)
    if options.render:
        bench.document = read(bench.out)
        bench.write()
    else:
        bench.run(planned, apart)
    print(f"{bench.out}; next to it a table (.md) and, if matplotlib is installed, a plot (.png)")


def _make_bench(options: argparse.Namespace, device: torch.device, schedule: Schedule) -> Bench:
    """The benchmark of one machine, after a check that its results can be written."""
    threads = options.threads or machine.default_threads()
    bench = Bench(
        out=_out(options, device, threads),
        work=Path(options.work) / device.type,
        device=device,
        threads=threads,
        schedule=schedule,
        force=options.force,
        bases=options.bases,
        tell=say,
    )
    check_writable(bench.out.parent)
    return bench


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m experiments.bench", description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--quick", action="store_true", help="check in under 3 minutes that it works; no usable timings")
    made.add_argument("--presets", help=f"comma-separated, of {','.join(PRESETS)} (default: all)")
    made.add_argument("--arms", help=f"comma-separated, of {','.join(ARMS)}; or options of conf/method (peft/dora)")
    made.add_argument("--out", help="results file (default results/bench/HARDWARE.json)")
    made.add_argument("--work", default="outputs/work/bench", help="folder of the bases (default %(default)s)")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument(
        "--bases",
        default=BASES[0],
        choices=BASES,
        help="reflections: random orthogonal bases without calibration (default %(default)s)",
    )
    made.add_argument(
        "--force",
        action="store_true",
        help="measure again even where results exist; with the steps of the other arms of a setting, if it has any",
    )
    made.add_argument(
        "--render", action="store_true", help="measure nothing; write table and plot of the existing results"
    )
    made.add_argument("--predict", action="store_true", help="measure nothing; print the predicted speeds")
    made.add_argument("--list", action="store_true", help="print what would be measured")
    for name, about in (("threads", "CPU threads"), ("repeats", "processes per arm"), ("warmup", "warm-up steps")):
        made.add_argument(f"--{name}", type=int, help=about)
    made.add_argument("--steps", type=int, help="measured steps")
    made.add_argument("--seconds", type=float, help="time limit of the measured steps; 0: none")
    made.add_argument("--calibration-steps", type=int)
    made.add_argument("--minutes", type=float, help="start no measurement after this time (default on a CPU: 28)")
    _add_setting(made.add_argument_group("a single setting instead of presets (with --shape)"))
    return made


def _add_setting(group: Any) -> None:
    group.add_argument("--shape", help=", ".join(SHAPES))
    for name in ("blocks", "batch", "length"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--padding", help="max_length, longest, none")
    group.add_argument("--task", help="task whose token lengths are used")
    group.add_argument("--rest", help=", ".join(RESTS))
    group.add_argument("--precision", help=", ".join(PRECISIONS))
    group.add_argument("--mode", help=", ".join(MODES))
    group.add_argument("--density", type=float)


def _schedule(options: argparse.Namespace, device: torch.device) -> Schedule:
    default = default_schedule(device, options.quick)
    counts = {
        name: check_integer(name, _pick_given(getattr(options, name), getattr(default, name)), at_least=1)
        for name in ("repeats", "warmup", "steps", "calibration_steps")
    }
    seconds = _pick_given(options.seconds, default.seconds)
    if seconds is not None:
        check_number("seconds", seconds, at_least=0)
    minutes = _pick_given(options.minutes, default.minutes)
    if minutes is not None:
        check_number("minutes", minutes, above=0)
    if options.threads is not None:
        check_integer("threads", options.threads, at_least=1)
    return Schedule(**counts, seconds=seconds or None, minutes=minutes)  # --seconds 0 means no limit


def _choose(
    options: argparse.Namespace, device: torch.device, schedule: Schedule
) -> tuple[list[tuple[Planned, list[str]]], list[Decomposition | Calibration]]:
    """The settings to measure, each with its arms, and the decompositions and calibrations."""
    wanted = tuple(_split_names(options.arms))
    for arm in wanted:
        find_arm(arm)
    if options.shape is None:  # presets
        _refuse_lone_fields(options)
        presets = [check_choice("preset", name, PRESETS) for name in _split_names(options.presets)] or list(PRESETS)
        planned = [found for found in plan(device, options.quick) if found.preset in presets]
        apart = [] if wanted else _list_apart(presets, options.quick, schedule)  # they belong to no arm
    else:
        planned, apart = [Planned(preset="custom", setting=_setting(options))], []
    pairs = [(found, _select_arms(found, wanted)) for found in planned]
    return [(found, arms) for found, arms in pairs if arms], apart


def _list_apart(presets: list[str], quick: bool, schedule: Schedule) -> list[Decomposition | Calibration]:
    apart: list[Decomposition | Calibration] = []
    if "decomposition" in presets:
        apart += decompositions(quick)
    if "calibration" in presets:
        apart += calibrations(quick, schedule.repeats)
    return apart


def _select_arms(found: Planned, wanted: tuple[str, ...]) -> list[str]:
    """The planned arms of a setting, narrowed to `wanted` where that is not empty; and its options of conf/method."""
    planned = [arm for arm in arms_of(found.setting, found.arms) if not wanted or arm in wanted]
    return planned + [arm for arm in wanted if arm not in ARMS]


def _setting(options: argparse.Namespace) -> Setting:
    given = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    if find_shape(options.shape).is_stack:
        given.setdefault("padding", "none")
    elif given.get("padding") != "none":
        given.setdefault("task", "mrpc")
    return Setting(**given)


def _refuse_lone_fields(options: argparse.Namespace) -> None:
    for name in _FIELDS:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} belongs to --shape: name the shape too, one of {', '.join(SHAPES)}")


def _out(options: argparse.Namespace, device: torch.device, threads: int) -> Path:
    name = machine.slug(device, threads)
    if options.out:
        return Path(options.out)
    return Path(f"outputs/bench/{name}-quick.json") if options.quick else Path(f"results/bench/{name}.json")


def _list(planned: list[tuple[Planned, list[str]]], apart: list[Decomposition | Calibration]) -> None:
    for found, arms in planned:
        print(f"{found.preset:10} {found.setting.key}: {', '.join(arms)}")
    for one in apart:
        print(f"{type(one).__name__.lower()} {one.key}")


def _split_names(text: str | None) -> list[str]:
    return [name for name in (text or "").replace(" ", ",").split(",") if name]


def _pick_given(value: Any, default: Any) -> Any:
    return default if value is None else value  # not `or`: 0 is a value


if __name__ == "__main__":
    sys.exit(run_as_command(main, "interrupted: the same command continues where it stopped"))
