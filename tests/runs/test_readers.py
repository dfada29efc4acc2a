"""Readers of GLUE's files and of the hub: damaged data is refused in one error, and the remedy that it names works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from sparsegrad.errors import UserError
from sparsegrad.tasks import DataConfig, Task, glue
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
        row = dict.fromkeys(header, "0") | {column: f"text {number} of {column}" for column in files.texts.values()}
        lines.append("\t".join((row | {files.label: label})[column] for column in header))
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
    for column in OFFICIAL[name].texts.values():
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


def test_a_folder_without_the_task_says_what_it_holds_and_what_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "CoLA").mkdir()
    with pytest.raises(
        UserError, match=rf"CoLA is the folder of one task: give the one above it, data\.dir={tmp_path}$"
    ):
        make("cola").load(DataConfig(dir=str(tmp_path / "CoLA")))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "CoLA")
    with pytest.raises(UserError, match=rf"give the one above it, data\.dir={tmp_path}$"):
        make("cola").load(DataConfig(dir=str(tmp_path / "elsewhere" / "link")))
    with pytest.raises(UserError, match=r"nowhere is no folder .*task=snippets data\.dir=null, which needs no hub"):
        make("cola").load(DataConfig(dir=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"no complete cola, nor any other task of GLUE"):
        make("cola").load(DataConfig(dir=str(tmp_path)))
    for held in ("sst2/train.jsonl", "RTE/train.tsv"):
        (tmp_path / held).parent.mkdir()
        (tmp_path / held).write_text("")
    with pytest.raises(UserError, match=r"no complete cola, only sst2, rte: .*put the files there, .*task=snippets"):
        make("cola").load(DataConfig(dir=str(tmp_path)))
