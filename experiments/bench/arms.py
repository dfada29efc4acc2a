"""The arms: methods with the options they are measured with. To add an arm, add a line to `ARMS`.

Each option of conf/method is an arm too, of the same name, at the density of the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from experiments.bench.settings import Setting
from experiments.paths import CONF
from sparsegrad.errors import UserError, check_choice
from sparsegrad.methods.base import Method

AUTHORS_DENSITY = 28000 / (768 * 3072)  # the authors' code keeps 28,000 entries of each weight of a base model


def lora_rank(setting: Setting) -> int:
    """The rank at which LoRA has about as many entries as SparseGrad keeps, at least 1."""
    hidden, intermediate = setting.widths
    return max(1, round(setting.density * hidden * intermediate / (hidden + intermediate)))


def by_density(setting: Setting) -> dict[str, Any]:
    """Options of a method that keeps a given density of entries."""
    return {"density": setting.density}


def by_rank(setting: Setting) -> dict[str, Any]:
    """Options of LoRA at the same trainable count."""
    return {"rank": lora_rank(setting)}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method with its options.

    Attributes:
        about: description for tables.
        method: `module:Class`, or a function that makes the method; imported only when the arm is measured, so that
            missing packages affect no other arm.
        cost: key of `arithmetic.COSTS`; empty: no prediction.
        options: fixed arguments of the class.
        sized: further arguments, computed from the setting.
        bases: whether the arm needs calibrated bases.
        only: whether the arm makes sense in a setting; elsewhere it would equal another arm.
    """

    about: str
    method: str
    cost: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sized: Callable[[Setting], dict[str, Any]] = lambda setting: {}
    bases: bool = False
    only: Callable[[Setting], bool] = lambda setting: True

    def make(self, setting: Setting) -> Method:
        """The method object.

        Raises:
            UserError: when a package that the method needs is missing.
        """
        module, _, name = self.method.partition(":")
        try:
            found = getattr(import_module(module), name)
        except ImportError as error:
            raise UserError(f"{self.about} needs the package {error.name}: install it or leave the arm out") from None
        made: Method = found(**{**self.sized(setting), **self.options})
        return made


def _sparsegrad(about: str, cost: str, only: Callable[[Setting], bool] = lambda setting: True, **options: Any) -> Arm:
    method = "sparsegrad.methods.sparsegrad:SparseGrad"
    return Arm(about=about, method=method, cost=cost, options=options, sized=by_density, bases=True, only=only)


def _lora(about: str, method: str, only: Callable[[Setting], bool] = lambda setting: True) -> Arm:
    return Arm(about=about, method=method, cost="lora", sized=by_rank, only=only)


ARMS: dict[str, Arm] = {
    "frozen": Arm(about="MLP weights frozen (lower bound)", method="experiments.bench.rivals:Frozen", cost="frozen"),
    "full": Arm(about="full fine-tuning", method="sparsegrad.methods.full:Full", cost="full"),
    "lora_peft": _lora("LoRA, peft defaults", "sparsegrad.methods.lora:Lora"),
    "lora_dtype": _lora(
        "LoRA, peft, adapters in the model's dtype",
        "experiments.bench.rivals:LoraInModelDtype",
        lambda s: s.precision == "bf16",
    ),
    "lora_fused": _lora("LoRA, fused autograd node", "experiments.bench.rivals:FusedLora"),
    "meprop": Arm(about="MeProp", method="sparsegrad.methods.meprop:MeProp", cost="full", sized=by_density),
    "layer_regular": _sparsegrad("SparseGrad, the paper's layer, Regular", "layer", engine="layer"),
    "layer_sparse_dense": _sparsegrad(
        "SparseGrad, the paper's layer, Sparse-by-Dense", "layer", engine="layer", backward="sparse_dense"
    ),
    "authors": Arm(
        about="SparseGrad as the authors' code",
        method="sparsegrad.methods.sparsegrad_authors:SparseGradAuthors",
        cost="layer",
        options={"density": AUTHORS_DENSITY, "engine": "layer"},
        bases=True,
    ),
    "exact": _sparsegrad("SparseGrad, engine exact", "both_sides"),
    "exact_gradient": _sparsegrad(
        "exact, the optimizer rotates finished gradients", "both_sides_gradient", rotation_order="gradient"
    ),
    "exact_rotation_bf16": _sparsegrad(
        "exact, gradients rotated in bf16",
        "both_sides",
        lambda s: s.precision not in ("fp32", "tf32"),
        rotation_dtype="bf16",
    ),
    "exact_release": _sparsegrad("exact, gradients released", "both_sides", release_gradients=True),
    # On a CPU padding is dropped anyway, without padding there is nothing to drop, and in bf16 the inputs are bf16
    # already: `only` leaves these arms out.
    "exact_drop": _sparsegrad(
        "exact, padding dropped on a GPU, too", "both_sides", lambda s: s.padding == "max_length", drop_padding=True
    ),
    "exact_bf16": _sparsegrad(
        "exact, inputs saved in bf16", "both_sides", lambda s: s.precision in ("fp32", "tf32"), save_dtype="bf16"
    ),
    "exact_small": _sparsegrad("rotation of the small side only, not exact", "small_side", sides="small"),
    "exact_lean": _sparsegrad(
        "rotation of the small side, moments of the kept entries only, gradients released; not exact",
        "small_side",
        sides="small",
        moments="support",
        release_gradients=True,
    ),
    "fast": Arm(
        about="SparseGrad fast: one block, not exact",
        method="sparsegrad.methods.sparsegrad_fast:SparseGradFast",
        cost="block",
        sized=by_density,
        bases=True,
    ),
}
FIT_ARM = "full"  # measured first in every setting; the steps that fit into its time limit are those of all arms
PAPER_ARMS = ("full", "lora_peft", "layer_sparse_dense", "layer_regular", "exact", "fast")
MAIN_ARMS = ("full", "lora_peft", "exact", "fast")
REFERENCES = ("full", "lora_peft", "layer_regular", "layer_sparse_dense")


def find_arm(name: str) -> Arm:
    """The arm of this name, or `UserError` that lists them."""
    ready = list_ready()
    check_choice("arm", name, (*ARMS, *ready))
    return ARMS[name] if name in ARMS else ready[name]


def list_ready() -> dict[str, Arm]:
    """The options of conf/method, such as `lora_sb` and `peft/dora`, as arms; those of `ARMS` are left out."""
    folder = CONF / "method"
    options = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return {name: _make_ready(name) for name in options if name not in ARMS}


def _make_ready(option: str) -> Arm:
    return Arm(
        about=f"method={option}",
        method="experiments.bench.ready:make_method",
        cost="",
        options={"option": option},
        sized=lambda setting: {"setting": setting},
        bases=option.startswith("sparsegrad"),
    )


def arms_of(setting: Setting, wanted: tuple[str, ...]) -> list[str]:
    """The arms in `wanted` (empty: all) that make sense in `setting`, `full` first."""
    names = [name for name in wanted or tuple(ARMS) if find_arm(name).only(setting)]
    return sorted(names, key=lambda name: name != FIT_ARM)
