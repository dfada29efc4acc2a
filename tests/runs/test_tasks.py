"""Tasks: every source gives the same rows, every mistake in the data is named, subsets and splits are fixed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from sparsegrad.assets import hub
from sparsegrad.errors import UserError
from sparsegrad.tasks import DataConfig, Glue, Snippets, Splits, Task, glue, split_heldout
from sparsegrad.tasks.glue_files import OFFICIAL

CONF = Path(__file__).parents[2] / "conf" / "task"
REAL_GLUE = Path(os.environ.get("SPARSEGRAD_GLUE") or Path(__file__).parents[3] / "shared" / "glue")
LANGUAGE = ["alpaca", "oasst1"]  # tests/runs/test_instructions.py, tests/runs/test_oasst.py
ALL = sorted({path.stem for path in CONF.glob("*.yaml")} - set(LANGUAGE))
GLUE = sorted(OFFICIAL)


def make(name: str, **changes: Any) -> Task:
    """The task of conf/task/<name>.yaml, built the way a run builds it."""
    conf: dict[str, Any] = {**OmegaConf.load(CONF / f"{name}.yaml"), **changes}
    task: Task = get_class(conf.pop("_target_"))(**conf)
    return task


def sample(task: Task, count: int = 7) -> list[dict[str, Any]]:
    """Rows with what real files hold: quotes, other line ends, spaces at the ends, fractional scores."""
    texts = ['say "no', "caf\xe9 \u2028 bar ", " it's", "plain", "x\x0cy", "'", "\xa0z"]
    labels = [3.8, 0.0, 5.0, 1.25, 2.6, 4.4, 3.2] if task.is_regression else [i % task.num_labels for i in range(7)]
    row = [{column: texts[(i + shift) % 7] for shift, column in enumerate(task.columns)} for i in range(7)]
    return [row[i % 7] | {"label": labels[i % 7], "idx": i} for i in range(count)]


def write_jsonl(root: Path, task: Task, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Path:
    folder = root / task.name
    folder.mkdir(parents=True)
    part = "validation_matched" if task.name == "mnli" else "validation"
    for name, rows in (("train", train), (part, validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def tsv(task: Task, rows: list[dict[str, Any]]) -> str:
    official = OFFICIAL[task.name]
    columns = [*(official.texts[column] for column in task.columns), official.label]
    names = official.header or ("index", *columns)
    words = task.name in ("mnli", "qnli", "rte")
    text = "" if official.header else "\t".join(names) + "\n"
    for row in rows:
        label = task.labels[row["label"]] if words else str(row["label"])
        cells = dict(zip(columns, [*(row[column] for column in task.columns), label], strict=True))
        text += "\t".join(cells.get(name, "0") for name in names) + "\n"
    return text


def write_official(root: Path, task: Task, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Path:
    official = OFFICIAL[task.name]
    folder = root / official.folder
    folder.mkdir(parents=True)
    for name, rows in (("train.tsv", train), (official.dev, validation)):
        (folder / name).write_bytes(tsv(task, rows).encode())
    return root


def load_lines(tmp_path: Path, name: str, *lines: str) -> Splits:
    """Load a jsonl task whose training file has exactly these lines."""
    task = make(name)
    write_jsonl(tmp_path, task, [], sample(task))
    (tmp_path / name / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return task.load(DataConfig(dir=str(tmp_path)))


@pytest.mark.parametrize("name", ALL)
def test_every_yaml_makes_a_task(name: str) -> None:
    task = make(name)
    assert task.name == name
    assert isinstance(task.columns, tuple)
    assert task.num_labels == (1 if task.is_regression else len(task.labels))
    assert hash(task) == hash(make(name))


def test_all_classification_tasks_are_there() -> None:
    assert set(ALL) == {*OFFICIAL, "snippets", "snippets_rating"}


@pytest.mark.parametrize("name", GLUE)
def test_both_layouts_give_the_same_splits(name: str, tmp_path: Path) -> None:
    task = make(name)
    rows = sample(task), sample(task, 4)
    found = [
        task.load(DataConfig(dir=str(write(tmp_path / write.__name__, task, *rows))))
        for write in (write_jsonl, write_official)
    ]
    assert found[0].fingerprint == found[1].fingerprint
    for part in ("train", "validation"):
        jsonl, official = (getattr(splits, part) for splits in found)
        assert jsonl.to_dict() == official.to_dict()
        assert jsonl.features == official.features
        assert set(jsonl.column_names) == {*task.columns, "label"}
    assert [row[task.columns[0]] for row in found[0].train] == [row[task.columns[0]] for row in rows[0]]


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    task = make("mrpc")
    plain = task.load(DataConfig(dir=str(write_official(tmp_path / "a", task, sample(task), sample(task)))))
    root = write_official(tmp_path / "b", task, sample(task), sample(task))
    for path in (root / "MRPC").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert task.load(DataConfig(dir=str(root))).fingerprint == plain.fingerprint


def test_fingerprint_sees_text_label_and_order(tmp_path: Path) -> None:
    task = make("rte")
    rows = sample(task)
    other_text = [rows[0] | {"sentence1": "else"}, *rows[1:]]
    other_label = [rows[0] | {"label": 1 - rows[0]["label"]}, *rows[1:]]
    variants = [
        (rows, rows[:3]),
        (other_text, rows[:3]),
        (other_label, rows[:3]),
        (rows[::-1], rows[:3]),
        (rows[:3], rows),
    ]
    prints = [
        task.load(DataConfig(dir=str(write_jsonl(tmp_path / str(i), task, *variant)))).fingerprint
        for i, variant in enumerate(variants)
    ]
    assert len(set(prints)) == len(variants)
    assert all(len(value) == 16 for value in prints)


def test_mnli_also_takes_the_plain_file_name(tmp_path: Path) -> None:
    task = make("mnli")
    write_jsonl(tmp_path, task, sample(task), sample(task, 3))
    folder = tmp_path / "mnli"
    (folder / "validation_matched.jsonl").rename(folder / "validation.jsonl")
    assert len(task.load(DataConfig(dir=str(tmp_path))).validation) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence": "a", "label": 1', "not valid JSON"),
        ("[1, 2]", "holds a JSON list"),
        ('{"sentence": "a"}', "column label is missing"),
        ('{"sentence": "  ", "label": 1}', "column sentence is empty"),
        ('{"sentence": null, "label": 1}', "column sentence is None"),
        ('{"sentence": "a", "label": 2}', r"label 2 does not fit task=cola: give one of 0 \(unacceptable\)"),
        ('{"sentence": "a", "label": -1}', "label -1 does not fit"),
        ('{"sentence": "a", "label": true}', "label True does not fit"),
        ('{"sentence": "a", "label": "maybe"}', "label 'maybe' does not fit"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"cola.train\.jsonl line 2: .*{message}"):
        load_lines(tmp_path, "cola", '{"sentence": "a", "label": "acceptable"}', line)


@pytest.mark.parametrize("label", ["5.5", "-0.1", "NaN", '"high"', "null"])
def test_a_score_out_of_range_is_named(tmp_path: Path, label: str) -> None:
    with pytest.raises(UserError, match=r"line 1: label .* give a number from 0 to 5"):
        load_lines(tmp_path, "stsb", f'{{"sentence1": "a", "sentence2": "b", "label": {label}}}')


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cola.train\.jsonl has no rows: give at least one$"):
        load_lines(tmp_path, "cola", "")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    task = make("sst2")
    write_jsonl(tmp_path, task, sample(task), sample(task))
    (tmp_path / "sst2" / "train.jsonl").write_bytes(
        b'{"sentence": "a", "label": 0}\n{"sentence": "\xe9", "label": 0}\n'
    )
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        task.load(DataConfig(dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cola", "gj04\t1\t\tfine\ngj04\t1\t\tcut\there\n", "line 2: 5 tab separated fields: give 4"),
        ("sst2", "sentence\tlabel\nno label\n", "line 2: 1 tab separated fields: give 2"),
        ("rte", "index\tsentence1\tlabel\n", "line 1: column sentence2 is missing"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\t-\n", "line 2: label '-' does not fit"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t7\n", "line 2: label 7.0 does not fit"),
    ],
)
def test_a_malformed_official_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    task = make(name)
    root = write_official(tmp_path, task, sample(task), sample(task))
    (root / OFFICIAL[name].folder / "train.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        task.load(DataConfig(dir=str(root)))


def test_a_label_whose_name_is_a_number_is_read_by_its_name(tmp_path: Path) -> None:
    task = make("sst2", labels=["1", "0"])
    root = write_official(tmp_path, task, sample(task), sample(task))
    (root / "SST-2" / "train.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    assert task.load(DataConfig(dir=str(root))).train["label"][:] == [0, 1]


def test_official_files_are_read_by_the_names_of_the_columns(tmp_path: Path) -> None:
    task = make("mnli")
    root = write_official(tmp_path, task, sample(task), sample(task))
    turned = make("mnli", columns=["hypothesis", "premise"]).load(DataConfig(dir=str(root))).train
    assert turned["premise"][:] == task.load(DataConfig(dir=str(root))).train["premise"][:]
    (alone,) = {tuple(make("mnli", columns=["premise"]).load(DataConfig(dir=str(root))).train.column_names)}
    assert set(alone) == {"premise", "label"}
    with pytest.raises(
        UserError, match=r"task\.columns=\['text'\] is not allowed: .*; choose from premise, hypothesis"
    ):
        make("mnli", columns=["text"]).load(DataConfig(dir=str(root)))


def test_the_flaws_of_qqp_are_counted_not_hidden(tmp_path: Path) -> None:
    task = make("qqp")
    root = write_official(tmp_path, task, sample(task), sample(task))
    with (root / "QQP" / "train.tsv").open("a") as file:
        file.write("7\thow is\n8\tempty\t\t1\n9\tbroken\n")
    with pytest.warns(UserWarning, match=r"2 line\(s\) cut short and left out.*first is line 9") as caught:
        train = task.load(DataConfig(dir=str(root))).train
    assert len(caught) == 2
    assert any("1 line(s) with an empty question and kept" in str(warning.message) for warning in caught)
    assert train[-1] == {"question1": "empty", "question2": "", "label": 1}
    assert len(train) == 8


def test_a_missing_folder_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tried .*cola.train\.jsonl .* and .*CoLA.train\.tsv"):
        make("cola").load(DataConfig(dir=str(tmp_path / "nowhere")))


def test_without_a_network_the_error_comes_at_once_and_names_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", no_network)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"nyu-mll/glue .*no route.*HF_HOME.*data\.dir=.*cola/train\.jsonl.*CoLA/train\.tsv.*task=snippets",
    ):
        make("cola").load(DataConfig())
    assert time.monotonic() - start < 5


def test_labels_of_the_hub_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make("cola")
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, -1]})
    monkeypatch.setattr(glue, "_read_hub", lambda task: Splits(rows, rows))
    with pytest.raises(UserError, match=r"train split has the label -1; allowed is one of 0 \(unacceptable\), 1"):
        task.load(DataConfig())


@pytest.mark.parametrize(
    "wrong",
    [{"pad": "left"}, {"max_length": 3}, {"max_train": 0}, {"max_eval": 1.5}, {"dir": " "}, {"max_length": True}],
)
def test_data_config_names_the_wrong_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"data\.{next(iter(wrong))}="):
        DataConfig(**wrong)


def test_task_refuses_what_does_not_fit() -> None:
    good = {"name": "cola", "columns": ["a"], "labels": ["x", "y"], "main_metric": "accuracy", "eval_base": 1}
    for wrong in ({"columns": []}, {"labels": ["x"]}, {"eval_base": 0}, {"label_range": [0, 1]}, {"name": "imdb"}):
        with pytest.raises(UserError, match=r"task\."):
            Glue(**(good | wrong))
    with pytest.raises(UserError, match="one text column"):
        Snippets(**(good | {"labels": ["a", "b", "c"]}))


def test_subsets_are_fixed_and_nested(tmp_path: Path) -> None:
    task = make("sst2")
    rows = [{"sentence": f"text {i}", "label": i % 2} for i in range(50)]
    root = str(write_jsonl(tmp_path, task, rows, rows))
    few, more, everything = (
        task.load(DataConfig(dir=root, max_train=n, max_eval=n)).train["sentence"][:] for n in (5, 20, 1000)
    )
    assert few == more[:5]
    assert few != everything[:5]
    assert everything == [row["sentence"] for row in rows]
    assert few == ["text 33", "text 22", "text 23", "text 31", "text 7"]  # frozen: a change would change every record


def test_heldout_is_a_fixed_tenth_and_nothing_is_lost() -> None:
    train = datasets.Dataset.from_dict({"sentence": [str(i) for i in range(100)], "label": [0] * 100})
    kept, heldout = split_heldout(train)
    again = split_heldout(train)[1]
    assert len(heldout) == 10
    assert heldout["sentence"][:] == again["sentence"][:]
    assert sorted([*kept["sentence"], *heldout["sentence"]], key=int) == train["sentence"][:]
    with pytest.raises(UserError, match="4 training rows cannot give"):
        split_heldout(train.select(range(4)))


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [("cola", 8551, 1043), ("rte", 2490, 277), ("mrpc", 3667, 408), ("stsb", 5749, 1500), ("sst2", 67349, 872)],
)
def test_real_glue(name: str, train: int, validation: int) -> None:
    if not (REAL_GLUE / name / "train.jsonl").is_file():
        pytest.skip(f"no real GLUE files in {REAL_GLUE}; set SPARSEGRAD_GLUE to a folder with {name}/train.jsonl")
    splits = make(name).load(DataConfig(dir=str(REAL_GLUE)))
    assert (len(splits.train), len(splits.validation)) == (train, validation)
