"""The hub from end to end, on loopback: what is loaded is what the repository has, also without the hub afterwards."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import datasets
import hub_models as made
import pytest
import torch
from hub_fixtures import Site, point_at
from hub_server import Hub, Rule
from hydra import compose, initialize_config_dir
from process_group import together
from run_fixtures import ROOT, SHORT, environment
from safetensors.torch import load_file
from test_tasks import make, sample, write_jsonl

from sparsegrad.errors import UserError
from sparsegrad.hashing import tensors_sha256
from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.models.source import find_sources
from sparsegrad.models.suitability import find_suitable_sources
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder
from sparsegrad.tasks.base import DataConfig

HF = Path(sys.executable).parent / "hf"
NAMES = {"bert_base": made.BERT, "roberta_base": made.ROBERTA, "llama2_7b": made.LLAMA}


def load(config: RunConfig) -> Any:
    return load_model(config.model, config.task, load_tokenizer(config.model))


def assert_same(model: Any, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Every parameter below `prefix` is the checkpoint's, which has the same names, in this model's type."""
    own = {name: one for name, one in model.named_parameters() if name.startswith(prefix)}
    assert len(own) > 10
    for name, parameter in own.items():
        assert torch.equal(parameter, tensors[name].to(parameter.dtype)), name


@pytest.mark.parametrize("model", ["bert_base", "roberta_base"])
def test_an_encoder_is_the_checkpoints(model: str, hub: Hub, hub_run: Any, site: Site) -> None:
    found = load(hub_run(f"model={model}"))
    assert_same(found, site.tensors[NAMES[model]], model.partition("_")[0] + ".")
    fetched = " ".join(request for request in hub.asked if request.startswith("GET"))
    assert ".bin" not in fetched  # the same weights once more, as a pickle
    assert ".h5" not in fetched


def test_shards_in_float16_are_the_checkpoints(
    hub: Hub, hub_run: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    config = hub_run("model=llama2_7b", "task=oasst1")
    found = load(config)
    assert_same(found, site.tensors[made.LLAMA], "model.")
    assert found.lm_head.weight.dtype == torch.float32
    assert found.config._name_or_path == made.LLAMA


def test_a_run_from_the_hub_names_its_commit_and_equals_one_from_folders(
    hub: Hub, hub_run: Any, site: Site, tmp_path: Path
) -> None:
    record, _ = run(hub_run())
    assert record["source"]["model"] == f"commit:{hub.repos['models/' + made.BERT].head}"
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, body in site.files[f"models/{made.BERT}"].items():
        if "/" not in name:
            (folder / name).write_bytes(body)
    rows = tmp_path / "glue"
    for part in ("train", "validation"):
        target = rows / "sst2" / f"{part}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(row) + "\n" for row in made.sst2_rows(part, 20)))
    local, _ = run(hub_run(f"model.source={folder}", f"data.dir={rows}"))
    assert local["data"]["fingerprint"] == record["data"]["fingerprint"]
    assert local["result"]["weights"] == record["result"]["weights"]


@pytest.mark.parametrize("name", ["rte", "stsb", "mnli"])
def test_glue_has_the_rows_of_a_folder(name: str, hub: Hub, tmp_path: Path) -> None:
    task = make(name)
    rows = sample(task), sample(task, 4)
    kind = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.labels))
    parts = ("train", "validation_matched" if name == "mnli" else "validation")
    hub.add(f"datasets/{made.GLUE}", {
        f"{name}/{part}-0000{shard}-of-00002.parquet": made.as_parquet(
            datasets.Dataset.from_list(row[shard * half : len(row) if shard else half]).cast_column("label", kind)
        )
        for part, row in zip(parts, rows, strict=True) for half in [len(row) // 2] for shard in (0, 1)
    })  # fmt: skip
    local = task.load(DataConfig(dir=str(write_jsonl(tmp_path, task, *rows))))
    assert task.load(DataConfig()).fingerprint == local.fingerprint


def test_oasst_has_the_conversations_of_a_folder(hub: Hub, hub_run: Any, tmp_path: Path) -> None:
    task = hub_run("model=llama2_7b", "task=oasst1").task
    for part, trees in (("train", 10), ("validation", 4)):
        rows = made.oasst_rows(part, trees)
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, local = task.load(DataConfig()), task.load(DataConfig(dir=str(tmp_path)))
    assert found.fingerprint == local.fingerprint
    assert len(found.train) == 10


def test_checkpoints_of_old_names_are_read_whole(hub: Hub, hub_run: Any, caplog: Any) -> None:
    """`transformers` translates gamma and beta, and back when it saves; the Trainer would then miss LayerNorms."""
    config = hub_run("save_model=true")
    with caplog.at_level(logging.WARNING):
        run(config)
    assert "missing keys" not in caplog.text
    saved = load_file(model_folder(config) / "model.safetensors")
    assert "bert.embeddings.LayerNorm.weight" in saved
    assert not any("gamma" in name for name in saved)


def test_a_branch_that_moved_is_another_model_and_a_commit_is_not(hub: Hub, hub_run: Any) -> None:
    first, _ = run(hub_run())
    repo = hub.repos[f"models/{made.BERT}"]
    commit = repo.head
    repo.push(made.make_bert(seed=1)[0])
    with pytest.raises(UserError, match=r"another model of the same name .*name=.*force=true"):
        run(hub_run())
    pinned, _ = run(hub_run(f"model.revision={commit}"))
    assert pinned["source"] == first["source"]
    assert pinned["result"]["weights"] == first["result"]["weights"]
    moved, _ = run(hub_run("force=true"))
    assert moved["result"]["weights"] != first["result"]["weights"]


def test_large_files_come_by_https_from_the_hub_and_not_from_xet(hub: Hub, hub_run: Any, site: Site) -> None:
    """Where Xet's servers are blocked, its client retries for minutes in silence."""
    hub.repos[f"models/{made.BERT}"].xet = True
    assert_same(load(hub_run()), site.tensors[made.BERT], "bert.")
    assert not any("xet" in request for request in hub.asked)


def fetch_in_process(url: str, home: str, overrides: tuple[str, ...]) -> tuple[str, str]:
    """Identity of the model and hash of its encoder, as one of several processes finds them."""
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        point_at(url, Path(home), patch)
        config = build(compose("config", list(overrides)))
        sources = find_sources(config.model)
        assert sources.model is not None
        tokenizer = load_tokenizer(config.model, sources.tokenizer)
        model: Any = load_model(config.model, config.task, tokenizer, source=sources.model)
    return sources.model.identity, tensors_sha256(model.bert.state_dict().items())


def test_of_several_processes_the_main_one_asks_and_downloads(hub: Hub, tmp_path: Path) -> None:
    overrides = ("model=bert_base", "task=sst2")
    first, second = together(2, fetch_in_process, hub.url, str(tmp_path / "shared"), overrides)
    assert first == second
    assert len([request for request in hub.asked if request.startswith("GET /api/models/")]) == 1
    assert len([request for request in hub.asked if request.startswith("GET /storage/")]) == 1
    assert len([request for request in hub.asked if "GET" in request and "tokenizer.json" in request]) == 1


def test_a_gated_model_is_refused_before_data_is_read_and_the_remedy_works(
    hub: Hub, hub_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub_run("model=llama2_7b", "task=oasst1", "data.dir=nowhere")
    with pytest.raises(UserError, match=rf"{made.LLAMA} is gated: ask for access .*`hf auth login`"):
        run(config)
    command = [str(HF), "auth", "login", "--token", "hf_good"]
    home = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    subprocess.run(command, env=home, check=True, capture_output=True, timeout=60)
    with pytest.raises(UserError, match="nowhere"):  # the model is there
        run(config)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [(["model=bert_base"], made.BERT), (["model=minilm"], made.GLUE), (["model=llama2_7b", "task=oasst1"], made.OASST)],
)
def test_the_download_that_an_error_names_is_enough_without_the_hub(
    overrides: list[str], name: str, hub: Hub, hub_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub_run(*overrides)

    def act() -> Any:
        if name == made.OASST:
            return config.task.load(DataConfig())
        return load(config) if name == made.BERT else config.task.load(DataConfig())

    point_at("http://127.0.0.1:9", tmp_path / "hf", monkeypatch)
    with pytest.raises(UserError, match=rf"{name} is not in the cache.*`hf download .*HF_HOME") as refused:
        act()
    command = next(part for part in str(refused.value).split("`") if part.startswith("hf download"))
    elsewhere = tmp_path / "elsewhere"
    home = environment(HF_ENDPOINT=hub.url, HF_HOME=str(elsewhere))
    subprocess.run([str(HF), *shlex.split(command)[1:]], env=home, check=True, capture_output=True, timeout=60)
    shutil.copytree(elsewhere, tmp_path / "hf", dirs_exist_ok=True, symlinks=True)
    start = time.monotonic()
    assert act() is not None
    assert time.monotonic() - start < 10


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_code_of_a_repository_runs_only_when_asked(
    hub: Hub, hub_run: Any, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    files = dict(site.files[f"models/{made.BERT}"])
    about = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    config = {**json.loads(files["config.json"]), "model_type": "own", "auto_map": about}
    files |= {"config.json": json.dumps(config).encode(), "own.py": CODE.format(marker=str(marker)).encode()}
    hub.add("models/org/own", files)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UserError, match=r"org/own brings its own code.*model\.trust_remote_code=true"):
        load(hub_run("model.source=org/own"))
    assert not marker.exists()
    load(hub_run("model.source=org/own", "model.trust_remote_code=true"))
    assert marker.exists()


def test_a_model_that_is_refused_after_its_branch_moved_stays_in_the_cache(
    hub: Hub, hub_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(hub_run())
    hub.repos[f"models/{made.BERT}"].push(made.make_bert(seed=1)[0])
    config, asked = hub_run("task=oasst1"), len(hub.asked)
    with pytest.raises(UserError, match=rf"causal language model.*\(bert, from {made.BERT}\)"):
        find_suitable_sources(config.model, config.task)
    assert not any("/storage/" in request for request in hub.asked[asked:]), "no weights"
    hub.rules.append(Rule("", status=503))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    load(hub_run())


def test_an_adapter_on_the_hub_is_refused_before_its_weights_are_downloaded(hub: Hub, hub_run: Any) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": made.BERT}
    hub.add(
        "models/org/adapter", {"adapter_config.json": json.dumps(about).encode(), "adapter_model.safetensors": b"x"}
    )
    with pytest.raises(UserError, match=rf"org/adapter is a peft adapter.*model\.tokenizer={made.BERT}"):
        find_sources(hub_run("model.source=org/adapter").model)
    assert not any("/storage/" in request for request in hub.asked)


def test_stdout_is_quiet_and_downloads_show_a_bar_on_stderr(hub: Hub, tmp_path: Path) -> None:
    hub.rules.append(Rule("GET /storage/", cut=0.5, times=1))  # the client then warns, with the address
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # bars of no width are not drawn
    command = [sys.executable, str(ROOT / "run.py"), "model=bert_base", "method=lora", "model.lora_rank=2", *SHORT]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home")), text=True,
        stdout=subprocess.PIPE, stderr=side,
    )  # fmt: skip
    os.close(side)
    seen = b""
    while True:
        try:
            seen += (piece := os.read(main, 65536))
        except OSError:
            break
        if not piece:
            break
    out, _ = process.communicate(timeout=60)
    err = seen.decode()
    assert process.returncode == 0, err
    assert "model.safetensors:" in err
    assert "downloading google-bert/bert-base-uncased: 5 files" in out
    for word in ("HTTP", "http", "Signature", "%|"):
        assert word not in out
    assert "Trying to resume download" in err
    assert "Signature" not in err
