"""A setting: everything that is the same for all arms compared in it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from experiments.bench.lengths import PADDINGS, histograms, mean_length
from experiments.bench.shapes import Shape, find_shape
from sparsegrad.errors import UserError, check_choice, check_integer
from sparsegrad.hashing import json_sha256
from sparsegrad.optim.selection import check_density

PRECISIONS = ("fp32", "tf32", "bf16_autocast", "bf16")
RESTS = ("trained", "frozen")
MODES = ("eager", "compiled")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured.

    Attributes:
        shape, blocks: the model, cut to this number of blocks (None: all of the shape).
        batch, length: rows per batch; tokens at which a row is cut or to which it is padded.
        padding, task: `max_length` or `longest` with the token lengths of `task`; `none`: all tokens are real.
        rest: whether the parameters outside the MLP weights train: trained or frozen.
        precision: fp32, tf32 (matrix products), bf16_autocast (float32 weights), bf16 (the same, and weights that do
            not train are bf16).
        mode: eager, or compiled with `torch.compile`.
        density: share of kept entries per weight.

    Raises:
        UserError: for a value or a combination that is not allowed.
    """

    shape: str
    blocks: int | None = None
    batch: int = 16
    length: int = 128
    padding: str = "max_length"
    task: str | None = None
    rest: str = "trained"
    precision: str = "fp32"
    mode: str = "eager"
    density: float = 0.01

    def __post_init__(self) -> None:
        shape = find_shape(self.shape)
        shape.cut(self.blocks)
        check_integer("batch", self.batch, at_least=1)
        check_integer("length", self.length, at_least=2, at_most=512)
        check_choice("padding", self.padding, PADDINGS)
        check_choice("rest", self.rest, RESTS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("mode", self.mode, MODES)
        check_density(self.density)
        self._check_padding(shape)

    def _check_padding(self, shape: Shape) -> None:
        if shape.is_stack and self.padding != "none":
            raise UserError(f"padding={self.padding} is not defined for {self.shape}, which takes no tokens: give none")
        if self.padding != "none":
            check_choice("task", self.task, tuple(histograms()), f"padding={self.padding} needs its token lengths")
        elif self.task is not None:
            raise UserError(f"task={self.task} has no effect with padding=none: leave it out")

    @property
    def architecture(self) -> Shape:
        """The shape that `shape` names."""
        return find_shape(self.shape)

    @property
    def widths(self) -> tuple[int, int]:
        """(hidden, intermediate) width."""
        return self.architecture.hidden, self.architecture.intermediate

    @property
    def tokens(self) -> float:
        """Tokens per step, padding included; with padding `longest`, from the mean length of the task's rows."""
        if self.padding == "longest" and self.task is not None:
            return self.batch * mean_length(self.task, self.length)
        return self.batch * self.length

    @property
    def key(self) -> str:
        """A readable name, unique to this setting."""
        digest = json_sha256(asdict(self))[:6]  # covers blocks and density, which the readable part lacks
        parts = [self.shape, f"b{self.batch}x{self.length}", self.padding, self.task, self.rest, self.precision]
        return "-".join(part for part in [*parts, self.mode, digest] if part)

    def as_json(self) -> dict[str, Any]:
        """The fields, and `tokens` and `label`, which follow from them."""
        about = {"tokens": round(self.tokens, 1), "label": self.architecture.label(self.blocks)}
        return {**asdict(self), **about}


def matches(fields: Mapping[str, Any], setting: Setting, *, but: Container[str] = ()) -> bool:
    """Whether `fields`, as `as_json` gives them, are those of `setting`, apart from the fields named in `but`."""
    return all(fields.get(name) == value for name, value in asdict(setting).items() if name not in but)


def setting_from(fields: dict[str, Any]) -> Setting:
    """The inverse of `as_json`."""
    return Setting(**{name: value for name, value in fields.items() if name not in ("tokens", "label")})
