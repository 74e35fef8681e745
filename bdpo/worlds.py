"""Small exact worlds: policies, utilities and preference pairs in fractions, the simplest first."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, combinations_with_replacement

Policy = tuple[Fraction, ...]


def policies(n: int, denominator: int) -> Iterator[Policy]:
    """All policies over ``n`` responses with positive probabilities k/d, d up to ``denominator``, simplest first.

    Raises
    ------
    ValueError
        If ``n`` is below 2, or no such policy exists.
    """
    if n < 2:
        raise ValueError(f"n is {n}; allowed: 2 or more responses")
    if denominator < n:
        raise ValueError(f"denominator is {denominator}; allowed: {n} or more, since {n} positive parts must add to 1")
    seen = set()
    for d in range(n, denominator + 1):
        for cuts in combinations(range(1, d), n - 1):
            p = tuple(Fraction(b - a, d) for a, b in zip((0, *cuts), (*cuts, d), strict=True))
            if p not in seen:
                seen.add(p)
                yield p


def utilities(n: int, largest: int) -> Iterator[tuple[Fraction, ...]]:
    """All integer utility vectors with entries from 1 to ``largest``, one for each set of ratios, small first."""
    if n < 2:
        raise ValueError(f"n is {n}; allowed: 2 or more responses")
    if largest < 1:
        raise ValueError(f"largest is {largest}; allowed: 1 or more")
    seen = set()
    for top in range(1, largest + 1):
        for code in range(top**n):
            u = tuple(Fraction(code // top**k % top + 1) for k in range(n))
            key = tuple(x / u[0] for x in u)
            if key not in seen:
                seen.add(key)
                yield u


def datasets(n: int, pairs: int) -> Iterator[tuple[tuple[int, int, Fraction], ...]]:
    """All data sets of 1 to ``pairs`` labelled pairs (winner, loser, weight 1) over ``n`` responses, smallest first."""
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}; allowed: 1 or more")
    labelled = [(i, j, Fraction(1)) for i in range(n) for j in range(n) if i != j]
    for size in range(1, pairs + 1):
        yield from combinations_with_replacement(labelled, size)
