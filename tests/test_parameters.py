"""What a chapter accepts as a list of parameters; single values are tested through the chapters that declare them."""

import math
import re
from typing import Any

import pytest

from bdpo import parameters

NAMES = ["dpo", "ipo", "bdpo"]


def test_lists_come_back_in_the_order_given() -> None:
    assert parameters.choices("methods", ("bdpo", "dpo"), NAMES, including="dpo") == ["bdpo", "dpo"]
    given = parameters.numbers("mask_rates", [0.4, 0], 0, 0.9)
    assert given == [0.4, 0.0]
    assert all(type(x) is float for x in given)


@pytest.mark.parametrize(
    "wrong", ["dpo", "no such value", None, [], ["dpo", "dpo"], ["dpo", "ppo"], ["dpo", ["ipo"]], {"dpo"}, ["bdpo"]]
)
def test_a_list_of_choices_is_refused_with_its_name_the_value_and_what_is_allowed(wrong: Any) -> None:
    told = f"parameter methods = {wrong!r}: it must be a list of different values out of 'dpo', 'ipo'"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        parameters.choices("methods", wrong, NAMES, including="dpo")


@pytest.mark.parametrize(
    "wrong",
    ["no such value", None, 0.2, [], [0.2, 0.2], [0, 0.0], [0.2, -0.1], [0.91], [math.nan], [True], ["0.2"], [None]],
)
def test_a_list_of_numbers_is_refused_with_its_name_the_value_and_the_bounds(wrong: Any) -> None:
    told = f"parameter mask_rates = {wrong!r}: it must be a list of different finite numbers, each at least 0"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        parameters.numbers("mask_rates", wrong, 0, 0.9)


def test_bounds_of_numbers_may_be_open_or_missing() -> None:
    assert parameters.numbers("x", [1e300, -5], -math.inf, math.inf) == [1e300, -5.0]
    with pytest.raises(ValueError, match=r"each above 0 and below 1$"):
        parameters.numbers("x", [0.5, 1], 0, 1, open_low=True, open_high=True)
