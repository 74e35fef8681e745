r"""The Gaussian world of the paper's simulation: responses on a line, a Gaussian policy, a Gaussian utility.

A response is a number :math:`y`; a finite set of them can be drawn. The policy is proportional to
:math:`e^{-(y-\mu_P)^2/2\sigma_P^2}`, the utility to :math:`e^{-(y-\mu_Q)^2/2\sigma_Q^2}`, and labels follow
:math:`P(y \succ z) = u(y)/(u(y)+u(z))`. What is computed is defined between the responses as well: a curve at :math:`y`
is the value that a response placed there would have, the others staying as they are.

Source: Section 4.2, Eqs 15-17 and Figure 1, arXiv:2502.20847v1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

Array = NDArray[np.float64]

#: The response set of the paper's Figure 1.
RESPONSES = tuple(range(100))
SAMPLING = ("uniform", "shiftless")
REFERENCE = ("none", "policy")


class Extremum(NamedTuple):
    """A local extremum of a curve: ``kind`` is ``"max"`` or ``"min"``."""

    kind: str
    y: float
    value: float


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))  # overflows nowhere


def curves(
    mu_p: float,
    mu_q: float,
    sigma_p: float,
    sigma_q: float,
    *,
    sampling: str = "uniform",
    reference: str = "none",
    at: ArrayLike | None = None,
    responses: Sequence[float] = RESPONSES,
) -> dict[str, Array]:
    r"""The curves of Figure 1 and the first-order updates that they stand for.

    With preference :math:`b = u(y)/(u(y)+u(z))` and the policy's own :math:`\kappa` (DPO at :math:`\beta = 1`),

    - ``w``: :math:`w(y) = \sum_z \rho(y, z)\,\big(b(y, z) - \kappa(y, z)\big)`, the sum over all responses;
    - ``wp``: :math:`w(y)\,\pi(y)`;
    - ``dpo``: the update of DPO divided by :math:`\gamma`, :math:`\pi(y)\,(w(y) - \bar w)`, where
      :math:`\bar w = \sum_z \pi(z) w(z)`;
    - ``balanced``: the update of the linear balanced loss with all logits,
      :math:`\pi(y)\,\big(\pi(y)(w(y) - \bar w) - \sum_z \pi(z)^2(w(z) - \bar w)\big)`;
    - ``eq14``: what the paper's Eq 14 keeps of it, :math:`\pi(y)\,\big(\pi(y)w(y) - \sum_z \pi(z)^2w(z)\big)`.

    Parameters
    ----------
    mu_p, mu_q
        Modes of policy and utility, on the scale of the responses.
    sigma_p, sigma_q
        Their widths (standard deviations), above 0. A larger one makes a flatter curve.
    sampling
        How pairs are drawn: ``"uniform"`` weighs each by :math:`\rho = 1`, ``"shiftless"`` by
        :math:`\rho = \pi(y)\pi(z)`.
    reference
        ``"none"``: a uniform reference, :math:`\kappa = \pi(y)/(\pi(y)+\pi(z))`, as in the paper's Section 4.3.
        ``"policy"``: the reference is the policy itself, as at the first step of DPO, and :math:`\kappa = 1/2`.
    at
        Where the curves are wanted; the responses by default.
    responses
        Finitely many different numbers, at least two.

    Returns
    -------
    dict
        Arrays by name: ``y``, the policy ``p`` and the normalised utility ``q`` (both add up to 1 over the responses),
        and the five curves above.

    Raises
    ------
    ValueError
        If a width is not positive, a number is not finite, an option is unknown, or there are fewer than two responses.

    Notes
    -----
    Source: Eqs 12, 14-17 and Figure 1, arXiv:2502.20847v1.
    """
    for name, number in {"mu_p": mu_p, "mu_q": mu_q, "sigma_p": sigma_p, "sigma_q": sigma_q}.items():
        if not math.isfinite(number) or (name.startswith("sigma") and number <= 0):
            wanted = "a finite number above 0" if name.startswith("sigma") else "a finite number"
            raise ValueError(f"{name} is {number!r}; it must be {wanted}")
    for name, option, allowed in (("sampling", sampling, SAMPLING), ("reference", reference, REFERENCE)):
        if option not in allowed:
            raise ValueError(f"{name} is {option!r}; it must be one of {', '.join(map(repr, allowed))}")
    z = np.asarray(responses, dtype=float)
    if z.ndim != 1 or len(np.unique(z)) != z.size or z.size < 2 or not np.isfinite(z).all():
        raise ValueError(f"responses are {responses!r}; give a list of at least two different finite numbers")
    y = z if at is None else np.asarray(at, dtype=float)

    def log_p(x: Array) -> Array:
        return -((x - mu_p) ** 2) / (2 * sigma_p**2)

    def log_u(x: Array) -> Array:
        return -((x - mu_q) ** 2) / (2 * sigma_q**2)

    def normalised(log: Callable[[Array], Array], x: Array) -> Array:
        top = log(z).max()  # else all of a narrow curve can underflow
        return np.exp(log(x) - top) / np.exp(log(z) - top).sum()

    def weight(x: Array) -> Array:
        wanted = _sigmoid(log_u(x)[:, None] - log_u(z))
        given = _sigmoid(log_p(x)[:, None] - log_p(z)) if reference == "none" else np.full(wanted.shape, 0.5)
        if sampling == "uniform":
            return (wanted - given).sum(1)
        return normalised(log_p, x) * ((wanted - given) * normalised(log_p, z)).sum(1)

    p_z, w_z = normalised(log_p, z), weight(z)
    p, w, centre = normalised(log_p, y), weight(y), p_z @ w_z
    return {
        "y": y,
        "p": p,
        "q": normalised(log_u, y),
        "w": w,
        "wp": w * p,
        "dpo": p * (w - centre),
        "balanced": p * (p * (w - centre) - p_z**2 @ (w_z - centre)),
        "eq14": p * (p * w - p_z**2 @ w_z),
    }


def extrema(curve: Callable[[Array], Array], low: float, high: float, steps: int = 800) -> list[Extremum]:
    """The local extrema of a smooth curve strictly inside an interval, from left to right.

    Signs of differences on a grid bracket them, bounded minimisation finds them. An extremum narrower than two steps of
    the grid can be missed; one that rises above its surroundings by less than 1e-12 of the curve's largest value is
    taken for rounding.

    Parameters
    ----------
    curve
        Maps an array of positions to the array of values.
    low, high
        The interval.
    steps
        Number of steps of the grid, at least 2.
    """
    if not low < high:
        raise ValueError(f"the interval from {low} to {high} is empty; low must be below high")
    if steps < 2:
        raise ValueError(f"steps is {steps}; it must be at least 2")
    y = np.linspace(low, high, steps + 1)
    values = curve(y)
    slopes = np.diff(values)
    slopes[np.abs(slopes) < 1e-12 * np.abs(values).max()] = 0
    moving = np.flatnonzero(slopes)
    found = []
    for left, right in pairwise(moving):
        if slopes[left] * slopes[right] < 0:
            sign = -1.0 if slopes[left] > 0 else 1.0
            best = minimize_scalar(
                lambda x, sign=sign: sign * curve(np.array([x]))[0],
                bounds=(y[left], y[right + 1]),
                method="bounded",
                options={"xatol": 1e-10},
            )
            found.append(Extremum("max" if sign < 0 else "min", float(best.x), float(sign * best.fun)))
    return found


def beyond(y: ArrayLike, values: ArrayLike, centres: Sequence[float], distance: float) -> float:
    r"""The share of :math:`\sum|v|` that lies farther than ``distance`` from every centre.

    Parameters
    ----------
    y, values
        Positions and values, such as the responses and an update.
    centres
        Positions from which distance is measured.
    distance
        On the scale of ``y``, at least 0. A larger one leaves less outside.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If no centre is given, the distance is negative, or all values are 0.
    """
    if not centres:
        raise ValueError("centres is empty; give at least one position")
    if not distance >= 0:
        raise ValueError(f"distance is {distance!r}; it must be at least 0")
    size, place = np.abs(np.asarray(values, dtype=float)), np.asarray(y, dtype=float)
    if not size.sum() > 0:
        raise ValueError("values are all 0; there is nothing to share out")
    outside = np.all([np.abs(place - c) > distance for c in centres], axis=0)
    return float(size[outside].sum() / size.sum())
