"""Ways to damage a file of any kind, a JSON file or a safetensors file; randomness comes from one `random.Random`."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

OUTSIDE = "outside"  # a folder that no reader may touch; names in damaged files point there
PAYLOAD = "code-was-run"  # the folder that a disguised pickle creates in OUTSIDE if it is loaded
HUGE = 3 * 2**29  # bytes of an oversized file; the file is sparse, so it uses no disk space


class Payload:
    """An object that creates a folder when it is unpickled: proof that code was run."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


def outside(path: Path) -> Path:
    """The forbidden folder next to the folder of `path`."""
    return next(parent / OUTSIDE for parent in path.parents if (parent / OUTSIDE).is_dir())


def truncated(path: Path, draw: random.Random) -> None:
    """Cut the file at any byte, possibly to nothing."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.choice([0, draw.randrange(len(content)), max(0, len(content) - 1)])])


def bits_flipped(path: Path, draw: random.Random) -> None:
    """Flip one to sixteen bits; half of them in the first 200 bytes, where headers are."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 16])):
        content[draw.randrange(draw.choice([len(content), min(200, len(content))]))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def spliced(path: Path, draw: random.Random) -> None:
    """Remove, repeat or replace a piece of the file."""
    content = path.read_bytes()
    begin = draw.randrange(len(content))
    end = min(len(content), begin + draw.choice([1, 8, 100, 1000]))
    piece = draw.choice([b"", content[begin:end] * 2, draw.randbytes(end - begin), b"\x00" * 20, b"\xff\xfe", b"\n\n"])
    path.write_bytes(content[:begin] + piece + content[end:])


def oversized(path: Path, draw: random.Random) -> None:
    """Grow the file to gigabytes, or write a header that claims as much."""
    if draw.random() < 0.3:
        os.truncate(path, HUGE)
    else:
        content = path.read_bytes()
        claimed = draw.choice([2**63 - 1, 2**40, 2**31, 100_000_001, len(content) * 2])
        path.write_bytes(struct.pack("<Q", claimed) + content[8:])


def pickled(path: Path, draw: random.Random) -> None:
    """Replace the file by a pickle that runs code: plain, in a torch archive, or behind a safetensors-like header."""
    payload = Payload(str(outside(path) / PAYLOAD))
    plain = pickle.dumps(payload)
    archive = io.BytesIO()
    torch.save(payload, archive)
    path.write_bytes(draw.choice([plain, archive.getvalue(), struct.pack("<Q", len(plain)) + plain]))


ANY = (truncated, bits_flipped, spliced, oversized, pickled)

_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("-inf"), "", "x", "\ud800", "\x00",
    "x" * 3000, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, "0", "torch.float32", "complete",
)  # fmt: skip


def json_changed(path: Path, draw: random.Random) -> None:
    """Change types or values, and drop, rename or repeat keys, in one to three places."""
    _on_a_line(path, draw, lambda content: _change(content, draw, _VALUES))


def names_outside(path: Path, draw: random.Random) -> None:
    """Put in a name or key that points outside the folder."""
    secret = outside(path) / "secret"
    names = (f"../{OUTSIDE}/secret", str(secret), "../../../../etc/passwd", "a/../b", "..", "/", "~/x", "\\\\x\\y")
    _on_a_line(path, draw, lambda content: _change(content, draw, names))


def nested_deep(path: Path, draw: random.Random) -> None:
    """Put in deeply nested brackets, or a number of 5,000 digits."""
    depth = draw.choice([100, 300, 900, 5000, 200_000])
    deep = draw.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "9" * 5000])
    _on_a_line(path, draw, lambda content: _change(content, draw, ("DEEP",)), lambda text: text.replace('"DEEP"', deep))


JSON = (json_changed, json_changed, names_outside, nested_deep)


def _on_a_line(
    path: Path, draw: random.Random, change: Callable[[Any], Any], after: Callable[[str], str] = lambda text: text
) -> None:
    """Change the JSON of a file, or of a random line of JSON lines."""
    text = path.read_text(encoding="utf-8")
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    number = draw.randrange(len(parts))
    content = json.loads(parts[number])
    for _ in range(draw.choice([1, 1, 2, 3])):
        content = change(content)
    parts[number] = after(json.dumps(content))
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _change(content: Any, draw: random.Random, values: tuple[Any, ...]) -> Any:
    """`content` with one random place changed."""
    places = list(_places(content))
    if not places or draw.random() < 0.02:
        return deepcopy(draw.choice(values))  # a later change must not reach the list of values itself
    node, key = draw.choice(places)
    how = draw.random()
    if how < 0.7:
        node[key] = deepcopy(draw.choice(values))
    elif how < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node[str(draw.choice(values))] = node.pop(key)
    else:
        node.append(deepcopy(node[key]))
    return content


def _places(node: Any) -> Any:
    """Every (container, key) below `node`."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from _places(value)


def tensors_changed(path: Path, draw: random.Random) -> None:
    """Write a valid safetensors file with a tensor of another type, shape, name or content, or with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    how = draw.choice(["dtype", "shape", "name", "gone", "extra", "nan", "metadata", "wide"])
    if how == "dtype":
        tensors[name] = tensor.to(draw.choice([torch.float64, torch.float16, torch.int32, torch.uint8, torch.bool]))
    elif how == "shape":
        sizes = [(-1,), (0, *tensor.shape), (*tensor.shape, 1), ()]
        size = draw.choice(sizes)
        tensors[name] = tensor.reshape(-1) if size == (-1,) else tensor.new_zeros(size)
    elif how == "wide":  # a product with this many columns would not fit into memory
        tensors[name] = torch.zeros(tensor.shape[0] if tensor.dim() else 1, 150_000)
    elif how == "name":
        tensors[draw.choice(["../outside/secret", "", "x" * 500, "up::values", "/etc/passwd"])] = tensors.pop(name)
    elif how == "gone":
        del tensors[name]
    elif how == "extra":
        tensors["extra"] = tensor.clone()
    elif how == "nan" and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, float("nan"))
    elif metadata:
        metadata[draw.choice(sorted(metadata))] = draw.choice(["", "x", "[]", "{}", '"up"', "[1]", "[" * 100_000])
    if draw.random() < 0.7:
        metadata.pop("sha256", None)  # as an older version, or an attacker, would write it
    path.write_bytes(save(tensors, metadata))


def yaml_code(path: Path, draw: random.Random) -> None:
    """Add a line of YAML that would create an object, call a function, or expand without end."""
    target = str(outside(path) / PAYLOAD)
    bomb = "\n".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else 'x'}]" for i in range(12))
    evil = draw.choice([
        f"name: !!python/object/apply:os.mkdir ['{target}']",
        f"_target_: os.mkdir\npath: {target}",
        f"_target_: pathlib.Path.mkdir\nself: {target}",
        f"_target_: {draw.choice(['builtins.eval', '.x', 'a..b', 'os', 'x.y', '__main__.main', 'sparsegrad.Basis'])}",
        "name: ${oc.decode:'${oc.env:HOME}'}", "name: ${name}", "name: &a [*a]", "name: ${oc.create:{a:1}}", bomb,
        "name: !!binary 'x'", "? [a]\n: b", "name: !!timestamp 2020-01-01", "1: 2", "null: 3", "name: 0x1F",
    ])  # fmt: skip
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split(":")[0] not in ("name", "_target_", "path")]
    path.write_text("\n".join([*kept, evil]) + "\n", encoding="utf-8")
