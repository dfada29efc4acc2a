"""README's ledger has each claim beside its computed verdict, and its counts of searches and runs are right."""

from __future__ import annotations

import json
import re

import pytest
from quoted_pages import README, TASKS, read, rows_below, table

from experiments.paths import ROOT
from experiments.report.plans import read_plan

# Claim -> the words of README's ledger for it; the others are named there only once they are decided.
CLAIMS = {
    "1": "SparseGrad beats LoRA",
    "2": "MeProp",
    "3": "full fine-tuning (so far",
    "4a": "1 % of the entries suffices",
    "5": "the paper's rotation (HOSVD)",
    "6": "gradients of layer outputs have rows of zeros",
    "7": "sparse products",
    "8": "saves 20 % of the memory of full fine-tuning",
    "9": "is faster than it",
    "10": "the stack of calibration gradients",
    "11": "LLaMA-2 and I-Bench",
    "12": "LLaMA-2 and I-Bench",
}
OPEN = "not decided"
VERDICTS = ("supported", "reproduced", "contradicted", "not reproduced", "undecided", "not tested here")
ROWS = dict(zip(VERDICTS, ("hold", "hold", "do not hold", "not reproduced on a CPU", OPEN, OPEN), strict=True))


def row_of(verdict: str) -> str:
    """The row of README's ledger that a verdict belongs to."""
    return OPEN if "; in others " in verdict else ROWS[next(one for one in VERDICTS if verdict.startswith(one))]


@pytest.mark.parametrize("claim", table("claims").index)
def test_readme_has_each_claim_beside_its_verdict(claim: str) -> None:
    """The ledger is written by hand from `python -m experiments.report claims --lines 3`."""
    verdict = table("claims").loc[claim, "verdict"]
    rows = {line.split("**")[1]: line for line in rows_below(README, "| verdict | claims of the paper |")}
    wanted, words = row_of(verdict), CLAIMS.get(claim)
    assert words or wanted == OPEN, f"README.md, ledger: claim {claim} is {verdict}; name it, and its words in CLAIMS"
    if words:
        found = [name for name, line in rows.items() if words in line]
        said = f"README.md, ledger: {words!r} belongs to the row {wanted!r} alone, as the verdict is {verdict!r}"
        assert found == [wanted], f"{said}; if README names claim {claim} in other words, change them in CLAIMS"


def test_the_figures_of_readmes_ledger_are_measured() -> None:
    measured = table("claims")["measured here"]
    zeros = re.findall(r"(\d+ %) of dL/dY is zero", measured["6"])
    stacks = [
        float(one.replace(",", "")) / 1000
        for one in re.findall(r"stack of section 3.1 takes ([\d,]+) MB", measured["10"])
    ]
    for said in (f"rows of zeros: {zeros[0]} of the entries", f"it takes {stacks[0]:.1f} and {stacks[1]:.1f} GB"):
        assert said in read(README), f"README.md, ledger: write {said!r}"


def test_readme_names_the_tasks_of_the_comparisons() -> None:
    names = re.search(r" on ([A-Z][\w-]*(?:, [A-Z][\w-]*)*)", table("claims").loc["1", "verdict"])
    assert names, "claim 1 was decided on no task: say so in README's ledger and here"
    first, _, last = names[1].rpartition(", ")
    said = f"(so far compared on {' and '.join(filter(None, (first, last)))})"
    assert said in read(README), f"README.md, ledger: write {said!r}"


def test_readme_counts_the_searches_and_runs_that_are_committed() -> None:
    made, sweeps = set(), ("evidence", "evidence_mlp_only")
    for path in (ROOT / "results" / "studies").glob("*/summary.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if (labels := summary.get("labels", {})).get("sweep") in sweeps and labels["model"] == "minilm":
            made.add((labels["method"], labels["task"], summary["train_rest"]))
    planned = []
    for folder, trains_rest in (("evidence_paper", True), ("evidence_mlp_only", False)):
        grid = read_plan(folder).grid
        planned.append({(method, task, trains_rest) for method in grid["method"] for task in grid["task"]})
    runs = sum(int(number) for task in TASKS for number in table("evidence_paper")[task].str.extract(r"\((\d+)\)$")[0])
    said = (
        f"Of the {len(planned[0] | planned[1])} searches ({len(planned[0])} for Table 5, {len(planned[1])} for "
        f"[block 3](docs/evidence.md#blocks)), {len(made & (planned[0] | planned[1]))} are committed, and of the "
        f"{read_plan('evidence_paper').planned} runs of Table 5, {runs}."
    )
    assert said in " ".join(read(README).split()), f"README.md, Reproduce the paper: write {said!r}"
