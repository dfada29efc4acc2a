"""The results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.bench.arithmetic import COSTS, relative_speed
from experiments.bench.arms import ARMS
from experiments.bench.results import ABOUT_MIXED, mark_mixed, mlp_of
from experiments.bench.settings import Setting
from sparsegrad.files import write_text
from sparsegrad.runs.environment import read_device_name

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


def predictions() -> list[str]:
    """Predicted steps/s relative to full fine-tuning, by tokens per step: a Markdown table."""
    # Arms of equal cost share a row.
    settings = [Setting(shape="mlp_768", batch=batch, padding="none") for batch in PREDICTED_BATCHES]
    arms = {cost: ", ".join(f"`{name}`" for name, arm in ARMS.items() if arm.cost == cost) for cost in COSTS}
    rows = ([arms[cost], *(f"{relative_speed(cost, mlp_of(setting)):.2f}" for setting in settings)] for cost in COSTS)
    return list(table(("arms", *(f"{setting.tokens:,.0f} tokens" for setting in settings)), rows))


def _lines(document: Mapping[str, Any]) -> Iterable[str]:
    yield from _preamble(document)
    yield from _bars(document["bars"])
    for key, setting in document["settings"].items():
        arms = document["summary"].get(key)
        if arms:
            yield from _render_setting(setting, arms, _describe_counts(document, key))
    yield from _render_costs("Calibration of each shape", document["calibrations"])
    yield from _render_costs("Decomposition alone", document["decompositions"])


def _preamble(document: Mapping[str, Any]) -> Iterable[str]:
    hardware, versions = document["hardware"], document["versions"]
    yield f"# Speed and memory: {read_device_name(hardware)}"
    yield ""
    yield f"{hardware['threads']} CPU threads; torch {versions['torch']}, transformers {versions['transformers']},"
    yield f"peft {versions['peft']}. Random weights; batches of random tokens, with the token lengths of a task."
    yield "Values are medians over repeats; ratios are taken within a repeat, with minimum and maximum in brackets."
    if any(one and "mixed" in one for one in _list_ratios(document)):
        yield ABOUT_MIXED
    if hardware["device"] == "cuda":
        yield "Memory: peak allocated during the measured steps."
    else:
        yield "Memory: peak resident during the measured steps, above the loaded model."
    yield "Predicted: from the multiplications of the MLP linears alone (docs/performance.md)."
    yield ""


def _list_ratios(document: Mapping[str, Any]) -> Iterable[Mapping[str, float] | None]:
    for arms in document["summary"].values():
        for found in arms.values():
            yield from (*found["speed"].values(), *found["memory"].values())


def _render_setting(setting: Mapping[str, Any], arms: Mapping[str, Any], length: str) -> Iterable[str]:
    yield f"## {setting['label']}"
    yield ""
    yield f"{_describe_setting(setting)}. {length}"
    yield ""
    yield from table(_HEAD, (_row(setting, arm, found) for arm, found in arms.items()))
    yield ""


def _describe_counts(document: Mapping[str, Any], key: str) -> str:
    """Numbers of processes and steps, and whether they are fewer than the rule requires."""
    cells = [cell for cell in document["cells"] if cell["setting"] == key and cell["status"] == "complete"]
    if not cells:
        return "Nothing could be measured."
    repeats = len({cell["repeat"] for cell in cells})
    steps, warmup = min(cell["steps"] for cell in cells), min(cell["warmup_steps"] for cell in cells)
    short = steps < 50 or warmup < 20 or repeats < 3
    few = " Fewer than required (3 processes, 50 steps after 20)." if short else ""
    return f"{repeats} processes per arm, {steps} steps after {warmup} warm-up steps.{few}"


def _describe_setting(setting: Mapping[str, Any]) -> str:
    task = f" ({setting['task']})" if setting["task"] else ""
    return (
        f"Batch {setting['batch']} x {setting['length']}, padding {setting['padding']}{task}: {setting['tokens']:g} "
        f"tokens per step; rest of the model {setting['rest']}; {setting['precision']}; {setting['mode']}; LoRA rank "
        f"{setting['lora_rank']}"
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
    rows = (
        [bar["bar"], bar["setting"], _format_bound(bar), _format_measured(bar), "yes" if bar["met"] else "no"]
        for bar in bars
    )
    yield from table(("bar", "setting", "required", "measured", "met"), rows)
    yield ""


def _format_measured(bar: Mapping[str, Any]) -> str:
    """The measured ratio, with more digits where it is small, and how it was measured where that is recorded."""
    found = bar["measured"]
    shown = f"{found['median']:.4f}" if found and found["n"] == 1 and found["median"] < 0.1 else ratio(found)
    return shown + (f" ({bar['how']})" if "how" in bar else "")


def _format_bound(bar: Mapping[str, Any]) -> str:
    return f">= {bar['at_least']:g}" if "at_least" in bar else f"<= {bar['at_most']:g}"


def _render_costs(title: str, found: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    if not found:
        return
    yield f"## {title}"
    yield ""
    yield from table(
        ("what", "seconds", "peak MiB", "stacked tensor MiB"), (_format_cost(*item) for item in found.items())
    )
    yield ""


def _format_cost(name: str, cost: Mapping[str, Any]) -> list[str]:
    if cost["status"] != "complete":
        return [name, f"failed: {cost['reason']}", "", ""]
    steps = f", {cost['steps']} steps of {cost['tokens']:g} tokens each" if "steps" in cost else ""
    tensor = f"{cost['stacked_tensor_mib']:,.0f}" if "stacked_tensor_mib" in cost else ""
    return [name + steps, f"{cost['seconds']:.1f}", f"{cost['peak_mib']:,.0f}", tensor]


def _about(arm: str) -> str:
    return f"`{arm}`: {ARMS[arm].about}" if arm in ARMS else f"`{arm}`"


def ratio(found: Mapping[str, float] | None) -> str:
    """Median, with minimum and maximum in brackets where there are several values; marked as by `mark`."""
    if found is None:
        return ""
    span = "" if found["n"] == 1 else f" [{found['min']:.2f}, {found['max']:.2f}]"
    return f"{found['median']:.2f}{span}{mark(found)}"


def mark(found: Mapping[str, float]) -> str:
    """What follows a ratio of two arms that different commits measured; else empty."""
    return mark_mixed(int(found.get("mixed", 0)), int(found["n"]))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterable[str]:
    """Lines of a Markdown table."""
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
