"""List the kernels of a training step on a GPU by their time, with torch's profiler.

    python -m experiments.studies.kernels --arms full exact exact_gradient --out results/studies/kernels.json

One process measures all arms in one setting of the benchmark (experiments/bench), with random orthogonal bases. The
reported times are those of the kernels only: the profiler slows the CPU, so the time of a whole step would be wrong.
The benchmark measures that.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from experiments.bench import measure, reflections
from experiments.bench.arms import ARMS
from experiments.bench.settings import Setting
from experiments.paths import ROOT
from sparsegrad.basis import load_bases
from sparsegrad.files import write_json
from sparsegrad.runs.environment import describe_environment

_WARMUP, _STEPS, _LONGEST = 6, 3, 12


def profile_arm(arm: str, setting: Setting, device: torch.device) -> dict[str, Any]:
    """The longest kernels of a step of `arm`, by time on `device`; on a CPU, operators instead of kernels."""
    torch.set_float32_matmul_precision("high" if setting.precision == "tf32" else "highest")
    with tempfile.TemporaryDirectory() as folder:
        bases = reflections.write(setting.architecture, Path(folder) / "bases.safetensors")
        model, source = measure.prepare_model(setting, device, 0), measure.batches(setting, device, 0, _WARMUP + _STEPS)
        loop = measure.prepare_loop(setting, arm, model, source, device, lambda: load_bases(bases))
    for _ in range(_WARMUP):
        loop.step()
    if device.type == "cuda":
        torch.cuda.synchronize()  # kernels of the warm-up that still wait would be counted
    with profile() as profiled:
        for _ in range(_STEPS):
            loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return {"arm": arm, **_summarise(profiled, device)}


def _summarise(profiled: profile, device: torch.device) -> dict[str, Any]:
    events = profiled.key_averages()
    on_gpu = device.type == "cuda"
    # A kernel's time is also that of the operator that launched it: only what ran on the device itself is counted.
    kernels = [one for one in events if not on_gpu or one.device_type.name == "CUDA"]
    time = {one.key: (one.self_device_time_total if on_gpu else one.self_cpu_time_total) for one in kernels}
    longest = sorted(kernels, key=lambda one: -time[one.key])[:_LONGEST]
    return {
        "milliseconds": round(sum(time.values()) / _STEPS / 1000, 3),
        "launches": round(sum(one.count for one in events if "LaunchKernel" in one.key) / _STEPS),
        "kernels": [
            {"name": one.key, "milliseconds": round(time[one.key] / _STEPS / 1000, 3), "count": one.count / _STEPS}
            for one in longest
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["full", "exact", "exact_gradient", "exact_small"])
    parser.add_argument("--shape", default="bert_base")
    parser.add_argument("--precision", default="tf32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results/studies/kernels.json")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    setting = Setting(shape=chosen.shape, task="mrpc", batch=16, precision=chosen.precision)
    rows = []
    for arm in chosen.arms:
        rows.append(profile_arm(arm, setting, device))
        gc.collect()
        print(f"{arm}: {rows[-1]['milliseconds']} ms, {rows[-1]['launches']} launches", flush=True)
        for kernel in rows[-1]["kernels"]:
            print(f"    {kernel['milliseconds']:8.3f} ms  {kernel['count']:6.1f} x  {kernel['name'][:90]}", flush=True)
    write_json(chosen.out, {"environment": describe_environment(device), "setting": setting.as_json(), "arms": rows})


if __name__ == "__main__":
    main()
