"""Messages about numbers: the value, its type where only that is wrong, and the bounds as one reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsegrad.errors import UserError, check_integer, check_number


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (2.0, {"above": 0, "at_most": 1}, "x=2.0 is not allowed: give a number above 0 and at most 1"),
        (1, {"at_least": 0, "below": 1}, "x=1 is not allowed: give a number of at least 0 and below 1"),
        (-1, {"at_least": 0.0, "at_most": 0.5}, "x=-1 is not allowed: give a number from 0 to 0.5"),
        (-1, {"at_least": 0}, "x=-1 is not allowed: give a number of at least 0"),
        (9, {"at_most": 1, "remedy": "or 1"}, "x=9 is not allowed: give a number of at most 1; or 1"),
        (float("nan"), {}, "x=nan is not allowed: give a number"),
        (True, {}, "x=True is not allowed: give a number"),
        (None, {}, "x=None is not allowed: give a number"),
        ("abc", {"above": 0}, "x=abc is not allowed: give a number above 0"),
        # The printed value is within the bounds: only the type is wrong.
        ("0.01", {"above": 0, "remedy": "or 1"}, "x='0.01' is a str: give a number above 0; or 1"),
        (torch.tensor(0.5), {"above": 0}, "x=tensor(0.5000) is a Tensor: give a number above 0"),
        (torch.ones(2), {}, "x=tensor([1., 1.]) is not allowed: give a number"),
    ],
)
def test_a_refused_number_shows_what_is_wrong(value: Any, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_number("x", value, **bounds)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (1.5, {"at_least": 0, "at_most": 2**32 - 1}, "x=1.5 is not allowed: give a whole number from 0 to 4294967295"),
        (0, {"at_least": 1}, "x=0 is not allowed: give a whole number of at least 1"),
        ("3", {"at_least": 1}, "x='3' is a str: give a whole number of at least 1"),
    ],
)
def test_a_refused_integer_shows_what_is_wrong(value: Any, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_integer("x", value, **bounds)
    assert str(error.value) == message
