"""What a chapter accepts as a parameter: a wrong value is refused before anything is computed.

A notebook declares its parameters in one cell tagged ``parameters`` and checks them in the next::

    from bdpo import parameters

    parameters.integer("denominator", denominator, 2, 60)
    parameters.number("beta", beta, 0, 10, open_low=True)
    parameters.choice("objective", objective, ["dpo", "bdpo"])
    parameters.choices("methods", methods, ["dpo", "ipo", "bdpo"], including="dpo")
    parameters.numbers("mask_rates", mask_rates, 0, 0.9)
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def integer(name: str, value: object, low: int, high: int) -> int:
    """A whole number between two bounds.

    ``low <= value <= high``

    Parameters
    ----------
    name
        The parameter's name in the notebook, for the message.
    value
        What was given. Neither ``True`` nor ``3.0`` is a whole number here.
    low, high
        The smallest and the largest value allowed.

    Returns
    -------
    int
        The value.

    Raises
    ------
    ValueError
        If the value is no whole number or lies outside the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"parameter {name} = {value!r}: it must be a whole number from {low} to {high}")
    return value


def number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """A finite real number between two bounds.

    ``low <= value <= high``, strictly where ``open_low`` or ``open_high`` says so

    Parameters
    ----------
    name
        The parameter's name in the notebook, for the message.
    value
        What was given. ``True`` is no number here, nor is a NaN.
    low, high
        The bounds; ``-math.inf`` and ``math.inf`` leave a side free.
    open_low, open_high
        Whether the bound itself is refused.

    Returns
    -------
    float
        The value.

    Raises
    ------
    ValueError
        If the value is no finite number or lies outside the bounds.
    """
    wanted, fine = _bounds(low, high, open_low, open_high)
    if not fine(value):
        raise ValueError(f"parameter {name} = {value!r}: it must be a finite number{', ' if wanted else ''}{wanted}")
    return float(value)  # type: ignore[arg-type]


def numbers(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> list[float]:
    """A list of different finite numbers, each between two bounds.

    ``low <= x <= high`` for each, strictly where ``open_low`` or ``open_high`` says so

    Parameters
    ----------
    name, low, high, open_low, open_high
        As in `number`.
    value
        What was given: at least one number, no two alike.

    Returns
    -------
    list of float
        The values, in the order given.

    Raises
    ------
    ValueError
        If the value is no list, is empty, or holds something else than different numbers within the bounds.
    """
    wanted, fine = _bounds(low, high, open_low, open_high)
    if not isinstance(value, list | tuple) or not value or not all(map(fine, value)) or len({*value}) < len(value):
        each = f", each {wanted}" if wanted else ""
        raise ValueError(f"parameter {name} = {value!r}: it must be a list of different finite numbers{each}")
    return [float(x) for x in value]


def _bounds(low: float, high: float, open_low: bool, open_high: bool) -> tuple[str, Callable[[object], bool]]:
    """The bounds in words, and whether a value is a finite number within them."""
    above = f"above {low}" if open_low else f"at least {low}"
    below = f"below {high}" if open_high else f"at most {high}"
    words = " and ".join(bound for bound, free in ((above, low == -math.inf), (below, high == math.inf)) if not free)

    def fine(x: object) -> bool:
        if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
            return False
        return (low < x if open_low else low <= x) and (x < high if open_high else x <= high)

    return words, fine


def choice(name: str, value: T, options: Sequence[T]) -> T:
    """One of a few values.

    Parameters
    ----------
    name
        The parameter's name in the notebook, for the message.
    value
        What was given.
    options
        The values allowed.

    Returns
    -------
    object
        The value.

    Raises
    ------
    ValueError
        If the value is not among the options.
    """
    if value not in options:
        raise ValueError(f"parameter {name} = {value!r}: it must be one of {', '.join(map(repr, options))}")
    return value


def choices(name: str, value: Sequence[T], options: Sequence[T], *, including: T | None = None) -> list[T]:
    """A list of some of a few values.

    Parameters
    ----------
    name
        The parameter's name in the notebook, for the message.
    value
        What was given: at least one value, no two alike.
    options
        The values allowed.
    including
        A value that has to be among them, such as a baseline.

    Returns
    -------
    list
        The values, in the order given.

    Raises
    ------
    ValueError
        If the value is no list, is empty, holds something else than different options, or lacks the one it has to have.
    """
    fine = isinstance(value, list | tuple) and value and all(x in options for x in value)
    if not fine or len({*value}) < len(value) or not (including is None or including in value):
        must = "" if including is None else f", {including!r} among them"
        among = ", ".join(map(repr, options))
        raise ValueError(f"parameter {name} = {value!r}: it must be a list of different values out of {among}{must}")
    return list(value)
