"""The settings that each kind of hardware measures, most important first: an interrupted benchmark is still useful."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from experiments.bench import machine
from experiments.bench.arms import MAIN_ARMS, PAPER_ARMS
from experiments.bench.lengths import histograms
from experiments.bench.settings import Setting

PRESETS = (
    "core",
    "paper",
    "model",
    "precision",
    "tokens",
    "width",
    "llama",
    "compiled",
    "decomposition",
    "calibration",
)
_FLOOR_AND_MAIN = ("frozen", *MAIN_ARMS)
_BARS = (
    "frozen",
    "full",
    "lora_peft",
    "lora_fused",
    "layer_regular",
    "exact",
    "exact_release",
    "exact_lean",
    "fast",
)
_DYNAMIC_ARMS = (*PAPER_ARMS, "exact_small")
_FEW_BARS = ("full", "lora_peft", "layer_regular", "exact", "exact_gradient", "exact_small", "exact_lean", "fast")
# The arms of the accuracy runs on MiniLM: the evidence tables show their speed.
_ACCURACY = (*_FLOOR_AND_MAIN, "exact_release", "meprop", "authors")
PAPER_MODEL = "roberta_base"
PADDED_TASK = "cola"  # padded to 128 tokens all tasks cost the same, so one is measured
ACCURACY_SETTING = Setting(shape="minilm", padding="longest", task="snippets")
_LLAMA_GIB = 24  # needed for two full-size blocks in float32 with moments and bases


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A setting to be measured, and its arms; empty `arms`: all that make sense in it."""

    preset: str
    setting: Setting
    arms: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Factor on the time limit: settings that have bars are measured for longer."""
        return 1.0 if self.preset in ("core", "custom") else 0.5


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """One decomposition to be measured: `method` on `count` random gradients (out, in)."""

    method: str
    out_features: int
    in_features: int
    count: int

    @property
    def key(self) -> str:
        """A readable name."""
        return f"{self.method}-{self.out_features}x{self.in_features}-{self.count}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One whole calibration to be measured, as long as the paper's: gradients of `steps` batches and HOSVD."""

    shape: str
    task: str
    batch: int
    steps: int
    repeat: int

    @property
    def key(self) -> str:
        """A readable name."""
        return f"{self.shape}-{self.task}-b{self.batch}-{self.repeat}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often and how long to measure.

    Attributes:
        repeats: processes per arm and setting.
        warmup, steps: warm-up steps and measured steps.
        seconds: time limit of the measured steps of one process; None: no limit.
        calibration_steps: batches of a calibration.
        minutes: no measurement starts later than this; None: no limit.
    """

    repeats: int = 3
    warmup: int = 20
    steps: int = 50
    seconds: float | None = None
    calibration_steps: int = 30
    minutes: float | None = None


def default_schedule(device: torch.device, quick: bool) -> Schedule:
    """20 warm-up and 50 measured steps in 3 processes; on a CPU with a time limit, and with `quick` far fewer."""
    if quick:
        return Schedule(repeats=1, warmup=2, steps=5, seconds=1.0, calibration_steps=2)
    if device.type == "cpu":
        return Schedule(seconds=4.0, calibration_steps=8, minutes=28)
    return Schedule()


def plan(device: torch.device, quick: bool) -> list[Planned]:
    """The settings to measure on this hardware, in order."""
    if quick:
        return _quick()
    return _on_gpu(device) if device.type == "cuda" else _on_cpu(device)


def decompositions(quick: bool) -> list[Decomposition]:
    """The decompositions to measure, of a base model's shape; one layer kind, as the other is its transpose.

    360 gradients are 30 steps of 12 blocks. The stacked tensor of 360 does not fit into memory; its time is
    extrapolated from two smaller counts, in which it is linear.
    """
    if quick:
        return [_decomposition(method, 768, 192, 12) for method in ("gram", "stacked")]
    counts = [("gram", 12), ("gram", 360), ("stacked", 6), ("stacked", 12)]
    return [_decomposition(method, 3072, 768, count) for method, count in counts]


def paper_setting(*, task: str = PADDED_TASK, **fields: Any) -> Setting:
    """The setting of Tables 3, 7 and 8; `fields` are those in which it differs, such as the batch size."""
    return Setting(shape=PAPER_MODEL, task=task, **fields)


def calibrations(quick: bool, repeats: int) -> list[Calibration]:
    """The whole calibrations to measure: MiniLM, 30 batches of 32 snippets."""
    sizes = {"batch": 4, "steps": 2} if quick else {"batch": 32, "steps": 30}
    return [Calibration(shape="minilm", task="snippets", **sizes, repeat=repeat) for repeat in range(repeats)]


def _decomposition(method: str, out_features: int, in_features: int, count: int) -> Decomposition:
    return Decomposition(method=method, out_features=out_features, in_features=in_features, count=count)


def _stack(preset: str, shape: str, batch: int, arms: tuple[str, ...] = (), **more: Any) -> Planned:
    return Planned(preset=preset, setting=Setting(shape=shape, batch=batch, padding="none", **more), arms=arms)


def _quick() -> list[Planned]:
    model = Planned(preset="model", setting=ACCURACY_SETTING, arms=MAIN_ARMS)
    return [_stack("core", "mlp_768", 4, blocks=1), model]


def _padded(blocks: int | None, batches: tuple[int, ...]) -> list[Planned]:
    """Tables 3, 7 and 8 padded to 128 tokens."""
    return [_paper(blocks=blocks, batch=batch) for batch in batches]


def _dynamic(blocks: int | None) -> list[Planned]:
    """Tables 7 and 8 padded to the longest row: cost differs by task. MNLI, QNLI and QQP have no token lengths here."""
    tasks = [task for task in histograms() if task != "snippets"]
    return [_paper(_DYNAMIC_ARMS, blocks=blocks, padding="longest", task=task) for task in tasks]


def _paper(arms: tuple[str, ...] = PAPER_ARMS, **fields: Any) -> Planned:
    return Planned(preset="paper", setting=paper_setting(**fields), arms=arms)


def _on_cpu(device: torch.device) -> list[Planned]:
    half = [name for name in machine.precisions(device) if name == "bf16_autocast"]
    return [
        _stack("tokens", "mlp_768", 1, _FEW_BARS, length=180),
        _stack("tokens", "mlp_768", 4, _FEW_BARS),
        _stack("core", "mlp_768", 16),
        _stack("tokens", "mlp_768", 32, _FEW_BARS),
        Planned(preset="model", setting=ACCURACY_SETTING, arms=_ACCURACY),
        *(_stack("precision", "mlp_768", 16, (*MAIN_ARMS, "exact_rotation_bf16"), precision=name) for name in half),
        *_dynamic(1),
        _stack("tokens", "mlp_768", 64, _FEW_BARS),
        *_padded(1, (16,)),
        _stack("tokens", "mlp_768", 8, _FEW_BARS),
        *_padded(1, (32,)),
        _llama("llama_quarter", 1, 2, "fp32"),
        *(_stack("width", f"mlp_{hidden}", 16, MAIN_ARMS) for hidden in (384, 1024)),
        *_padded(None, (16,)),
    ]


def _on_gpu(device: torch.device) -> list[Planned]:
    names = machine.precisions(device)
    best = "tf32" if "tf32" in names else "fp32"
    half = [name for name in names if name.startswith("bf16")]
    base: dict[str, Any] = {"shape": "bert_base", "task": "mrpc"}
    chosen = [Planned(preset="core", setting=Setting(**base, precision=name)) for name in [best, *half]]
    chosen += [_stack("core", "mlp_768", 32, precision=name) for name in [best, *half[-1:]]]
    chosen += [*_padded(None, (16, 32)), *_dynamic(None)]
    chosen += _whole_models(base, [best, *half[-1:]])
    chosen += [Planned(preset="precision", setting=Setting(**base), arms=_BARS)]
    sweep = {"precision": (half or [best])[-1]}  # the lowest precision of the GPU
    chosen += [_stack("tokens", "mlp_768", batch, MAIN_ARMS, **sweep) for batch in (4, 8, 16, 64)]
    chosen += [_stack("width", f"mlp_{width}", 16, MAIN_ARMS, **sweep) for width in (384, 768, 1024, 2048, 4096)]
    if half and machine.gpu_memory_gib(device) >= _LLAMA_GIB:
        chosen += [_llama("llama_2_7b", 2, 4, half[-1])]
    else:
        chosen += [_llama("llama_quarter", 2, 4, best)]
    chosen += [
        Planned(preset="compiled", setting=Setting(**base, precision=name, mode="compiled"), arms=_BARS)
        for name in [best, *half[-1:]]
    ]
    return _without_repeats(chosen)


def _whole_models(base: dict[str, Any], precisions: list[str]) -> list[Planned]:
    """Other batch sizes, dynamic padding, a frozen rest, and the other shapes."""
    settings = [Setting(**base, batch=batch, precision=name) for batch in (8, 32) for name in precisions]
    settings += [Setting(**base, padding="longest", precision=name) for name in precisions]
    settings += [Setting(**base, rest="frozen", precision=name) for name in precisions]
    for shape in ("roberta_large", "roberta_base", "minilm"):
        settings += [Setting(shape=shape, task="mrpc", precision=name) for name in precisions]
    return [Planned(preset="model", setting=setting, arms=_BARS) for setting in settings]


def _llama(shape: str, blocks: int, batch: int, precision: str) -> Planned:
    setting = Setting(
        shape=shape, blocks=blocks, batch=batch, length=512, padding="none", rest="frozen", precision=precision
    )
    return Planned(preset="llama", setting=setting, arms=_FLOOR_AND_MAIN)


def _without_repeats(chosen: list[Planned]) -> list[Planned]:
    """Of equal settings the first, in the order of `chosen`."""
    # A later duplicate overwrites an earlier one in a dict, hence reversed twice.
    return list({planned.setting.key: planned for planned in reversed(chosen)}.values())[::-1]
