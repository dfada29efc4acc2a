"""Several trials on one device: which device a worker uses, and how much of it (`sweep.device_share`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sparsegrad.device import pick_device
from sparsegrad.errors import fail
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.memory_estimate import GIB, estimate_run, memory_of
from sparsegrad.sweeps.admission import Device
from sparsegrad.sweeps.config import SweepPlan

_USABLE = 0.9  # of a device's memory: the rest is for the system, fragmentation and what an estimate misses


def count_slots(plan: SweepPlan) -> int:
    """The number of workers that share the devices of this machine: `sweep.workers`, or what `device_share` allows."""
    share = plan.sweep.device_share
    return plan.sweep.workers if share is None else len(_list_devices(plan)) * _count_per_device(share)


def take_device(index: int) -> None:
    """Choose one of the GPUs that this process may use for the worker of that number, if there are several.

    It must be called before CUDA is used: the choice has no effect later. Workers go round the GPUs, also those that
    share them, so that few workers have a GPU each.
    """
    devices = _list_gpus()
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]


def check_packing(plan: SweepPlan) -> None:
    """Check that as many workers as asked for, and at least one trial, have room.

    Raises:
        UserError: with a share or a number of workers that has.
    """
    share, workers = plan.sweep.device_share, plan.sweep.workers
    if share is None:
        return
    if workers > (slots := count_slots(plan)):
        raise fail(
            "sweep.workers",
            workers,
            f"sweep.device_share={share:g} has room for {slots} on this machine",
            f"use at most {slots} workers or a smaller share",
        )
    capacity = _usable_memory(plan)
    smallest = min(estimate_run(config) for config in _probe(plan))
    if smallest > share * capacity:
        needed = smallest / capacity
        remedy = (
            f"use at least {math.ceil(100 * needed) / 100}"
            if needed <= 1
            else "use a smaller model, batch or data.max_length"
        )
        room = f"it is {share * capacity / GIB:.1f} GiB of the device"
        raise fail(
            "sweep.device_share", share, f"{room}, and the smallest trial needs about {smallest / GIB:.1f} GiB", remedy
        )


class Packing:
    """Admits the trials of one worker to its device. Without `sweep.device_share` it admits all at once.

    Attributes:
        is_shared: whether other trials may run on the device at the same time.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.is_shared = plan.sweep.device_share is not None
        self._device = Device(_name_device(plan), _usable_memory(plan)) if self.is_shared else None

    @contextmanager
    def admitted(self, config: RunConfig, pause: Callable[[str], None], *, alone: bool = False) -> Iterator[None]:
        """Within: the estimated memory of the run is reserved. Before, `pause` is called while it is not free.

        A run with an estimate above the whole device runs alone: estimates are upper bounds, so that it may fit.

        Args:
            config: the run.
            pause: sleeps; it gets the reason.
            alone: reserve the whole device, whatever the estimate.
        """
        if self._device is None:
            yield
            return
        with self._device.reserve(self._device.capacity if alone else estimate_run(config), pause):
            yield


def _probe(plan: SweepPlan) -> Iterator[RunConfig]:
    """The run with the values that are not searched, and with each end of each range."""
    yield plan.base
    yield from map(plan.trial_config, plan.space.probes())


def _list_gpus() -> list[str]:
    """The GPUs that this process may use, by number or identifier.

    Counting them does not start CUDA where torch can ask the driver's management library (NVML).
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def _list_devices(plan: SweepPlan) -> list[str]:
    return (_list_gpus() if plan.base.train.device != "cpu" else []) or ["cpu"]


def _name_device(plan: SweepPlan) -> str:
    """The name of this worker's device, which is the same in all processes."""
    is_gpu = pick_device(plan.base.train.device).type == "cuda"
    return f"gpu-{torch.cuda.get_device_properties(0).uuid}" if is_gpu else "cpu"


def _usable_memory(plan: SweepPlan) -> int:
    return int(_USABLE * memory_of(pick_device(plan.base.train.device)))


def _count_per_device(share: float) -> int:
    return int(1 / share + 1e-9)  # 1 / 0.1 must be 10, whatever it is rounded to
