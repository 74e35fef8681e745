"""What a chapter accepts as a parameter: a wrong value is refused before anything is computed.

A notebook declares its parameters in one cell tagged ``parameters`` and checks them in the next::

    from bdpo import parameters

    parameters.integer("denominator", denominator, 2, 60)
    parameters.number("beta", beta, 0, 10, open_low=True)
    parameters.choice("objective", objective, ["dpo", "bdpo"])
"""

import math
from collections.abc import Sequence
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
    above = f"above {low}" if open_low else f"at least {low}"
    below = f"below {high}" if open_high else f"at most {high}"
    wanted = " and ".join(bound for bound, free in ((above, low == -math.inf), (below, high == math.inf)) if not free)
    problem = f"parameter {name} = {value!r}: it must be a finite number{', ' if wanted else ''}{wanted}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(problem)
    if value < low or value > high or (open_low and value == low) or (open_high and value == high):
        raise ValueError(problem)
    return float(value)


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
