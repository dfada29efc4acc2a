"""Tables and page from records on disk: their contents, records that are refused, and reproducible bytes."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from run_fixtures import ROOT
from test_sweep_dashboard import BROWSER

from experiments.report import command as report
from experiments.report import departures, figures, render
from experiments.report.blocks import BLOCKS
from experiments.report.collect import collect_cells, hours
from experiments.report.plans import read_plan
from experiments.report.tables import accuracy
from experiments.report.tables.base import MINI_MARK, Context
from sparsegrad.files import write_json

pytestmark = pytest.mark.xdist_group("experiments_report")  # its fixtures take long: one worker makes them

FOLDER, MODEL = "glue_bert_base", "bert_base"  # of Table 9
AUTHORS = {"from": "authors", "train.batch_size": 16, "train.lr": 1e-4}


@functools.cache
def planned_settings() -> dict[tuple[str, str], Any]:
    """What the experiments of the paper's tables have in common; `test_a_run_of_a_plan_follows_it` composes them."""
    plan = read_plan("table9")
    assert plan is not None
    expected = departures._expected(plan.path, plan.sha256, json.dumps({"task": {"name": "cola"}}))
    return {(group, name): setting for key, setting in expected.items() for group, _, name in [key.partition(".")]}


METRICS = {"cola": "matthews_correlation", "stsb": "pearson", "oasst1": "nll"}


def record(method: str, task: str, seed: int, value: float | None, **more: Any) -> dict[str, Any]:
    """The fields of a record that tables read; `value` None: a failed run."""
    config = {
        "model": {"name": more.pop("model", MODEL)},
        "method": {"name": method, "keep": more.pop("keep", None)},
        "task": {"name": task, "main_metric": METRICS.get(task, "accuracy")},
        "protocol": {"name": more.pop("protocol", "paper")},
        "seed": seed,
    }
    for (group, name), setting in planned_settings().items():
        config.setdefault(group, {}).setdefault(name, setting)  # type: ignore[attr-defined]
    times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:15:00+00:00"}
    status = {"status": "failed", "reason": "the loss is not a finite number"}
    if value is not None:
        status = {"status": "complete", "result": {"value": value}}  # type: ignore[dict-item]
    return {"schema": 1, "key": "0", "config": config, "environment": times, "hparams": AUTHORS, **status, **more}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with three seeds of two methods on one task of Table 9."""
    return fill(tmp_path)


def fill(results: Path) -> Path:
    """Write the records of `results`."""
    for method, values in (("full", (0.80, 0.82, 0.84)), ("lora", (0.70, 0.74, None))):
        for seed, value in zip((42, 3705, 2023), values, strict=True):
            write(results, f"{FOLDER}/{method}{seed}", record(method, "cola", seed, value))
    return results


def write(results: Path, name: str, content: Any) -> None:
    write_json(results / "runs" / f"{name}.json", content)


def context(results: Path) -> Context:
    return Context(results, collect_cells(results / "runs"), "mini")


def cell(table: Any, column: str, **where: str) -> str:
    rows = table.frame
    for name, value in where.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return str(rows.iloc[0][column])


def test_a_run_of_both_protocols_counts_under_either(results: Path) -> None:
    both = {"status": "complete", "result": {"value": 0.5, "best_on_validation": {"value": 0.6, "step": 9}}}
    write(results, f"{FOLDER}/both", record("meprop", "cola", 42, 0.5, protocol="both", **both))
    write(results, f"{FOLDER}/died", record("meprop", "stsb", 42, None, protocol="both"))
    of = context(results)
    grids = {name: accuracy.Grid(of, FOLDER, MODEL, name, ("cola", "stsb")) for name in ("heldout", "paper")}
    assert {name: grid.values("meprop", "cola") for name, grid in grids.items()} == {"heldout": [50.0], "paper": [60.0]}
    assert all("failed" in grid.line("meprop", "stsb")["ours"] for grid in grids.values())


def test_a_cell_holds_mean_spread_count_interval_protocol_and_cost(results: Path) -> None:
    table = accuracy.per_task(context(results), 9)
    of = {"method": "full", "task": "cola", "protocol": "paper"}
    assert cell(table, "ours", **of) == "82.00 ± 2.00"
    assert (cell(table, "n", **of), cell(table, "hours", **of)) == ("3", "0.75")
    resumed = record("full", "cola", 7, 0.82)
    resumed["environment"]["seconds"] = 1800.0  # with those before the last start
    assert hours(resumed) == 0.5
    assert hours({**resumed, "environment": {**resumed["environment"], "seconds": None}}) is None
    lora = {**of, "method": "lora"}
    assert cell(table, "ours", **lora) == "72.00 ± 2.83"
    assert cell(table, "n", **lora) == "2 of 3"
    low, high = (float(part) for part in cell(table, "vs full, 95 %", **lora).split(" to "))
    assert low < -10 < high
    assert [path.stem for path in table.records["full cola paper"]] == ["full2023", "full3705", "full42"]


def test_a_cell_without_seeds_is_missing_and_never_averaged(results: Path) -> None:
    table = accuracy.per_task(context(results), 9)
    assert cell(table, "ours", method="full", task="mrpc") == "missing"
    assert cell(table, "ours", method="full", task="average") == "missing"
    assert cell(table, "n", method="full", task="mrpc") == "0 of 3"


def test_a_failed_cell_shows_its_reason_and_a_pruned_trial_is_no_failure(results: Path) -> None:
    pruned = "pruned by the sweep after evaluation 2, step 24"
    write(results, f"{FOLDER}/a", record("meprop", "mrpc", 42, None))
    write(results, f"{FOLDER}/b", record("full", "mrpc", 42, None, reason=pruned))
    table = accuracy.per_task(context(results), 9)
    shown = cell(table, "ours", method="meprop", task="mrpc")
    assert shown == "failed: seed 42: the loss is not a finite number"
    assert cell(table, "ours", method="full", task="mrpc") == "missing"


def test_bad_records_are_named_skipped_and_counted(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(results, f"{FOLDER}/future", {**record("full", "cola", 42, 0.5), "schema": 99})
    (results / "runs" / FOLDER / "torn.json").write_text('{"schema": 1, "config')
    write(results, f"{FOLDER}/hollow", {"schema": 1, "status": "complete"})
    write(results, f"{FOLDER}/list", {"schema": 1, "status": "complete", "config": []})
    assert report.main(["table5", "--scale", "mini", "--results-dir", str(results)]) == 0
    said = capsys.readouterr().err
    assert "4 records skipped: 1 another schema, 3 damaged" in said
    assert f"{FOLDER}/future.json: record schema 99, this version reads 1" in said
    for name in ("torn", "hollow", "list"):
        assert f"{FOLDER}/{name}.json: not a readable record" in said


def test_records_that_disagree_are_named_and_not_used(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(results, f"{FOLDER}/other", record("full", "cola", 42, 0.99))
    assert cell(accuracy.per_task(context(results), 9), "n", method="full", task="cola") == "2 of 3"
    assert report.main(["table5", "--results-dir", str(results)]) == 0
    said = capsys.readouterr().err
    assert f"{FOLDER}/{MODEL}/full/cola/paper seed 42: records disagree" in said
    assert "full42.json 80.00" in said
    assert "other.json 99.00" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["table16"], "table=table16 is not allowed: choose one of table1"), (["table4", "--scale", "big"], "scale=big")],
)
def test_bad_names_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tables").write_text("a file where the folder should be")
    assert report.main(["table2", "--results-dir", str(tmp_path)]) == 2
    assert "error: cannot write" in capsys.readouterr().err


def test_figures_with_data_are_drawn(results: Path) -> None:
    drawn = figures.draw_all(context(results))
    assert {path.stem for path in drawn.values()} == {"ablation"}
    assert all(MINI_MARK in title for title in drawn)
    assert all(path.with_suffix(".pdf").is_file() for path in drawn.values())


def test_latex_and_markdown_are_whole(results: Path) -> None:
    table = accuracy.per_task(context(results), 9)
    text = render.latex(table)
    assert r"\toprule" in text
    assert r"82.00 $\pm$ 2.00" in text
    assert "sparsegrad\\_authors" in text
    assert text.count(r"\\") == len(table.frame) + 1
    assert "| full               | cola    |" in render.markdown(table)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the committed records, made again in another folder."""
    results = tmp_path_factory.mktemp("report") / "results"
    wanted = shutil.ignore_patterns("studies.db*", "tables", "report", "*.png", "*.pdf", "*.svg", ".*")
    shutil.copytree(ROOT / "results", results, ignore=wanted)
    assert report.main(["all", "--results-dir", str(results)]) == 0
    return results


def test_the_committed_tables_are_those_of_the_committed_records(committed: Path) -> None:
    built = {path.name: path.read_bytes() for path in (committed / "tables").iterdir()}
    assert built == {path.name: path.read_bytes() for path in (ROOT / "results" / "tables").iterdir()}


def test_the_committed_figures_and_page_are_those_of_the_committed_records(committed: Path) -> None:
    pinned = f"matplotlib=={matplotlib.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()
    if not pinned:
        pytest.skip(f"matplotlib {matplotlib.__version__} draws other bytes than the version of constraints.txt")
    for folder in ("figures", "report"):
        wanted = {path.name: path.read_bytes() for path in (ROOT / "results" / folder).iterdir()}
        found = {path.name: path.read_bytes() for path in (committed / folder).iterdir()}
        assert sorted(name for name in wanted if found.get(name) != wanted[name]) == [], (
            f"results/{folder}: make report"
        )


def test_the_page_has_every_table_and_live_links(committed: Path) -> None:
    page = (committed / "report" / "index.html").read_text()
    names = [f"table{number}" for number in range(1, 16)] + ["section8", "basis_study", "quality_energy"]
    names += ["claims", "findings", *BLOCKS]
    assert all(f'data-name="{name}"' in page for name in names)
    text = re.sub(r'base64,[^"]+', "", page)  # an image may contain these four letters
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://arxiv.org", "")
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r' id="([^"]+)"', text)), "a link to nowhere"
    links = [part.split('"')[0] for part in page.split('href="../')[1:]]
    assert links
    assert all((committed / link).is_file() for link in links)
    assert ('href="answers.html"' in page) == (committed / "report" / "answers.html").is_file()


HARNESS = """<!doctype html><title>waiting</title><iframe src="report/index.html" width="400" height="800"></iframe>
<script>addEventListener("load", () => { const page = document.querySelector("iframe").contentDocument;
const folded = page.querySelector("details.bare"), width = page.documentElement.scrollWidth;
if (folded) page.defaultView.location.hash = folded.id;
setTimeout(() => { document.title = JSON.stringify({opened: !folded || folded.open, width: width,
inner: page.defaultView.innerWidth,
dark: page.defaultView.matchMedia("(prefers-color-scheme: dark)").matches,
paper: getComputedStyle(page.body).backgroundColor, drawn: [...page.images].every(image => image.naturalWidth > 0),
keyboard: [...page.querySelectorAll(".scroll")].every(box => box.tabIndex === 0),
hinted: [...page.querySelectorAll(".scroll")].every(box => !box.clientWidth ||
(box.scrollWidth > box.clientWidth + 1) === box.classList.contains("wide")),
tables: [...page.querySelectorAll("table")].filter(table => table.rows.length > 1).length}) }, 200) })</script>"""


@pytest.fixture
def served(committed: Path) -> Iterator[str]:
    """The results folder over HTTP, with a page that looks at the report in a frame 400 pixels wide."""
    (committed / "harness.html").write_text(HARNESS)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(committed))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/harness.html"
    server.shutdown()
    server.server_close()
    (committed / "harness.html").unlink()


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_on_a_phone(served: str, committed: Path, tmp_path: Path, dark: bool) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [chromium, *BROWSER, *theme, "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
    shown = subprocess.run([*command, "--dump-dom", served], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(shown.stdout.split("<title>")[1].split("</title>")[0].replace("&quot;", '"'))
    assert found["width"] <= found["inner"] <= 400, "the page is wider than a phone"
    generated = [*(committed / "tables").glob("*.csv"), *(committed / "compare").glob("*.csv")]
    assert found["tables"] == len(generated) + 1  # and environment
    assert found["keyboard"], "a table that scrolls cannot be focused"
    assert found["hinted"], "a table is cut without a hint"
    assert found["drawn"], "a figure was not drawn"
    assert found["opened"], "a link to a folded table did not open it"
    assert found["dark"] is dark
    assert found["paper"] == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert "CONSOLE" not in shown.stderr, shown.stderr
