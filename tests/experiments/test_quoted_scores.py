"""The scores and differences that README.md and docs/ quote are those of the generated tables."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from quoted_pages import CHOOSING, EVIDENCE, README, TASKS, cell, missing, passage, read, rows_below, table

from experiments.paths import ROOT
from experiments.published import GLUE_MODELS, average_of_cells, cells
from experiments.report.runs import EvidenceRun

MINUS = "SparseGrad exact minus this"
ALONE = "stsb and sst2 alone"
LORAS = ("LoRA as in the paper", "LoRA, alpha = 2 rank", "LoRA as in the authors' code")
EXACT, FAST, MEPROP = "SparseGrad exact", "SparseGrad fast (not exact)", "MeProp"
SMALL = "SparseGrad, small side"
# A method's name in the tables -> on the pages, where they differ.
IN_README = {"LoRA, alpha = 2 rank": "LoRA with alpha = 2 rank"}
IN_EVIDENCE = {
    EXACT: "SparseGrad, `exact`",
    FAST: "`fast`",
    "LoRA as in the paper": "LoRA, as in the paper",
    "LoRA as in the authors' code": "LoRA, as in the authors' code",
    "SparseGrad as in the authors' code": "SparseGrad, as in the authors' code",
}
WORDS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


def of(method: str, column: str, name: str = "evidence_paper_exact") -> list[float]:
    """The figures of a cell: a value with the ends of its interval, or a score with its spread."""
    return [float(one) for one in re.findall(r"[+-]?\d+\.\d+", cell(name, method, column))] or missing(
        name, method, column
    )


def others(column: str, methods: Sequence[str] | None = None) -> list[float]:
    """The value of a column for all methods but exact, or for some of them."""
    chosen = [one for one in table("evidence_paper_exact").index if one != EXACT] if methods is None else methods
    return [of(one, column)[0] for one in chosen]


def order(task: str, rows: str) -> dict[str, float]:
    """Method -> mean score, the best first."""
    parts = [one.rpartition(" ") for one in cell("evidence_paper_orders", task, rows).split("; ")]
    return {name: float(score) for name, _, score in parts}


def test_readme_has_the_differences_of_the_table() -> None:
    """`fast`, an engine and not the paper's method, is in a sentence of its own."""
    names = [one for one in table("evidence_paper_exact").index if one not in (EXACT, FAST)]
    expected = [
        f"| {IN_README.get(one, one)} | {of(one, MINUS)[0]:+.2f} | {table('evidence_paper_exact').loc[one, '95 %']} "
        f"| {of(one, ALONE)[0]:+.2f} |"
        for one in names
    ]
    found = rows_below(README, "| average of STS-B, MRPC, SST-2 and CoLA (MiniLM")
    assert sorted(found) == sorted(expected), "README.md, table of differences: write\n" + "\n".join(expected)


def test_the_first_results_are_those_of_the_tables() -> None:
    """Scores and differences of every method, the best average first."""
    scores, exact = table("evidence_paper"), table("evidence_paper_exact")
    expected = []
    for name in sorted(exact.index, key=lambda one: -of(one, "average")[0]):
        columns = [scores.loc[name, task].partition(" (")[0] for task in TASKS]
        columns.append(f"{of(name, 'average')[0]:.2f}")
        difference = [exact.loc[name, column] for column in (MINUS, "95 %", ALONE)]
        columns += ["", "", ""] if name == EXACT else difference
        expected.append(re.sub(r" +", " ", f"| {IN_EVIDENCE.get(name, name)} | {' | '.join(columns)} |"))
    found = rows_below(EVIDENCE, "| MiniLM, everything trains; points")
    assert found == expected, "docs/evidence.md, First results: write\n" + "\n".join(expected)


def test_the_results_of_block_3_are_those_of_its_table() -> None:
    """Score and difference of every method, the best first."""
    exact = table("evidence_mlp_only_exact")
    names = IN_EVIDENCE | {"SparseGrad, small side": "SparseGrad, `sides=small`", "random mask": "random mask, a floor"}
    expected = []
    for name in sorted(exact.index, key=lambda one: -of(one, "average", "evidence_mlp_only_exact")[0]):
        difference = ["", ""] if name == EXACT else [exact.loc[name, column] for column in (MINUS, "95 %")]
        columns = [names.get(name, name), exact.loc[name, "average"].partition(" (")[0], *difference]
        expected.append(re.sub(r" +", " ", f"| {' | '.join(columns)} |"))
    found = rows_below(EVIDENCE, "| MiniLM, MLP weights and head train; STS-B, points")
    assert found == expected, "docs/evidence.md, block 3: write\n" + "\n".join(expected)
    joint = {one: of(one, "95 % jointly", "evidence_mlp_only_exact") for one in exact.index if one != EXACT}
    excluding = {one for one, (low, high) in joint.items() if not low < 0 < high}
    assert (excluding, len(joint)) == ({MEPROP, SMALL}, 6), "the text says which widened intervals exclude zero"
    significant = {one for one in joint if float(exact.loc[one, "p (Holm)"]) < 0.05}
    assert significant == {MEPROP, SMALL, "random mask"}, "the text says which are significant by Holm's p"


def test_choosing_has_the_lead_of_one_side() -> None:
    (value, *_), (low, high) = (of(SMALL, column, "evidence_mlp_only_exact") for column in (MINUS, "95 %"))
    said = f"it scored {-value:.2f} points above both sides (95 % interval {-high:+.2f} to {-low:+.2f}; "
    assert said in passage(CHOOSING, "| both sides or `sides=small`? |"), f"write {said!r}"


def published(average: Callable[[int, str], float]) -> list[float]:
    """The smallest and the largest lead of SparseGrad over LoRA in the paper's tables."""
    leads = [round(average(number, "SparseGrad") - average(number, "LoRA"), 4) for number in GLUE_MODELS]
    return [min(leads), max(leads)]


def printed_average(number: int, row: str) -> float:
    return float(cells(number)[row, "AVG"][0])


def spread_between_seeds(task: str) -> float:
    """The largest difference between two seeds of one method."""
    scores = defaultdict(list)
    for path in (ROOT / "results" / "runs" / "evidence_paper").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["config"]["task"]["name"] == task:
            scores[record["config"]["method"]["name"]].append(100 * record["result"]["value"])
    return max(max(one) - min(one) for one in scores.values())


def half_widths(methods: Sequence[str]) -> list[float]:
    ends = [of(one, "95 %") for one in methods]
    return [(high - low) / 2 for low, high in ends]


def fast_and_lora() -> list[float]:
    """`fast` minus LoRA with alpha = 2 rank, and the ends of the interval."""
    column = "minus LoRA, alpha = 2 rank"
    return [*of(FAST, column, "evidence_paper"), *of(FAST, "95 %", "evidence_paper")]


def ends(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def joint_ends() -> list[float]:
    return [*of(LORAS[2], "95 % jointly"), *of("SparseGrad as in the authors' code", "95 % jointly")]


def lora_by_task() -> list[float]:
    noisy = [*others("on mrpc", LORAS), *others("on cola", LORAS)]
    low, high = ends([*others("on stsb", LORAS), *others("on sst2", LORAS)])
    single = [end for task in ("mrpc", "cola", "stsb") for end in of(LORAS[0], f"on {task}")[1:]]
    return [*ends(noisy), high, -low, spread_between_seeds("cola"), *single]


def correlations() -> list[float]:
    return [float(cell("evidence_paper_orders", task, "Spearman")) for task in ("stsb", "sst2", "cola", "mrpc")]


def paper_and_detectable() -> list[float]:
    alone, corrected = (ends(others(column, LORAS)) for column in ("detectable alone", "detectable"))
    return [*published(average_of_cells), *published(printed_average), *alone, *corrected]


def readme_leads() -> list[float]:
    return [*published(average_of_cells), *ends(others("detectable alone", LORAS))]


def widths_and_spreads() -> list[float]:
    rest = [one for one in table("evidence_paper_exact").index if one not in (EXACT, FAST)]
    return [
        *ends(half_widths(rest)), *half_widths([FAST]), of(FAST, "mrpc", "evidence_paper")[1],
        of(FAST, "cola", "evidence_paper")[1],
    ]  # fmt: skip


def fast_in_choosing() -> list[float]:
    value, (low, high) = of(FAST, MINUS)[0], of(FAST, "95 %")
    lora, *interval = fast_and_lora()
    return [value, -high, -low, -lora, *interval]


def over_exact() -> list[float]:
    """In block 3: by how much MeProp and the small side are above exact, and the widened intervals."""
    leads = [-of(one, MINUS, "evidence_mlp_only_exact")[0] for one in (MEPROP, SMALL)]
    return leads + [end for one in (MEPROP, SMALL) for end in of(one, "95 % jointly", "evidence_mlp_only_exact")]


def over_lora(method: str, interval: str) -> list[float]:
    """In block 3: by how much a method is above LoRA, and the interval."""
    lead = of(method, "minus LoRA, alpha = 2 rank", "evidence_mlp_only")
    return [*lead, *of(method, interval, "evidence_mlp_only")]


# Page, beginning of the passage, and its figures with a decimal point from left to right.
PASSAGES: list[tuple[str, str, Callable[[], list[float]]]] = [
    (README, "- **Try the engine `fast`**", lambda: [-fast_and_lora()[0], *fast_and_lora()[1:]]),
    (README, "Each interval holds for its comparison alone; widened", readme_leads),
    (EVIDENCE, "- **No difference is certain.**", joint_ends),
    (EVIDENCE, "- **MRPC and CoLA put `exact` above LoRA.**", lora_by_task),
    (EVIDENCE, "- **Except on MRPC, the order of the methods is mostly chance.**", correlations),
    (EVIDENCE, "- **Whether `fast` loses to LoRA differs by task.**", fast_and_lora),
    (EVIDENCE, "- **These runs would probably miss a difference as large as the paper's.**", paper_and_detectable),
    (EVIDENCE, "With three seeds, the differences of `exact` from the other methods", widths_and_spreads),
    (EVIDENCE, "- **MeProp and `sides=small` score higher than `exact`**", over_exact),
    (
        EVIDENCE,
        "- **They also score higher than LoRA**",
        lambda: [*over_lora(MEPROP, "95 % jointly"), *over_lora(SMALL, "95 % jointly")],
    ),
    (EVIDENCE, "- **Between a mask drawn at random and LoRA", lambda: over_lora("random mask", "95 %")),
    (README, "Where only the MLP weights and the head train", over_exact),
    (CHOOSING, "| `exact` or `fast`? |", fast_in_choosing),
]


def correct(quoted: str, measured: float) -> str:
    """A figure as it must be quoted: itself if it is right, else with as many digits."""
    digits = len(quoted.partition(".")[2])
    # The tables have two digits: a figure with fewer may be rounded from the exact value.
    slack = 0.5 * 10**-digits + (0.0051 if digits < 2 else -0.0001)
    sign = "+" if quoted.startswith(("+", "-")) else ""
    return quoted if abs(float(quoted) - measured) <= slack else f"{measured:{sign}.{digits}f}"


@pytest.mark.parametrize(("page", "start", "measure"), PASSAGES, ids=[start for _, start, _ in PASSAGES])
def test_a_passage_has_the_figures_of_the_tables(page: str, start: str, measure: Callable[[], list[float]]) -> None:
    found, measured = re.findall(r"[+-]?\d+\.\d+", passage(page, start)), measure()
    quoted = found if len(found) == len(measured) else ["+0.00"] * len(measured)
    right = [correct(one, value) for one, value in zip(quoted, measured, strict=True)]
    assert found == right, f"{page}, {start!r}: instead of {', '.join(found)} write {', '.join(right)}"


def test_evidence_tells_why_the_plan_of_block_3_was_changed() -> None:
    """The runs of the first plan that still improved, and the scores of the check with another rate of the head."""
    said = " ".join(passage(EVIDENCE, "**Why block 3's plan was changed.**").split())
    paths = (ROOT / "results" / "runs" / "evidence_mlp_only").glob("*.json")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first = [one for one in records if one["config"]["train"].get("rest_lr") is None and not _is_random(one)]
    improving = sum(_make_run(one).still_improving for one in first)
    assert f"{improving} of {len(first)} runs still improved" in said
    runs = json.loads((ROOT / "results" / "studies" / "head_rate.json").read_text(encoding="utf-8"))["runs"]
    names = {"lora_tuned": "LoRA", "sparsegrad": "`exact`"}
    rises = [
        f"{100 * one['score_with_one_rate']:.1f} to {100 * one['score']:.1f} ({names[one['method']]})" for one in runs
    ]
    assert [rise for rise in rises if rise not in said] == []


def _is_random(record: dict[str, Any]) -> bool:
    """Whether it is the random mask's, whose head has the method's rate in the present plan, too."""
    return bool(record["config"]["method"]["name"] == "random_mask")


def _make_run(record: dict[str, Any]) -> EvidenceRun:
    return EvidenceRun(Path(), record, "", record["config"]["task"]["name"], record["config"]["seed"], 0.0, {})


def test_the_pages_name_the_number_of_seeds_and_comparisons() -> None:
    averages = table("evidence_paper_exact")["average"]
    seeds = {one.partition("(")[2].partition(")")[0] for one in averages}
    # While seeds are being added task by task, the pages name the smallest and the largest number.
    numbers = sorted({int(number) for one in seeds for number in re.findall(r"\d+", one.partition(",")[0])})
    count, compared = (
        " to ".join(WORDS[one] for one in dict.fromkeys((numbers[0], numbers[-1]))),
        WORDS[len(averages) - 1],
    )
    for page, start, said in (
        (README, "| average of STS-B, MRPC, SST-2 and CoLA (MiniLM", f", {count} seeds, "),
        (CHOOSING, "| `exact` or `fast`? |", f"equal tuning and {count} seeds"),
        (EVIDENCE, "Runs are made in [blocks]", f"standard deviations over {count} seeds"),
        (EVIDENCE, "- **No difference is certain.**", f"all {compared} hold together"),
        (EVIDENCE, "- **Except on MRPC, the order", f"the {WORDS[len(averages)]} arms"),
        (EVIDENCE, "- **These runs would probably miss", f"corrected for {compared} comparisons"),
    ):
        assert said in " ".join(passage(page, start).split()), f"{page}, {start!r}: write {said!r}"


def rank(method: str, task: str) -> int:
    """1 for the best on validation rows."""
    return 1 + list(order(task, "validation rows")).index(method)


def lead_over_meprop(rows: str) -> list[str]:
    """The tasks on which exact has the higher mean score."""
    scores = {task: order(task, rows) for task in TASKS}
    return [task for task, found in scores.items() if found[EXACT] > found[MEPROP]]


STATEMENTS: dict[str, Callable[[], bool]] = {
    "every one contains zero": lambda: all(
        low < 0 < high for one in table("evidence_paper_exact").index if one != EXACT
        for low, high in [of(one, "95 % jointly")]
    ),
    "averaged over STS-B and SST-2, `exact` is slightly below LoRA": lambda: all(
        -0.5 < value < 0 for value in others(ALONE, LORAS)
    ),
    "scored higher than `exact` on the validation rows of each task": lambda: not lead_over_meprop("validation rows"),
    "`exact` is higher on two of the four tasks": lambda: len(lead_over_meprop("held-out rows")) == 2,
    "the lowest mean on CoLA, the second lowest on MRPC and STS-B, and the highest on SST-2": lambda: [
        rank(FAST, task) for task in ("cola", "mrpc", "stsb", "sst2")
    ] == [8, 7, 7, 1],
}  # fmt: skip


@pytest.mark.parametrize("said", STATEMENTS)
def test_a_statement_about_the_tables_is_true(said: str) -> None:
    pages = [page for page in (README, EVIDENCE) if said in " ".join(read(page).split())]
    assert pages, f"no page says {said!r} any more: change or drop it in this test"
    assert STATEMENTS[said](), f"{', '.join(pages)}: {said!r} is no longer true; see results/tables/evidence_paper_*"
