"""Measure time and memory of training steps of one arm in one setting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.arms import find_arm
from experiments.bench.lengths import batch_lengths, token_batch
from experiments.bench.settings import Setting, setting_from
from experiments.bench.shapes import build_model, mlp_linears
from sparsegrad.basis import Basis, load_bases, save_bases
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.errors import UserError
from sparsegrad.methods.base import Context
from sparsegrad.targets import weight_shapes
from sparsegrad.trainer.peak_memory import PeakMemory

Batch = dict[str, Tensor]
Bases = Callable[[], dict[str, Basis]]
FEWEST_WARMUP, FEWEST_STEPS = 2, 3
_CALIBRATION = 8  # distinct batches of an arm that calibrates itself
_POOL = 4  # distinct batches of a stack of MLPs; they are large, so they are reused in turn


def measure_arm(
    setting: dict[str, Any],
    arm: str,
    device: str,
    bases: str,
    seed: int,
    warmup: int,
    steps: int,
    seconds: float | None,
) -> dict[str, Any]:
    """Measure `steps` training steps after `warmup` others.

    Args:
        setting: output of `Setting.as_json`.
        arm: name that `find_arm` knows.
        device: cpu or cuda.
        bases: file with the bases of this model's shape; read only if the arm needs them.
        seed: seed of weights and batches.
        warmup, steps: numbers of steps; upper bounds if `seconds` is given.
        seconds: time limit of the measured steps; half as much is allowed for the warm-up.

    Returns:
        The fields of a cell that are measured: see the schema in `bench/__main__.py`.

    Raises:
        UserError: when the loss is not a number, or the arm does not fit the setting.
    """
    chosen, place = setting_from(setting), torch.device(device)
    # Before anything runs: it changes how every matrix product is computed.
    torch.set_float32_matmul_precision("high" if chosen.precision == "tf32" else "highest")
    _prime(arm, chosen.precision, chosen.mode, place)
    model, source = prepare_model(chosen, place, seed), batches(chosen, place, seed, warmup + steps)
    memory = PeakMemory(place)
    loop = prepare_loop(chosen, arm, model, source, place, lambda: load_bases(bases))
    warm, first = _timed(loop, place, warmup, FEWEST_WARMUP, seconds and seconds / 2)
    memory.start()
    _, times = _timed(loop, place, steps, FEWEST_STEPS, seconds, memory)
    memory.stop()
    loss = float(loop.last_loss)
    if loss != loss:  # timings of a diverged model are not comparable
        raise UserError("the loss is not a number after the measured steps")
    return {
        **_speed(times),
        "warmup_steps": warm,
        "first_step_seconds": round(first[0] / 1000, 3),
        "memory": memory.report(),
        "peak_mib": _peak(memory),
        "last_loss": round(loss, 4),
        **loop.counts,
    }


def calibrate_shape(setting: dict[str, Any], device: str, bases: str, seed: int, steps: int) -> dict[str, Any]:
    """Calibrate the bases of a shape in float32 and write them to `bases`; returns what that cost."""
    chosen, place = setting_from({**setting, "precision": "fp32", "mode": "eager"}), torch.device(device)
    model, source = prepare_model(chosen, place, seed), batches(chosen, place, seed, steps)
    mlp = {kind: list(found.values()) for kind, found in mlp_linears(chosen.architecture, model).items()}
    memory = PeakMemory(place)
    memory.start()
    before = _now(place)
    found = calibrate(model, source, mlp, steps)
    elapsed = _now(place) - before
    memory.stop()
    save_bases(Path(bases), {kind: basis.to("cpu") for kind, basis in found.items()}, chosen.shape)
    report = {"memory": memory.report(), "peak_mib": _peak(memory)}
    return {"seconds": round(elapsed, 3), "steps": steps, "tokens": chosen.tokens, **report}


def batches(setting: Setting, device: torch.device, seed: int, count: int) -> Iterator[Batch]:
    """Endless batches on the device; the same for every arm."""
    shape, generator = setting.architecture, torch.Generator().manual_seed(seed)
    if shape.is_stack:
        size = (setting.batch, setting.length, shape.hidden)  # (rows, tokens, hidden)
        dtype = _weight_dtype(setting)
        made = [
            {
                "inputs": torch.randn(size, generator=generator).to(dtype),
                "labels": torch.randint(0, 2, (setting.batch,), generator=generator),
            }
            for _ in range(min(_POOL, count))
        ]
    else:
        made = list(_token_batches(setting, generator, seed, count))
    moved = [{name: value.to(device) for name, value in batch.items()} for batch in made]
    return cycle(moved)


def _token_batches(setting: Setting, generator: torch.Generator, seed: int, count: int) -> Iterator[Batch]:
    _, words = setting.architecture.cut(setting.blocks)
    for lengths in batch_lengths(setting.task or "", setting.batch, setting.length, setting.padding, count, seed):
        width = max(lengths) if setting.padding == "longest" else setting.length
        yield token_batch(lengths, width, words, generator)


def _prime(arm: str, precision: str, mode: str, device: torch.device) -> None:
    """Run a step of the arm on a tiny model, so that lazy imports and set-up do not count as the arm's memory."""
    setting = Setting(shape="mlp_tiny", padding="none", batch=2, length=8, precision=precision, mode=mode, density=0.1)
    model = prepare_model(setting, device, 0)

    def identities() -> dict[str, Basis]:
        shapes = weight_shapes(mlp_linears(setting.architecture, model))
        return {kind: Basis.identity(*shape) for kind, shape in shapes.items()}

    prepare_loop(setting, arm, model, batches(setting, device, 0, 1), device, identities).step()


@dataclass
class Loop:
    """A prepared training loop; `step` runs one step."""

    model: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    source: Iterator[Batch]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    counts: dict[str, Any]
    last_loss: Tensor | float = 0.0

    def step(self) -> None:
        with self.autocast():
            loss = self.model(**next(self.source)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last_loss = loss.detach()  # read once at the end: `.item()` here would synchronise every step


def prepare_loop(
    setting: Setting, arm: str, model: nn.Module, source: Iterator[Batch], device: torch.device, bases: Bases
) -> Loop:
    """The training loop of an arm; `bases` is called if the arm needs them."""
    linears = mlp_linears(setting.architecture, model)
    method = find_arm(arm).make(setting)
    method.check(linears)
    prepared = method.prepare(model, linears, _context(setting, device, bases))
    # Compiled after `prepare`, which replaces modules or adds adapters.
    counts = {"trainable": prepared.trainable, "trainable_per_weight": prepared.trainable_per_weight}
    called = torch.compile(model) if setting.mode == "compiled" else model
    return Loop(called, prepared.optimizer, source, _autocast(setting, device), counts)


def _context(setting: Setting, device: torch.device, bases: Bases) -> Context:
    # Stands in for calibration: the bases are calibrated once per shape, in a process of their own.
    def load_stored(settings: Mapping[str, Any] | None, _: Any) -> tuple[dict[str, Basis], dict[str, Any]]:
        sides = (settings or {}).get("sides", "both")
        return {kind: basis.only(sides).to(device) for kind, basis in bases().items()}, {}

    return Context(
        lr=1e-5,
        weight_decay=0.0,
        train_rest=setting.rest == "trained",
        is_head=setting.architecture.is_head,
        # A stream of its own: the measured batches must be the same for an arm that calibrates.
        batches=lambda: batches(setting, device, 0, _CALIBRATION),
        calibrated=load_stored,
    )


def prepare_model(setting: Setting, device: torch.device, seed: int) -> nn.Module:
    """The setting's model with random weights."""
    torch.manual_seed(seed)
    return build_model(setting.architecture, setting.blocks, _weight_dtype(setting)).to(device)


def _weight_dtype(setting: Setting) -> torch.dtype:
    return torch.bfloat16 if setting.precision == "bf16" else torch.float32


def _autocast(setting: Setting, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if setting.precision.startswith("bf16"):  # also with bf16 weights: those that train are float32
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


def _timed(
    loop: Loop, device: torch.device, most: int, fewest: int, seconds: float | None, memory: PeakMemory | None = None
) -> tuple[int, list[float]]:
    """Run at most `most` and at least `fewest` steps within `seconds`: (number of steps, milliseconds of each)."""
    clock = _CudaClock() if device.type == "cuda" else _CpuClock()
    start = time.monotonic()
    for done in range(most):
        if seconds is not None and done >= fewest and time.monotonic() - start > seconds:
            break
        clock.before()
        loop.step()
        clock.after()
        if memory is not None and device.type == "cpu":  # outside the timed part; CUDA keeps its own peak
            memory.sample()
    times = clock.milliseconds()
    return len(times), times


class _CpuClock:
    def __init__(self) -> None:
        self._times: list[float] = []

    def before(self) -> None:
        self._start = time.perf_counter()

    def after(self) -> None:
        self._times.append((time.perf_counter() - self._start) * 1000)

    def milliseconds(self) -> list[float]:
        return self._times


class _CudaClock:
    """Events on the device: the host runs ahead, as in training, and synchronises once at the end."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def before(self) -> None:
        if not self._events:  # each later step begins at the event that ended the one before
            self.after()

    def after(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def milliseconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self._events, self._events[1:], strict=False)]


def _speed(times: list[float]) -> dict[str, Any]:
    return {
        "steps": len(times),
        "steps_per_second": round(1000 / median(times), 5),
        "step_ms": [round(ms, 3) for ms in times],
    }


def _peak(memory: PeakMemory) -> float:
    """Peak MiB that tables show: allocated on a GPU, resident above the loaded model on a CPU."""
    report = memory.report()
    if "allocated_mib" in report:
        return float(report["allocated_mib"])
    return round(float(report["resident_mib"]) - float(report["baseline_mib"]), 1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":  # kernels run asynchronously
        torch.cuda.synchronize()
    return time.perf_counter()
