"""The bars: speed and memory that the engines should reach, and what was measured."""

from __future__ import annotations

from typing import Any

from experiments.bench.results import Document, summarise

_TOKENS = 4096  # per step, at which a CPU has a bar for exact over full fine-tuning


def measured_bars(document: Document) -> list[dict[str, Any]]:
    """One entry per bar and setting that measures it: bound, measured ratio, whether it is met."""
    gpu = document.get("hardware", {}).get("device") == "cuda"
    found = []
    for key, arms in summarise(document).items():
        tokens = document["settings"][key]["tokens"]
        for about, arm, of, reference, at_least, bound in _list_bars(gpu, tokens):
            ratio = arms.get(arm, {}).get(of, {}).get(reference)  # absent where arm or reference was not measured
            if ratio is not None:
                met = ratio["median"] >= bound if at_least else ratio["median"] <= bound
                asked = {"at_least" if at_least else "at_most": bound}
                found.append({"bar": about, "setting": key, "arm": arm, **asked, "measured": ratio, "met": met})
    return found + _calibration(document)


def _list_bars(gpu: bool, tokens: float) -> list[tuple[str, str, str, str, bool, float]]:
    """(description, arm, `speed` or `memory`, reference, whether the bound is a lower one, bound)."""
    asked = [
        ("exact, speed over the paper's layer", "exact", "speed", "layer_regular", True, 2.0),
        ("exact, memory over full fine-tuning", "exact", "memory", "full", False, 1.0),
        ("exact, gradients released, memory over full", "exact_release", "memory", "full", False, 1.0),
        ("fast, speed over peft LoRA", "fast", "speed", "lora_peft", True, 1.15),
        ("fast, memory over peft LoRA", "fast", "memory", "lora_peft", False, 0.85),
    ]
    if gpu:
        asked.append(("exact, memory over peft LoRA", "exact", "memory", "lora_peft", False, 1.0))
    if gpu or tokens == _TOKENS:
        bound = 1.0 if gpu else 0.75
        asked.append(("exact, speed over full fine-tuning", "exact", "speed", "full", True, bound))
    return asked


def _calibration(document: Document) -> list[dict[str, Any]]:
    """Gram matrices compared with the stacked tensor at the same number of gradients."""
    done = [found for found in document["decompositions"].values() if found["status"] == "complete"]
    lines = []
    for gram in (found for found in done if found["method"] == "gram"):
        shape = {name: gram[name] for name in ("out_features", "in_features", "count")}
        name = "{out_features}x{in_features}, {count} gradients".format(**shape)
        seconds, measured = _stacked_seconds(done, shape)
        if seconds is not None:
            ratio = round(seconds / gram["seconds"], 2)
            how = "measured" if measured else "stacked: extrapolated linearly from smaller counts"
            about = {"bar": "calibration, speed over stacked SVD", "setting": name, "how": how}
            lines.append({**about, "at_least": 5.0, "measured": _single(ratio), "met": ratio >= 5})
        ratio = round(gram["peak_mib"] / gram["stacked_tensor_mib"], 4)
        about = {"bar": "calibration, memory over the stacked tensor", "setting": name}
        lines.append({**about, "at_most": 0.05, "measured": _single(ratio), "met": ratio <= 0.05})
    return lines


def _stacked_seconds(done: list[dict[str, Any]], shape: dict[str, int]) -> tuple[float | None, bool]:
    """(seconds of the stacked SVD at this count, whether they were measured); (None, False) if unknown."""
    alike = ("out_features", "in_features")
    same = [found for found in done if found["method"] == "stacked" and all(found[n] == shape[n] for n in alike)]
    times = {found["count"]: found["seconds"] for found in same}
    if shape["count"] in times:
        return times[shape["count"]], True
    if len(times) < 2:
        return None, False
    (first, low), *_, (last, high) = sorted(times.items())
    if high <= low:  # timings of a busy machine: no line can be fitted through them
        return None, False
    return low + (high - low) / (last - first) * (shape["count"] - first), False


def _single(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value, "n": 1}
