"""The real conf/: every choice builds, and the key holds what determines a result and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_fixtures import ROOT, Composer, Tiny

from sparsegrad.errors import UserError
from sparsegrad.runs.config import build
from sparsegrad.runs.keys import config_key


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("method", choices("method"))
@pytest.mark.parametrize("model", choices("model"))
def test_every_model_goes_with_every_method(conf: Composer, model: str, method: str) -> None:
    config = build(conf(f"model={model}", f"method={method}"))
    assert (config.model.name, config.method.name) == (model, method)
    assert config.train.lr == config.model.lr


@pytest.mark.parametrize("group", ["task", "protocol", "tracker"])
def test_every_choice_builds_and_has_its_name(conf: Composer, group: str) -> None:
    for name in choices(group):
        assert getattr(build(conf(f"{group}={name}")), group).name == name


def hydra_grid(conf: Composer, name: str) -> list[str]:
    """The first point of the experiment's own multirun, hyperparameters by hand; empty if it is one run."""
    from omegaconf import OmegaConf

    text = OmegaConf.load(ROOT / "conf" / "experiment" / f"{name}.yaml")
    inherited = [one for one in text.get("defaults", []) if isinstance(one, str) and one != "_self_"]
    params = dict(OmegaConf.select(text, "hydra.sweeper.params") or {})
    own = [f"{key}={str(value).split(',')[0].strip()}" for key, value in params.items()]
    return own or [point for parent in inherited for point in hydra_grid(conf, parent)]


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_builds(conf: Composer, name: str) -> None:
    """One run, or the first cell of a table's grid; its records get a folder of its own name or a shared one."""
    grid = hydra_grid(conf, name)
    config = build(conf(f"experiment={name}", *grid))
    assert config.record_path.parent.name == config.name
    assert bool(grid) or config.name == name


@pytest.mark.parametrize(
    "override",
    ["name=other", "results_dir=x", "work_dir=y", "force=true", "resume=false", "save_model=true",
     "tracker=tensorboard", "data.dir=elsewhere", "train.device=auto", "train.eval_batch_size=7"],
)  # fmt: skip
def test_what_does_not_change_the_result_is_not_in_the_key(tiny: Tiny, override: str) -> None:
    assert tiny(override).key == tiny().key


@pytest.mark.parametrize(
    "override",
    ["seed=1", "train.lr=2e-2", "train.batch_size=2", "train.precision=bf16", "train.train_rest=false",
     "train.grad_accumulation=2", "train.weight_decay=0.1", "train.group_by_length=true", "method=full",
     "method.density=0.02", "method.engine=layer", "model=bert_base", "task=rte", "protocol=heldout",
     "protocol.max_steps=5", "protocol.patience=2", "data.max_train=9", "data.pad=max_length",
     "method.sides=small", "method.moments=support", "method.save_dtype=bf16"],
)  # fmt: skip
def test_what_changes_the_result_is_in_the_key(tiny: Tiny, override: str) -> None:
    assert tiny(override).key != tiny().key


def test_the_key_is_stable(tiny: Tiny) -> None:
    config = tiny()
    again = json.loads(json.dumps(config.resolved))
    assert config_key(dict(reversed(again.items()))) == config.key
    assert len(config.key) == 16
    assert config.record_path == Path(config.results_dir) / "runs" / "adhoc" / f"{config.key}.json"
    assert config.resolved == again  # the key takes nothing out of it


def test_settings_that_came_later_leave_the_keys_of_older_records_alone(tiny: Tiny) -> None:
    older = json.loads(json.dumps(tiny().resolved))
    later = ("sides", "moments", "release_gradients", "drop_padding", "save_dtype", "rotation_order", "rotation_dtype")
    for name in later:
        del older["method"][name]
    assert config_key(older) == tiny().key


def test_the_earlier_name_of_the_exact_engine_is_the_same_run(conf: Composer) -> None:
    with pytest.warns(FutureWarning, match=r"method\.engine=exact"):
        earlier = build(conf("method=sparsegrad", "method.engine=merged"))
    today = build(conf("method=sparsegrad", "method.engine=exact"))
    assert earlier.key == today.key == build(conf("method=sparsegrad")).key
    assert earlier.resolved["method"]["engine"] == "exact"


@pytest.mark.parametrize("model", ["minilm", "roberta_base", "smollm2", "llama2_7b"])
def test_engine_fast_is_the_method_sparsegrad_fast(conf: Composer, model: str) -> None:
    task = "oasst1" if model in ("smollm2", "llama2_7b") else "cola"
    given = (f"model={model}", f"task={task}")
    by_engine = build(conf("method=sparsegrad", "method.engine=fast", *given))
    by_name = build(conf("method=sparsegrad_fast", *given))
    assert by_engine.key == by_name.key
    assert by_engine.resolved == by_name.resolved


@pytest.mark.parametrize("override", ["method.sides=small", "method.moments=support", "method.keep=9"])
def test_engine_fast_refuses_what_it_does_not_have(conf: Composer, override: str) -> None:
    with pytest.raises(UserError, match=override.replace(".", r"\.")):
        build(conf("method=sparsegrad", "method.engine=fast", override))
