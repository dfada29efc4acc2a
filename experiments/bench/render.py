"""The results as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.bench.arithmetic import COSTS, relative_speed
from experiments.bench.arms import ARMS
from experiments.bench.results import mlp_of
from experiments.bench.settings import Setting
from sparsegrad.files import write_text

PREDICTED_BATCHES = (4, 16, 32, 64)  # of 128 tokens
_HEAD = (
    "arm",
    "steps/s",
    "speed over full",
    "predicted",
    "speed over peft LoRA",
    "predicted",
    "peak MiB",
    "memory over full",
    "memory over peft LoRA",
)


def write_table(document: Mapping[str, Any], path: Path) -> None:
    """Write the results to `path` as Markdown, atomically."""
    write_text(path, "\n".join(_lines(document)) + "\n")


def predictions(shape: str = "mlp_768") -> list[str]:
    """Steps/s over full fine-tuning that the arithmetic gives each cost, by tokens a step."""
    settings = [Setting(shape=shape, batch=batch, padding="none") for batch in PREDICTED_BATCHES]
    arms = {cost: ", ".join(f"`{name}`" for name, arm in ARMS.items() if arm.cost == cost) for cost in COSTS}
    rows = ([arms[cost], *(f"{relative_speed(cost, mlp_of(setting)):.2f}" for setting in settings)] for cost in COSTS)
    return list(table(("arms", *(f"{setting.tokens:,.0f} tokens" for setting in settings)), rows))


def _lines(document: Mapping[str, Any]) -> Iterable[str]:
    yield from _preamble(document)
    yield from _bars(document["bars"])
    for key, setting in document["settings"].items():
        arms = document["summary"].get(key)
        if arms:
            yield from _setting(setting, arms, _length(document, key))
    yield from _apart("Calibration of each shape", document["calibrations"])
    yield from _apart("Decomposition alone", document["decompositions"])


def _preamble(document: Mapping[str, Any]) -> Iterable[str]:
    hardware, versions = document["hardware"], document["versions"]
    device = hardware.get("gpu", hardware["cpu"])
    yield f"# Speed and memory: {device}"
    yield ""
    yield f"{hardware['threads']} CPU threads; torch {versions['torch']}, transformers {versions['transformers']},"
    yield f"peft {versions['peft']}. Random weights of the true architecture, random tokens of true lengths."
    yield "Medians over repeats, each ratio taken within a repeat, its least and greatest in brackets. Memory:"
    if hardware["device"] == "cuda":
        yield "peak allocated in the measured steps."
    else:
        yield "peak resident in the measured steps, above the loaded model."
    yield "Predicted: by the multiplications of the MLP linears alone (docs/performance.md)."
    yield ""


def _setting(setting: Mapping[str, Any], arms: Mapping[str, Any], length: str) -> Iterable[str]:
    yield f"## {setting['label']}"
    yield ""
    yield f"{_conditions(setting)}. {length}"
    yield ""
    yield from table(_HEAD, (_row(setting, arm, found) for arm, found in arms.items()))
    yield ""


def _length(document: Mapping[str, Any], key: str) -> str:
    """How many steps a process took, and whether that is fewer than wanted."""
    cells = [cell for cell in document["cells"] if cell["setting"] == key and cell["status"] == "complete"]
    if not cells:
        return "Nothing could be measured."
    repeats = len({cell["repeat"] for cell in cells})
    steps, warmup = min(cell["steps"] for cell in cells), min(cell["warmup_steps"] for cell in cells)
    short = steps < 50 or warmup < 20 or repeats < 3
    few = " Fewer than the rule asks (50 after 20, 3 processes)." if short else ""
    return f"{repeats} processes an arm, {steps} steps after {warmup}.{few}"


def _conditions(setting: Mapping[str, Any]) -> str:
    task = f" ({setting['task']})" if setting["task"] else ""
    return (
        f"{setting['batch']} x {setting['length']}, padding {setting['padding']}{task}: {setting['tokens']:g} tokens; "
        f"rest {setting['rest']}; {setting['precision']}; {setting['mode']}; LoRA rank {setting['lora_rank']}"
    )


def _row(setting: Mapping[str, Any], arm: str, found: Mapping[str, Any]) -> list[str]:
    if found["steps_per_second"] is None:
        return [_about(arm), f"failed: {(found['failed'] or ['?'])[0]}", *[""] * (len(_HEAD) - 2)]
    predicted = setting["predicted"]
    return [
        _about(arm),
        f"{found['steps_per_second']['median']:.3g}",
        ratio(found["speed"]["full"]),
        f"{predicted['full'][arm]:.2f}" if arm in predicted["full"] else "",
        ratio(found["speed"]["lora_peft"]),
        f"{predicted['lora_peft'][arm]:.2f}" if arm in predicted["lora_peft"] else "",
        f"{found['peak_mib']['median']:,.0f}",
        ratio(found["memory"]["full"]),
        ratio(found["memory"]["lora_peft"]),
    ]


def _bars(bars: list[Mapping[str, Any]]) -> Iterable[str]:
    if not bars:
        return
    yield "## Bars"
    yield ""
    rows = ([bar["bar"], bar["setting"], _asked(bar), _found(bar), "yes" if bar["met"] else "no"] for bar in bars)
    yield from table(("bar", "where", "asked", "measured", "met"), rows)
    yield ""


def _found(bar: Mapping[str, Any]) -> str:
    """What was measured, with digits enough to be told from what was asked; and how, where that is not the rule."""
    found = bar["measured"]
    shown = f"{found['median']:.4f}" if found and found["n"] == 1 and found["median"] < 0.1 else ratio(found)
    return shown + (f" ({bar['how']})" if "how" in bar else "")


def _asked(bar: Mapping[str, Any]) -> str:
    return f">= {bar['at_least']:g}" if "at_least" in bar else f"<= {bar['at_most']:g}"


def _apart(title: str, found: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    if not found:
        return
    yield f"## {title}"
    yield ""
    yield from table(("what", "seconds", "peak MiB", "stacked tensor MiB"), (_cost(*item) for item in found.items()))
    yield ""


def _cost(name: str, cost: Mapping[str, Any]) -> list[str]:
    if cost["status"] != "complete":
        return [name, f"failed: {cost['reason']}", "", ""]
    steps = f", {cost['steps']} steps of {cost['tokens']:g} tokens" if "steps" in cost else ""
    tensor = f"{cost['stacked_tensor_mib']:,.0f}" if "stacked_tensor_mib" in cost else ""
    return [name + steps, f"{cost['seconds']:.1f}", f"{cost['peak_mib']:,.0f}", tensor]


def _about(arm: str) -> str:
    return f"`{arm}`: {ARMS[arm].about}" if arm in ARMS else f"`{arm}`"


def ratio(found: Mapping[str, float] | None) -> str:
    """Median with the least and greatest of several."""
    if found is None:
        return ""
    if found["n"] == 1:
        return f"{found['median']:.2f}"
    return f"{found['median']:.2f} [{found['min']:.2f}, {found['max']:.2f}]"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterable[str]:
    """Markdown lines."""
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
