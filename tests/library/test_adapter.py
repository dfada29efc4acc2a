"""Adapters: bit-equal both ways, switched, refused where they do not belong, and never a crash on damaged files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny_batches, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsegrad import UserError, load_adapter, prepare, save_adapter, set_adapter
from sparsegrad.adapter.format import FACTS, TENSORS

Trained = tuple[nn.Module, nn.Module, Any]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(model: Any, layout: str, steps: int = 3, lr: float = 1e-2, **settings: Any) -> Any:
    batches = tiny_batches(layout, 4)
    if layout == "vit":
        batches = [{**batch, "pixel_values": batch["pixel_values"].float()} for batch in batches]
    optimizer = prepare(model, batches, lr=lr, steps=2, **(settings or {"density": 0.02}))
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % 4]).loss.backward()
        optimizer.step()
    return optimizer


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Base, trained model and optimizer; not to be changed."""
    base = tiny_model("bert", torch.float32)
    model = copy.deepcopy(base)
    return base, model, train(model, "bert")


@pytest.fixture
def saved(trained: Trained, tmp_path: Path) -> Path:
    base, model, optimizer = trained
    save_adapter(model, tmp_path / "adapter", base, optimizer)
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bert", "gpt2", "t5"])
def test_merge_gives_the_trained_model_and_unmerge_the_base_bit_for_bit(
    layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny_model(layout, dtype)
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = train(model, layout)
    save_adapter(model, tmp_path, base, optimizer)
    adapter = load_adapter(fresh, tmp_path)
    assert equal(bits(fresh), bits(base)), "loading changes nothing"
    for _ in range(2):
        adapter.merge()
        assert adapter.merged
        assert equal(bits(fresh), bits(model))
        adapter.unmerge()
        assert not adapter.merged
        assert equal(bits(fresh), bits(base))


def test_an_adapter_prints_where_it_is_from_and_whether_it_is_merged(trained: Trained, saved: Path) -> None:
    adapter = load_adapter(copy.deepcopy(trained[0]), saved)
    assert repr(adapter).startswith(f"Adapter({str(saved)!r}, base='BertForSequenceClassification', ")
    assert repr(adapter).endswith(" tensors, not merged)")


def test_adapters_of_one_base_are_switched(trained: Trained, tmp_path: Path) -> None:
    base, first, _ = trained
    second = copy.deepcopy(base)
    train(second, "bert", steps=2, lr=3e-3)
    fresh = copy.deepcopy(base)
    for name, model in (("first", first), ("second", second)):
        save_adapter(model, tmp_path / name, base)
    one, two = (load_adapter(fresh, tmp_path / name) for name in ("first", "second"))
    for adapter, model in ((one, first), (two, second), (two, second), (one, first), (None, base)):
        set_adapter(fresh, adapter)
        assert equal(bits(fresh), bits(model))


def test_only_changed_tensors_are_stored(tmp_path: Path) -> None:
    base = tiny_model("bert", torch.float32)
    model: Any = copy.deepcopy(base)
    model.bert.embeddings.requires_grad_(False)
    train(model, "bert")
    save_adapter(model, tmp_path, base)
    names = json.loads((tmp_path / FACTS).read_text())["tensors"]
    assert names
    assert not any("embeddings" in name for name in names)


def test_a_sparse_change_is_stored_sparse(tmp_path: Path) -> None:
    base = nn.Linear(400, 300)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[5, ::2] += 1
    saved = save_adapter(model, tmp_path, base, FakePrepared(model))
    assert saved.forms == {"sparse": 1}
    assert saved.mlp_bytes == 200 * (4 + 4)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path).merge()
    assert equal(bits(fresh), bits(model))


class FakePrepared:
    """The groups of an optimizer of `prepare` for one linear without a basis."""

    def __init__(self, model: nn.Linear) -> None:
        group = {"kind": "only", "param_names": ["weight"], "params": [model.weight], "keep": 700, "density": None}
        self.param_groups = [{**group, "basis": None}]


def test_a_folder_is_a_base_and_a_head_that_it_lacks_is_new(tmp_path: Path) -> None:
    """As from the hub: the saved base has no classifier, each load draws another one, the adapter brings its own."""
    base = tiny_model("bert", torch.float32)
    base.bert.save_pretrained(tmp_path / "base")
    model, fresh = (type(base).from_pretrained(tmp_path / "base") for _ in range(2))
    assert not torch.equal(model.classifier.weight, fresh.classifier.weight)
    model.eval()
    train(model, "bert")
    numbers = torch.get_rng_state()
    save_adapter(model, tmp_path / "adapter")  # the base is where from_pretrained found it
    assert torch.equal(numbers, torch.get_rng_state())
    adapter, before = load_adapter(fresh, tmp_path / "adapter"), bits(fresh)
    adapter.merge()
    assert equal(bits(fresh), bits(model))
    adapter.unmerge()
    assert equal(bits(fresh), before)
    assert json.loads((tmp_path / "adapter" / FACTS).read_text())["base"] == "base"
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_with_a_tolerance_kept_entries_are_stored_and_keep_their_promise(layout: str, tmp_path: Path) -> None:
    """Few entries changed in the rotated space: they and the columns of the basis they need are smaller than W."""
    base = tiny_model(layout, torch.float32)
    model = copy.deepcopy(base)
    optimizer = train(model, layout, steps=2, keep=4)
    exact = save_adapter(model, tmp_path / "exact", base, optimizer)
    small = save_adapter(model, tmp_path / "small", base, optimizer, tolerance=1e-3)
    assert small.forms["rotated"] > 0
    assert small.mlp_bytes < exact.mlp_bytes
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path / "small").merge()
    facts = json.loads((tmp_path / "small" / FACTS).read_text())["tensors"]
    for name, weight in fresh.state_dict().items():
        old, new = base.state_dict()[name].double(), model.state_dict()[name].double()
        if facts.get(name, {}).get("form") == "rotated":
            assert 0 < (weight.double() - new).norm() < 1.1e-3 * (new - old).norm()
        else:
            assert torch.equal(weight, model.state_dict()[name])


def test_the_size_beside_lora_is_what_peft_saves(trained: Trained, tmp_path: Path) -> None:
    """keep = 48 of weights (32, 16): rank 1."""
    base = tiny_model("bert", torch.float32)
    model = copy.deepcopy(base)
    saved = save_adapter(model, tmp_path / "adapter", base, train(model, "bert", keep=48))
    names = [r"intermediate.dense", r"layer.0.output.dense", r"layer.1.output.dense"]
    get_peft_model(base, LoraConfig(r=1, target_modules=names)).save_pretrained(tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert saved.lora_bytes == sum(tensor.nbytes for tensor in stored.values()) == 4 * 4 * 48


def test_the_card_says_what_it_is(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sparsegrad\nbase_model:")
    assert "kB (LoRA of the same count: 0." in card
    assert "bit for bit" in card


def refused(model: nn.Module, folder: Path, message: str) -> None:
    before = bits(model)
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)
    assert equal(bits(model), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("bert", torch.float32, seed=9), "is not the base's that this adapter was made for"),
        (lambda: tiny_model("bert", torch.bfloat16), r"torch\.bfloat16 in the model .* torch\.float32 in the adapter"),
        (lambda: tiny_model("llama", torch.float32), "the model has no bert"),
    ],
)
def test_another_model_is_refused(saved: Path, model: Any, message: str) -> None:
    refused(model(), saved, message)


def test_merge_twice_and_out_of_order_is_refused(trained: Trained, saved: Path) -> None:
    fresh: Any = copy.deepcopy(trained[0])
    one, two = load_adapter(fresh, saved), load_adapter(fresh, saved)
    with pytest.raises(UserError, match="nothing to unmerge"):
        one.unmerge()
    one.merge()
    with pytest.raises(UserError, match="this adapter is merged already"):
        one.merge()
    with pytest.raises(UserError, match="is merged already: unmerge it first, or call"):
        two.merge()
    with pytest.raises(UserError, match="is merged: unmerge it before another is loaded"):
        load_adapter(fresh, saved)
    assert equal(bits(fresh), bits(trained[1]))


def test_training_while_merged_or_loaded_is_noticed(trained: Trained, saved: Path) -> None:
    fresh: Any = copy.deepcopy(trained[0])
    adapter = load_adapter(fresh, saved)
    adapter.merge()
    with torch.no_grad():
        fresh.classifier.weight.add_(1)
    with pytest.raises(UserError, match=r"classifier\.weight was changed .* save what you trained"):
        adapter.unmerge()
    other: Any = copy.deepcopy(trained[0])
    adapter = load_adapter(other, saved)
    with torch.no_grad():
        other.classifier.weight.add_(1)
    with pytest.raises(UserError, match=r"was changed .* load the base"):
        adapter.merge()


def edit_facts(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    """Change the tensors and make the sha256 fit, as somebody who means it would."""
    import hashlib

    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "x"})
    edit_facts(folder, sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())


HEAD = "classifier.weight::values"
INTERMEDIATE = "bert.encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / FACTS).unlink(), "no adapter in"),
        (lambda f: (f / TENSORS).unlink(), "no adapter in"),
        (lambda f: (f / FACTS).write_text("{"), "not a readable adapter"),
        (lambda f: (f / FACTS).write_text("[]"), "not a readable adapter"),
        (lambda f: edit_facts(f, format="sparsegrad-adapter-0"), "format sparsegrad-adapter-0, not sparsegrad-adapter"),
        (lambda f: edit_facts(f, tensors={"../../x": {}}), "not a readable adapter"),
        (lambda f: edit_facts(f, tensors={}), "tensors that .* does not name"),
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), "is damaged"),
        (lambda f: (f / TENSORS).write_bytes(b"\x80\x04cos\nsystem\n."), "is damaged"),
        (lambda f: edit_tensors(f, lambda t: t[HEAD].fill_(float("nan"))), "not finite"),
        (lambda f: edit_tensors(f, lambda t: t.update({HEAD: t[HEAD][:-1]})), "do not fit"),
        (lambda f: edit_tensors(f, lambda t: t.update({HEAD: t[HEAD].half()})), "inconsistent"),
        (lambda f: edit_tensors(f, lambda t: t.update({"more": t[HEAD].clone()})), "does not name"),
    ],
)
def test_spoiled_files_are_refused(trained: Trained, saved: Path, spoil: Any, message: str) -> None:
    spoil(saved)
    refused(copy.deepcopy(trained[0]), saved, message)


@pytest.mark.parametrize("index", [[3, 2], [-1, 4], [0, 10**6], [1, 1]])
def test_positions_outside_or_twice_are_refused(tmp_path: Path, index: list[int]) -> None:
    base = nn.Linear(40, 30)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[0, :2] += 1
    save_adapter(model, tmp_path, base, FakePrepared(model))
    edit_tensors(tmp_path, lambda t: t.update({"weight::index": torch.tensor(index, dtype=torch.int32)}))
    refused(base, tmp_path, "positions or values that do not fit")


def test_flipped_and_missing_bytes_never_pass_and_never_crash(trained: Trained, saved: Path) -> None:
    """200 spoiled folders; a flip in the JSON may leave it valid, but then the model is the trained one or refused."""
    generator = torch.Generator().manual_seed(0)
    originals = {name: (saved / name).read_bytes() for name in (FACTS, TENSORS)}
    for number in range(200):
        name = (FACTS, TENSORS)[number % 2]
        content = bytearray(originals[name])
        place = int(torch.randint(len(content), (1,), generator=generator))
        content[place] ^= 1 << number % 8
        (saved / name).write_bytes(content if number % 3 else content[:place])
        try:
            adapter = load_adapter(trained[0], saved)
        except UserError:
            assert True
        else:
            adapter.merge()
            assert equal(bits(trained[0]), bits(trained[1]))
            adapter.unmerge()
        (saved / name).write_bytes(originals[name])


def test_what_cannot_be_saved_is_refused(trained: Trained, tmp_path: Path) -> None:
    base, model, optimizer = trained
    spoiled: Any = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.classifier.bias[0] = float("inf")
    for call, message in (
        (lambda: save_adapter(base, tmp_path, base), "equals its base"),
        (lambda: save_adapter(spoiled, tmp_path, base), r"classifier\.bias is not finite"),
        (lambda: save_adapter(model, tmp_path), "does not know where it came from"),
        (lambda: save_adapter(model, tmp_path, "nowhere/at-all-" + "x" * 99), "cannot be loaded"),
        (lambda: save_adapter(model, tmp_path, tiny_model("llama")), "differ in the tensors"),
        (lambda: save_adapter(model, tmp_path, tiny_model("bert")), "in the base and not so in the model"),
        (lambda: save_adapter(model, tmp_path, base, tolerance=0.1), "needs the bases"),
        (lambda: save_adapter(model, tmp_path, base, optimizer, tolerance=1.0), "tolerance=1"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_adapter(trained[1], tmp_path / "file" / "adapter", trained[0])


def test_a_wrapped_model_is_refused_with_its_plain_name(trained: Trained, tmp_path: Path) -> None:
    base, model, optimizer = trained
    with pytest.raises(UserError, match=r"wrapped by DataParallel: save the plain one, model\.module"):
        save_adapter(nn.DataParallel(model), tmp_path, base, optimizer)


def test_an_optimizer_of_other_names_is_refused_and_never_weakens_the_adapter(trained: Trained, tmp_path: Path) -> None:
    """Prepared inside another module, its names have a prefix: its weights would not be known as the base's."""
    base, model, optimizer = trained
    renamed = copy.copy(optimizer)
    renamed.param_groups = [
        {**group, "param_names": [f"inner.{name}" for name in group["param_names"]]} for group in optimizer.param_groups
    ]
    with pytest.raises(UserError, match=r"trains inner\.bert.* leave out optimizer="):
        save_adapter(model, tmp_path, base, renamed)


def test_a_peft_model_is_refused_with_the_remedy() -> None:
    wrapped = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["intermediate.dense"]))
    with pytest.raises(UserError, match=r"intermediate\.dense is wrapped by peft: call merge_and_unload"):
        prepare(wrapped, tiny_batches("bert", 2), steps=2)
