"""No run ends complete with garbage: what was loaded is what was asked for, and a name stands for its content.

All on a tiny BERT whose files `save_pretrained` wrote, with the tokenizer of the tests made before the layout changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_python import quick_python
from run_fixtures import ROOT, Composer, environment, last_wins
from safetensors.torch import load_file, save_file
from test_runs import Stop
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from sparsegrad.errors import UserError
from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.models.source import find_sources
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.runner import run

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LABELS = {0: "negative", 1: "positive"}
Made = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT classifier, labels in the order of sst2, and its tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with tarfile.open(Path(__file__).parent / "data" / "before-layout.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=39, max_position_embeddings=32, id2label=LABELS, **SIZES)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, folder / "model")
    return folder / "model"


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture
def made(conf: Composer, small: tuple[str, ...], source: Path) -> Made:
    """`made(*overrides)`: a short run from `source`."""
    kept = [one for one in small if not one.startswith(("model.", "+model."))]

    def configuration(*overrides: str) -> RunConfig:
        return build(conf(*last_wins(*kept, f"model.source={source}", "model.lora_rank=2", *overrides)))

    return configuration


def edit_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = source / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_config(source: Path, **fields: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_tokenizer_without_words_is_refused_and_no_record_is_left(made: Made, source: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = made()
    with pytest.raises(UserError, match=r"knows no words.*model\.tokenizer="):
        run(config)
    assert not config.record_path.exists()


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (lambda name: name.startswith("bert.encoder.layer.1."), r"16 tensors \(bert\.encoder\.layer\.1\."),
        (lambda name: "embeddings.LayerNorm" in name, r"2 tensors \(bert\.embeddings\.LayerNorm"),
    ],
)
def test_a_checkpoint_that_lacks_tensors_is_refused(made: Made, source: Path, lost: Any, named: str) -> None:
    edit_weights(source, lambda tensors: {name: one for name, one in tensors.items() if not lost(name)})
    with pytest.raises(UserError, match=rf"the checkpoint lacks {named}.*model\.head"):
        run(made())


def test_a_checkpoint_of_another_prefix_is_refused(made: Made, source: Path) -> None:
    edit_weights(source, lambda tensors: {f"student.{name}": one for name, one in tensors.items()})
    with pytest.raises(UserError, match="the checkpoint lacks"):
        run(made())


def test_a_checkpoint_of_other_shapes_is_refused(made: Made, source: Path) -> None:
    edit_config(source, intermediate_size=48)
    with pytest.raises(UserError, match=r"intermediate\.dense.* other shapes than its config\.json"):
        run(made())


def loaded(config: RunConfig) -> Any:
    torch.manual_seed(0)
    return load_model(config.model, config.task, load_tokenizer(config.model))


def test_a_head_of_the_source_is_drawn_anew(made: Made, source: Path) -> None:
    edit_config(source, problem_type="multi_label_classification")
    before, model = load_file(source / "model.safetensors"), loaded(made())
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    assert torch.count_nonzero(model.classifier.bias) == 0
    assert 0.01 < model.classifier.weight.std() < 0.04  # BERT draws its linears with 0.02
    assert model.config.problem_type is None
    assert model.config.id2label == LABELS
    encoder = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(model.get_parameter(encoder), before[encoder])


def test_a_head_of_another_size_is_drawn_anew(made: Made, source: Path) -> None:
    edit_weights(source, lambda t: {**t, "classifier.weight": torch.ones(5, 32), "classifier.bias": torch.ones(5)})
    edit_config(source, id2label={str(i): f"star {i}" for i in range(5)}, label2id={f"star {i}": i for i in range(5)})
    model = loaded(made())
    assert model.classifier.weight.shape == (2, 32)
    assert model.config.id2label == LABELS


def test_a_kept_head_has_its_rows_in_the_order_of_the_tasks_labels(made: Made, source: Path) -> None:
    edit_config(source, id2label={"0": "Positive", "1": "Negative"}, label2id={"Positive": 0, "Negative": 1})
    before, model = load_file(source / "model.safetensors"), loaded(made("model.keep_head=true"))
    assert torch.equal(model.classifier.weight, before["classifier.weight"].flip(0))
    assert model.config.id2label == LABELS
    assert made("model.keep_head=true").key != made().key


def test_a_kept_head_is_read_by_the_numbers_of_its_labels_not_their_order_in_the_file(made: Made, source: Path) -> None:
    edit_config(source, id2label={"1": "Negative", "0": "Positive"}, label2id={"Positive": 0, "Negative": 1})
    before, model = load_file(source / "model.safetensors"), loaded(made("model.keep_head=true"))
    assert torch.equal(model.classifier.weight, before["classifier.weight"].flip(0))


@pytest.mark.parametrize("name", ["chat_template.jinja", "bpe.codes", "qwen.tiktoken"])
def test_another_chat_template_or_vocabulary_is_another_source(made: Made, source: Path, name: str) -> None:
    keys = set()
    for content in ("A", "B"):
        (source / name).write_text(content)
        keys.add(find_sources(made().model).model.identity)
    assert len(keys) == 2


def test_a_head_of_other_labels_cannot_be_kept_and_the_remedy_works(made: Made, source: Path) -> None:
    edit_config(source, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    with pytest.raises(UserError, match=r"LABEL_0.*model\.keep_head=false"):
        run(made("model.keep_head=true"))
    record, _ = run(made("model.keep_head=false"))
    assert record["status"] == "complete"


def test_an_adapter_of_peft_is_refused_before_data_is_read_and_the_remedy_works(
    made: Made, source: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    model = BertForSequenceClassification.from_pretrained(source)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["intermediate.dense"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    config = made(f"model.source={tmp_path / 'adapter'}", "data.dir=nowhere")
    with pytest.raises(UserError, match="is a peft adapter") as refused:
        run(config)
    _, _, rest = str(refused.value).partition('python -c "')
    code, _, rest = rest.partition('"')
    subprocess.run([quick_python(), "-c", code], cwd=tmp_path, check=True, env=environment(PYTHONPATH=str(ROOT)))
    assert f"model.tokenizer={source}" in rest
    merged = made(f"model.source={tmp_path / 'merged'}", f"model.tokenizer={source}")
    assert run(merged)[0]["status"] == "complete"


def test_one_process_uses_one_device_however_many_it_sees(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = run(made())
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    again, _ = run(made("force=true"))
    assert alone["batch"] == {"per_process": 4, "accumulation": 1, "processes": 1, "global": 4}
    for record in (alone, again):
        assert record["result"]["steps"] == 4
        assert record["result"]["epochs"] == pytest.approx(4 * 4 / 24, abs=1e-3)


def test_a_folder_changed_in_place_is_another_model(made: Made, source: Path) -> None:
    first, _ = run(made())
    assert first["source"]["model"].startswith("files:")
    assert run(made())[1] is False
    edit_weights(source, lambda tensors: {name: one + 1 for name, one in tensors.items()})
    with pytest.raises(UserError, match=r"another model of the same name .*name=.*force=true"):
        run(made())
    again, is_new = run(made("force=true"))
    assert is_new
    assert again["source"]["model"] != first["source"]["model"]


def test_a_checkpoint_of_a_folder_that_changed_is_not_continued(made: Made, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(made(), callbacks=[Stop(3)])
    edit_weights(source, lambda tensors: {name: one * 1.01 for name, one in tensors.items()})
    with pytest.raises(UserError, match=r"another model or tokenizer .*restore that, .*resume=false"):
        run(made())
    watch = Stop()
    run(made("resume=false"), callbacks=[watch])
    assert watch.began == 0


def test_the_record_names_the_vocabulary_and_the_versions_that_read_it(made: Made) -> None:
    record, _ = run(made())
    assert record["source"]["vocabulary"]["size"] == 39
    assert {"huggingface_hub", "tokenizers", "transformers"} <= record["environment"]["versions"].keys()


def test_another_vocabulary_calibrates_anew(made: Made, source: Path) -> None:
    first, _ = run(made("method=sparsegrad"))
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace('"good"', '"gold"'))
    assert run(made("method=sparsegrad", "seed=42", "train.lr=2e-2"))[0]["calibration"]["reused"] is False
    assert first["calibration"]["reused"] is False


def test_an_asset_is_known_by_the_hashes_of_its_files(conf: Composer) -> None:
    sources = find_sources(build(conf()).model)
    assert sources.as_json()["model"] == sources.as_json()["tokenizer"]
    assert sources.tokenizer.identity.startswith("asset:")


def test_the_code_of_a_folder_is_part_of_its_content(made: Made, source: Path) -> None:
    """`model.trust_remote_code=true` runs it."""
    before = find_sources(made().model).as_json()
    (source / "modeling_own.py").write_text("SCALE = 2\n")
    assert find_sources(made().model).as_json() != before
