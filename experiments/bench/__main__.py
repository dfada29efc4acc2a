"""Speed and memory, measured apart from accuracy: `python -m experiments.bench` (`make bench`).

One process per arm, setting and repeat; the arms take turns within a repeat; ratios are taken within a repeat. Needs
torch, transformers and peft alone. On a GPU it chooses more settings by itself. What is in the results already is not
measured again, so the same command goes on where it was stopped.

Schema of `results/bench/HARDWARE.json` (schema 1):

    name, hardware, versions, git, schedule, finished   of the last call: machine, code, how often and how long
    settings    key -> what is the same for all arms: shape, blocks (of the model, None: all), batch, length, padding
                (max_length, longest, none), task (whose token lengths), rest (trained, frozen), precision, mode,
                density; tokens a step, label (what was cut), lora_rank, presets, and predicted: reference -> arm ->
                steps/s over the reference's by the arithmetic of the MLP linears (`bench.arithmetic`)
    cells       one per setting, arm and repeat: status (complete or failed, with reason), steps and step_ms (each
                measured step), steps_per_second (by their median), warmup_steps, first_step_seconds, peak_mib (GPU:
                allocated; CPU: resident above the loaded model), memory (raw), trainable, trainable_per_weight,
                last_loss, commit, time. All arms of a setting take the same steps on the same batches
    calibrations    shape-blocks -> seconds, peak_mib, steps, tokens: what the bases cost, outside all cells
    decompositions  method-OUTxIN-COUNT -> seconds, peak_mib of the HOSVD of random gradients; stacked_tensor_mib is
                arithmetic: that tensor in float64
    summary     setting -> arm -> steps_per_second, peak_mib, and speed, memory: reference -> ratio to it (speed
                above 1 is faster, memory below 1 is smaller); each a median, min, max and n over repeats
    bars        what is asked of the engines, measured, met

Preset `paper` is for Tables 3, 7 and 8: RoBERTa-base, arms `full`, `lora_peft`, `layer_sparse_dense`, `layer_regular`,
and ours, `exact` and `fast`.
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
from experiments.bench.presets import PRESETS, Decomposition, Planned, Schedule, decompositions, default_schedule, plan
from experiments.bench.reflections import BASES
from experiments.bench.render import predictions
from experiments.bench.results import read
from experiments.bench.runner import Bench
from experiments.bench.settings import MODES, PRECISIONS, RESTS, Setting
from experiments.bench.shapes import SHAPES, find_shape
from sparsegrad.errors import UserError, check_choice, check_integer, check_number
from sparsegrad.files import check_writable
from sparsegrad.trainer.device import pick_device

_FIELDS = ("shape", "blocks", "batch", "length", "padding", "task", "rest", "precision", "mode", "density")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 after bad input, with one line that says what to do."""
    try:
        run(parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Check everything, then measure."""
    if options.predict:
        print("\n".join(predictions()))
        return
    device = pick_device(options.device, "--device")
    schedule = _schedule(options, device)
    planned, apart = _chosen(options, device)
    for chosen, _ in planned:
        machine.check_precision(chosen.setting.precision, device)
    if options.list:
        _list(planned, apart)
        return
    threads = options.threads or machine.default_threads()
    bench = Bench(
        out=_out(options, device, threads),
        work=Path(options.work) / device.type,
        device=device,
        threads=threads,
        schedule=schedule,
        force=options.force,
        bases=options.bases,
        tell=lambda line: print(line, flush=True),
    )
    check_writable(bench.out.parent)
    if options.render:
        bench.document = read(bench.out)
        bench.write()
    else:
        bench.run(planned, apart)
    print(f"{bench.out} and beside it a table (.md) and, with matplotlib, a plot (.png)")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m experiments.bench", description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--quick", action="store_true", help="under 3 minutes; says that it works, not how fast")
    made.add_argument("--presets", help=f"some of {','.join(PRESETS)}; all by default")
    made.add_argument("--arms", help=f"some of {','.join(ARMS)}")
    made.add_argument("--out", help="file of the results (default results/bench/HARDWARE.json)")
    made.add_argument("--work", default="runs/bench", help="folder for bases")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--bases", default=BASES[0], choices=BASES, help="reflections: not calibrated, at once")
    made.add_argument("--force", action="store_true", help="measure again what is there")
    made.add_argument("--render", action="store_true", help="measure nothing: table and plot of what is there")
    made.add_argument("--predict", action="store_true", help="measure nothing: what the arithmetic predicts")
    made.add_argument("--list", action="store_true", help="print what would be measured")
    for name, about in (("threads", "CPU threads"), ("repeats", "processes per arm"), ("warmup", "steps not measured")):
        made.add_argument(f"--{name}", type=int, help=about)
    made.add_argument("--steps", type=int, help="measured steps")
    made.add_argument("--seconds", type=float, help="bound of the measured part; 0: none")
    made.add_argument("--calibration-steps", type=int)
    made.add_argument("--minutes", type=float, help="start nothing new after these (CPU: 28)")
    _add_setting(made.add_argument_group("one setting instead of presets, when --shape is given"))
    return made


def _add_setting(group: Any) -> None:
    group.add_argument("--shape", help=", ".join(SHAPES))
    for name in ("blocks", "batch", "length"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--padding", help="max_length, longest, none")
    group.add_argument("--task", help="whose token lengths")
    group.add_argument("--rest", help=", ".join(RESTS))
    group.add_argument("--precision", help=", ".join(PRECISIONS))
    group.add_argument("--mode", help=", ".join(MODES))
    group.add_argument("--density", type=float)


def _schedule(options: argparse.Namespace, device: torch.device) -> Schedule:
    default = default_schedule(device, options.quick)
    counts = {
        name: check_integer(name, _or(getattr(options, name), getattr(default, name)), at_least=1)
        for name in ("repeats", "warmup", "steps", "calibration_steps")
    }
    seconds = _or(options.seconds, default.seconds)
    if seconds is not None:
        check_number("seconds", seconds, at_least=0)
    minutes = _or(options.minutes, default.minutes)
    if minutes is not None:
        check_number("minutes", minutes, above=0)
    if options.threads is not None:
        check_integer("threads", options.threads, at_least=1)
    return Schedule(**counts, seconds=seconds or None, minutes=minutes)


def _chosen(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[tuple[Planned, list[str]]], list[Decomposition]]:
    """Settings with their arms, and decompositions."""
    wanted = tuple(_names(options.arms))
    for arm in wanted:
        find_arm(arm)
    if options.shape is None:
        _refuse_lone_fields(options)
        presets = [check_choice("preset", name, PRESETS) for name in _names(options.presets)] or list(PRESETS)
        planned = [found for found in plan(device, options.quick) if found.preset in presets]
        apart = decompositions(options.quick) if "decomposition" in presets and not wanted else []
    else:
        planned, apart = [Planned(preset="custom", setting=_setting(options))], []
    pairs = [(found, _both(found, wanted)) for found in planned]
    return [(found, arms) for found, arms in pairs if arms], apart


def _both(found: Planned, wanted: tuple[str, ...]) -> list[str]:
    """The arms of a setting; where some are `wanted`, those of them that are planned there."""
    arms = arms_of(found.setting, found.arms)
    return [arm for arm in arms if not wanted or arm in wanted]


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
    return Path(f"runs/bench/{name}-quick.json") if options.quick else Path(f"results/bench/{name}.json")


def _list(planned: list[tuple[Planned, list[str]]], apart: list[Decomposition]) -> None:
    for found, arms in planned:
        print(f"{found.preset:10} {found.setting.key}: {', '.join(arms)}")
    for decomposition in apart:
        print(f"decomposition {decomposition.key}")


def _names(text: str | None) -> list[str]:
    return [name for name in (text or "").replace(" ", ",").split(",") if name]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


if __name__ == "__main__":
    sys.exit(main())
