r"""Finite laws, and three draws that stand for all of them.

A mean over independent copies :math:`X, Y, Z` of one random variable is the mean of what three draws give, averaged
over their six orders. An inequality between such means therefore holds for *every* law as soon as it holds for any
three draws, sorted and written as a ladder of steps; that is a question about polynomials.

The layer-cake argument compares :math:`\tfrac12\mathbb{E}[(\varphi(X)-\varphi(Y))^2\max\{\psi(X),\psi(Y)\}]` with
:math:`\mathbb{E}[\psi]\operatorname{Var}[\varphi]`. Its stages are computed here twice, by unrelated routes: on three
symbolic draws, and on a finite law with thresholds and conditional means as one would write them down.

Source: arXiv:2502.20847v1, Appendix D, proofs of Lemmas 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise, permutations, product
from typing import Any

import sympy as sp

from bdpo import worlds

#: The stages of the layer-cake argument, in its order. Only the step to ``unconditional`` loses anything.
STAGES = (
    "squares",
    "integral inside",
    "integral outside",
    "factorised",
    "unconditional",
    "constant out",
    "indicator",
    "exchanged",
    "half squares",
    "variance",
)


def three_draws(kernel: Callable[[int, int, int], Any]) -> Any:
    r"""Mean of a kernel over the six orders of three draws.

    ``kernel(x, y, z)`` gets the numbers 0, 1, 2 of the draws in each order. If the draws are independent copies, the
    mean of the result is :math:`\mathbb{E}[\text{kernel}(X, Y, Z)]`: an unbiased estimate, whatever the law.
    """
    return Fraction(1, 6) * sum(kernel(*order) for order in permutations(range(3)))


def ladder(name: str, *steps: str) -> list[sp.Expr]:
    """Values of an increasing positive function at three sorted draws: a foot, and one positive step after the other.

    A polynomial inequality with coefficients of one sign survives when steps shrink to zero, so ties are included.
    """
    values = [sp.Symbol(name, positive=True)]
    for step in steps:
        values.append(values[-1] + sp.Symbol(step, positive=True))
    return values


def stages_of_draws(phi: Sequence[Any], psi: Sequence[Any]) -> dict[str, Any]:
    r"""The stages for three sorted draws.

    Parameters
    ----------
    phi, psi
        Values of the two increasing functions at the three draws, in increasing order.

    Returns
    -------
    dict
        Stage by name. Double integrals are SymPy integrals where they stand inside the mean, and sums over the cells
        between the draws' values where the mean stands inside.
    """
    r, s = sp.symbols("r s", real=True)
    half = sp.Rational(1, 2)
    cells = [
        (min(a, b), max(a, b), (phi[a + 1] - phi[a]) * (phi[b + 1] - phi[b])) for a, b in product(range(2), repeat=2)
    ]

    def square(i: int, j: int, inside: Any) -> Any:
        return sp.Integral(inside, (r, phi[i], phi[j]), (s, phi[i], phi[j])) if i < j else sp.Integer(0)

    def integral(weight: Callable[[int, int, int], Any]) -> Any:
        """Integral of the mean of ``weight`` where X lies below both thresholds and Y above."""

        def on_cell(low: int, high: int) -> Any:
            return three_draws(lambda i, j, k: int(i <= low) * int(j > high) * weight(i, j, k))

        return sum(area * on_cell(low, high) for low, high, area in cells)

    def plane(i: int, j: int) -> Any:
        return sum(area * int(i <= low and j > high) for low, high, area in cells)

    return {
        "squares": three_draws(lambda i, j, k: half * (phi[i] - phi[j]) ** 2 * psi[max(i, j)]),
        "integral inside": three_draws(lambda i, j, k: square(i, j, psi[max(i, j)])),
        "integral outside": integral(lambda i, j, k: psi[max(i, j)]),
        "factorised": integral(lambda i, j, k: psi[j]),
        "unconditional": integral(lambda i, j, k: psi[k]),
        "constant out": three_draws(lambda i, j, k: psi[k] * plane(i, j)),
        "indicator": three_draws(lambda i, j, k: psi[k] * plane(i, j)),
        "exchanged": three_draws(lambda i, j, k: psi[k] * square(i, j, sp.Integer(1))),
        "half squares": three_draws(lambda i, j, k: psi[k] * half * (phi[i] - phi[j]) ** 2),
        "variance": three_draws(lambda i, j, k: psi[k] * (phi[i] ** 2 - phi[i] * phi[j])),
    }


def mean(p: Sequence[Any], values: Sequence[Any]) -> Any:
    r""":math:`\mathbb{E}[h(X)]` of a finite law with probabilities ``p``."""
    return sum(a * x for a, x in zip(p, values, strict=True))


def covariance(p: Sequence[Any], x: Sequence[Any], y: Sequence[Any]) -> Any:
    r""":math:`\operatorname{Cov}[x, y]` of a finite law with probabilities ``p``."""
    return mean(p, [a * b for a, b in zip(x, y, strict=True)]) - mean(p, x) * mean(p, y)


def stages_of_law(p: Sequence[Fraction], phi: Sequence[Fraction], psi: Sequence[Fraction]) -> dict[str, Fraction]:
    r"""The stages on a finite law, with the paper's thresholds :math:`r, s` and conditional means.

    The integrands are constant on the cells between the values of :math:`\varphi`, so each integral is a finite sum
    over midpoints of cells; there the condition of each conditional mean has positive probability.

    Parameters
    ----------
    p
        Probabilities of the atoms, all positive.
    phi, psi
        Values at the atoms. They need not be monotone: without that, some stages differ where they should agree.
    """
    atoms = range(len(p))
    cells = [((a + b) / 2, b - a) for a, b in pairwise(sorted(set(phi)))]
    thresholds = [(min(r, s), max(r, s), dr * ds) for r, dr in cells for s, ds in cells]

    def copies(kernel: Callable[[int, int], Any]) -> Fraction:
        return sum((p[i] * p[j] * kernel(i, j) for i in atoms for j in atoms), Fraction(0))

    def integral(integrand: Callable[[Fraction, Fraction], Any]) -> Fraction:
        return sum((area * integrand(low, high) for low, high, area in thresholds), Fraction(0))

    def inside(i: int, j: int, low: Fraction, high: Fraction) -> bool:
        return phi[i] <= low and high <= phi[j]

    def below(low: Fraction) -> Fraction:
        return mean(p, [x <= low for x in phi])

    def above(high: Fraction) -> Fraction:
        return mean(p, [x >= high for x in phi])

    def given_above(high: Fraction) -> Fraction:
        return mean(p, [y * (x >= high) for x, y in zip(phi, psi, strict=True)]) / above(high)

    average = mean(p, psi)
    return {
        "squares": copies(lambda i, j: (phi[i] - phi[j]) ** 2 * max(psi[i], psi[j])) / 2,
        "integral inside": copies(
            lambda i, j: integral(lambda low, high: max(psi[i], psi[j]) * inside(i, j, low, high))
        ),
        "integral outside": integral(
            lambda low, high: copies(lambda i, j: max(psi[i], psi[j]) * inside(i, j, low, high))
        ),
        "factorised": integral(lambda low, high: below(low) * above(high) * given_above(high)),
        "unconditional": integral(lambda low, high: below(low) * above(high) * average),
        "constant out": average * integral(lambda low, high: below(low) * above(high)),
        "indicator": average * integral(lambda low, high: copies(lambda i, j: inside(i, j, low, high))),
        "exchanged": average * copies(lambda i, j: integral(lambda low, high: inside(i, j, low, high))),
        "half squares": average * copies(lambda i, j: (phi[i] - phi[j]) ** 2) / 2,
        "variance": average * covariance(p, phi, phi),
    }


def monotone(n: int, denominator: int, largest: int) -> Iterator[dict[str, tuple[Fraction, ...]]]:
    """Laws on ``n`` atoms with two increasing functions on them, ties and zeros included, the simplest first.

    Parameters
    ----------
    n
        Number of atoms, 2 or more.
    denominator
        Probabilities have denominators up to this.
    largest
        The functions take whole values from 0 to this, in increasing (not strictly increasing) order.

    Yields
    ------
    dict
        ``p`` probabilities, ``f`` and ``g`` values.
    """
    steps = [tuple(map(Fraction, values)) for values in combinations_with_replacement(range(largest + 1), n)]
    steps.sort(key=lambda values: (values[-1], values))
    for p in worlds.policies(n, denominator):
        for f in steps:
            for g in steps:
                yield {"p": p, "f": f, "g": g}
