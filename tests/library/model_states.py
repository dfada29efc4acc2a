"""The tensors of a model, and whether another has the same bits."""

from __future__ import annotations

from torch import Tensor, equal, nn

State = dict[str, Tensor]


def bits(model: nn.Module) -> State:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def has_bits(model: nn.Module, other: State) -> bool:
    """Whether the model's state dict has the names and, bit for bit, the values of `other`."""
    mine = model.state_dict()
    return mine.keys() == other.keys() and all(equal(value, other[name]) for name, value in mine.items())


def assert_equal(one: State, other: State) -> None:
    """The same names, and the same bits under each."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert equal(value, other[name]), name
