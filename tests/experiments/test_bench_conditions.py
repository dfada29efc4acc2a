"""Results of a benchmark that were measured otherwise: refused, dropped, or marked where ratios mix them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_benchmark import CPU, SCHEDULE, SETTING, Fake, fake, run
from test_experiments_page import measurement
from test_experiments_report import context

from experiments.bench import machine, results
from experiments.bench.presets import paper_setting
from experiments.bench.render import ratio, write_table
from experiments.report import findings
from experiments.report.bench_ratios import machine_ratios
from experiments.report.render import latex
from experiments.report.tables import speed
from sparsegrad.errors import UserError
from sparsegrad.files import write_json

ARMS = ("full", "exact", "fast")


def stamp_by(commits: dict[str, str]) -> type[Fake]:
    """A benchmark whose cells are of these commits, by arm."""

    class Stamped(Fake):
        def _process(self, job: str, **arguments: Any) -> dict[str, Any]:
            self.__dict__["arm"] = arguments.get("arm")
            return super()._process(job, **arguments)

        def _stamp(self) -> dict[str, Any]:
            return {**super()._stamp(), "commit": commits.get(str(self.__dict__.get("arm")), "a" * 40)}

    return Stamped


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 2}, r"threads=2 is not allowed: .*x.json was measured with threads=1; .*--out, or --threads 1"),
        ({"bases": "reflections"}, r"bases=reflections .*x.json of mlp_tiny.* with bases=calibrated; .*--bases calib"),
    ],
)
def test_other_conditions_are_refused_before_anything_is_measured(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run(fake(tmp_path))
    content = (tmp_path / "x.json").read_bytes()
    other = fake(tmp_path)
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(UserError, match=said):
        run(other)
    assert other.measured == []
    assert (tmp_path / "x.json").read_bytes() == content


def test_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fake(tmp_path))
    own = machine.facts(CPU)
    monkeypatch.setattr(machine, "facts", lambda _: {**own, "cpu": "Another CPU"})
    with pytest.raises(UserError, match=r"was measured on .*, not on Another CPU: choose another --out"):
        run(fake(tmp_path))


def test_other_bases_are_refused_only_for_the_settings_that_have_some(tmp_path: Path) -> None:
    bench = fake(tmp_path, bases="reflections")
    bench.document = results.empty()
    bench._check_conditions({**results.empty(), "settings": {"another": {"bases": "calibrated"}}}, [SETTING.key])
    with pytest.raises(UserError, match="bases"):
        bench._check_conditions({**results.empty(), "settings": {SETTING.key: {"bases": "calibrated"}}}, [SETTING.key])


def test_force_measures_with_the_new_steps_and_leaves_no_earlier_cell(tmp_path: Path) -> None:
    run(fake(tmp_path), ARMS)
    forced = fake(tmp_path, force=True)
    forced.schedule = replace(SCHEDULE, steps=50, warmup=20, repeats=1)
    document = run(forced, ARMS)
    assert forced.asked[0][1]["steps"] == 50
    assert [(cell["arm"], cell["repeat"]) for cell in document["cells"]] == [(arm, 0) for arm in ARMS]


def test_force_for_some_arms_keeps_the_others_and_their_steps(tmp_path: Path) -> None:
    run(fake(tmp_path), ARMS)
    forced = fake(tmp_path, force=True)
    forced.schedule = replace(SCHEDULE, steps=50, warmup=20)
    document = run(forced, ("fast",))
    assert [arguments["steps"] for job, arguments in forced.asked if job == "measure"] == [3, 3]
    assert len(document["cells"]) == 6


def test_force_names_the_settings_that_the_time_does_not_reach(tmp_path: Path) -> None:
    run(fake(tmp_path), ARMS)
    forced, lines = fake(tmp_path, force=True), list[str]()
    forced.schedule, forced.tell = replace(SCHEDULE, minutes=1e-9), lines.append
    document = run(forced, ARMS)
    assert forced.measured == []
    assert len(document["cells"]) == 6
    assert lines[-1].startswith("6 measurements left after 1e-09 minutes: the same command without --force continues")
    assert lines[-1].endswith(f"only --force with more --minutes measures again: {SETTING.key}")


def test_force_counts_what_is_left_of_a_setting_that_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fake(tmp_path), ARMS)
    forced, lines = fake(tmp_path, force=True), list[str]()
    forced.schedule, forced.tell = replace(SCHEDULE, minutes=1), lines.append
    monkeypatch.setattr(forced, "_is_over_time", lambda: len(forced.measured) > 1)
    assert len(run(forced, ARMS)["cells"]) == 2
    assert lines[-1] == "4 measurements left after 1 minutes: the same command without --force continues with them"


def test_ratios_of_two_commits_are_marked(tmp_path: Path) -> None:
    bench = stamp_by({"fast": "b" * 40})(
        out=tmp_path / "x.json", work=tmp_path / "w", device=CPU, threads=1, schedule=SCHEDULE
    )
    bench.tell = lambda line: None
    document = run(bench, ARMS)
    summary = document["summary"][SETTING.key]
    assert summary["fast"]["speed"]["full"]["mixed"] == 2
    assert "mixed" not in summary["exact"]["speed"]["full"]
    text = (tmp_path / "x.md").read_text()
    assert f"\n{results.ABOUT_MIXED}\n" in text
    marked = {line.split("`")[1]: line.count(results.MIXED) for line in text.splitlines() if line.startswith("| `")}
    assert marked == {"full": 0, "exact": 0, "fast": 2}


def test_results_of_one_commit_are_not_marked(tmp_path: Path) -> None:
    document = run(fake(tmp_path))
    write_table(document, tmp_path / "y.md")
    assert "†" not in (tmp_path / "y.md").read_text()


def test_tables_and_claims_mark_ratios_of_two_commits(tmp_path: Path) -> None:
    cells = [
        {**measurement("s", arm, 2.0), "repeat": repeat, "commit": commit * 40}
        for repeat in range(3)
        for arm, commit in (("full", "a"), ("layer_regular", "b"), ("exact", "b"))
    ]
    content = {"schema": 1, "settings": {"s": paper_setting().as_json()}, "cells": cells, "hardware": {"device": "cpu"}}
    write_json(tmp_path / "bench" / "box.json", content)
    table = speed.tables(context(tmp_path))[-1]
    assert dict(zip(table.frame["arm"], table.frame["of full"], strict=True)) == {
        "full": "1.00", "layer_regular": "1.00 †", "exact": "1.00 †",
    }  # fmt: skip
    assert results.ABOUT_MIXED in table.notes
    assert latex(table).count("1.00 $\\dagger$") == 4
    (found,) = machine_ratios(tmp_path, "exact", "full", "steps_per_second")
    assert found == "box, a CPU, 3 repeats, the two methods by different commits"
    (found,) = machine_ratios(tmp_path, "exact", "layer_regular", "steps_per_second")
    assert found == "box, a CPU, 3 repeats"
    said = next(answer for question, answer, _ in findings._speed(context(tmp_path)) if "box" in question)
    other = "exact: 1.00 times the steps/s of full (by different commits)"
    assert said == f"exact: 1.00 times the steps/s of layer_regular; {other}"


def test_a_ratio_tells_in_how_many_repeats_it_is_of_two_commits(tmp_path: Path) -> None:
    cells = [
        {**measurement("s", arm, 2.0), "repeat": repeat, "commit": ("b" if (arm, repeat) == ("exact", 2) else "a") * 40}
        for repeat in range(3)
        for arm in ("full", "exact")
    ]
    content = {"schema": 1, "settings": {"s": paper_setting().as_json()}, "cells": cells, "hardware": {"device": "cpu"}}
    write_json(tmp_path / "bench" / "box.json", content)
    assert list(speed.tables(context(tmp_path))[-1].frame["of full"]) == ["1.00", "1.00 † (1 of 3 repeats)"]
    assert ratio(results.summarise(content)["s"]["exact"]["speed"]["full"]) == "1.00 [1.00, 1.00] † (1 of 3 repeats)"
    (found,) = machine_ratios(tmp_path, "exact", "full", "steps_per_second")
    assert found == "box, a CPU, 3 repeats, the two methods by different commits in 1 of them"
