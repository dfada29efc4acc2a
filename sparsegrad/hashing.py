"""SHA-256 of texts, JSON, files and tensors; all fingerprints and run keys are built from these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHORT = 16  # hex digits of a key or a fingerprint: 64 bits, enough to avoid collisions among thousands of runs


def text_sha256(text: str) -> str:
    """Hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_sha256(content: Any) -> str:
    """Hex SHA-256 of `content` as JSON with sorted keys."""
    return text_sha256(json.dumps(content, sort_keys=True))


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises `OSError` where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]], head: str = "") -> str:
    """Hex SHA-256 of labelled tensors, in order.

    Args:
        tensors: (label, tensor) pairs; the label holds what the bytes do not, such as name and shape.
        head: text that is hashed before them.
    """
    digest = hashlib.sha256(head.encode())
    for label, tensor in tensors:
        digest.update(label.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view if it is contiguous on the CPU."""
    # Viewed as uint8, since numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
