"""The bars: speed and memory that the engines should reach, and what was measured."""

from __future__ import annotations

from statistics import median
from typing import Any

from experiments.bench.results import Document, summarise
from experiments.bench.shapes import find_shape

# Speed over full fine-tuning of a stack of MLPs on a CPU: arm -> tokens per step -> lower bound.
_STACK = {
    "exact": {180: 0.18, 512: 0.33, 2048: 0.57, 4096: 0.75},
    "exact_small": {180: 0.62, 512: 0.82, 2048: 0.88, 4096: 0.92},
}
_WHOLE, _SECONDS = "minilm-snippets-b32", 15.0
_EXACT_ON_GPU = (4096, 0.9)  # tokens per step from which exact has a bar, and the bar


def measured_bars(document: Document) -> list[dict[str, Any]]:
    """One entry per bar and setting that measures it: bound, measured ratio, whether it is met."""
    gpu = document.get("hardware", {}).get("device") == "cuda"
    found = []
    for key, arms in summarise(document).items():
        setting = document["settings"][key]
        stack = find_shape(setting["shape"]).is_stack
        for about, arm, of, reference, at_least, bound in _list_bars(gpu, stack, setting["tokens"]):
            ratio = arms.get(arm, {}).get(of, {}).get(reference)  # absent where arm or reference was not measured
            if ratio is not None:
                met = ratio["median"] >= bound if at_least else ratio["median"] <= bound
                asked = {"at_least" if at_least else "at_most": bound}
                found.append({"bar": about, "setting": key, "arm": arm, **asked, "measured": ratio, "met": met})
    return found + _calibration(document)


def _list_bars(gpu: bool, stack: bool, tokens: float) -> list[tuple[str, str, str, str, bool, float]]:
    """(description, arm, `speed` or `memory`, reference, whether the bound is a lower one, bound)."""
    asked = [
        ("exact, speed over the paper's layer", "exact", "speed", "layer_regular", True, 1.0),
        ("exact, speed over the paper's layer, Sparse-by-Dense", "exact", "speed", "layer_sparse_dense", True, 1.0),
        ("exact, memory over full fine-tuning", "exact", "memory", "full", False, 1.05),
        (
            "small side, compact moments, gradients released, memory over full",
            "exact_lean",
            "memory",
            "full",
            False,
            0.8,
        ),
        ("fast, speed over peft LoRA", "fast", "speed", "lora_peft", True, _bound_of_fast(gpu, tokens)),
        ("fast, memory over peft LoRA", "fast", "memory", "lora_peft", False, 0.7 if gpu else 0.85),
    ]
    if gpu and tokens >= _EXACT_ON_GPU[0]:
        asked.append(("exact, speed over full fine-tuning", "exact", "speed", "full", True, _EXACT_ON_GPU[1]))
    if not gpu and stack:
        for arm, bounds in _STACK.items():
            if (bound := bounds.get(round(tokens))) is not None:
                asked.append((f"{arm}, speed over full fine-tuning", arm, "speed", "full", True, bound))
    return asked


def _bound_of_fast(gpu: bool, tokens: float) -> float:
    """Its merge does not shrink with the batch: below 2,048 tokens on a CPU the bar is lower."""
    if gpu:
        return 1.1
    return 1.05 if tokens >= 2048 else 0.97


def _calibration(document: Document) -> list[dict[str, Any]]:
    return [*_whole_calibration(document), *_decompositions(document)]


def _whole_calibration(document: Document) -> list[dict[str, Any]]:
    """Seconds of a calibration of MiniLM by 30 batches of 32 snippets, on a CPU."""
    found = document["calibrations"].items()
    times = [one["seconds"] for key, one in found if key.startswith(_WHOLE) and one["status"] == "complete"]
    if not times or document.get("hardware", {}).get("device") == "cuda":
        return []
    measured = {"median": median(times), "min": min(times), "max": max(times), "n": len(times)}
    about = {"bar": "calibration and decomposition, seconds", "setting": _WHOLE}
    return [{**about, "at_most": _SECONDS, "measured": measured, "met": measured["median"] <= _SECONDS}]


def _decompositions(document: Document) -> list[dict[str, Any]]:
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
