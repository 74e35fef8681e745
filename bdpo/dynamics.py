r"""First-order updates of a softmax policy over :math:`n` responses under preference losses.

Every function is plain arithmetic on sequences, so it is exact on ``fractions.Fraction`` (and on SymPy expressions) and
approximate on floats. Responses are numbered from 0. Notation: :math:`p_i = \pi(y_i)` policy, :math:`q_i` reference,
:math:`u_i` utility, :math:`w_i` pair weight, :math:`\gamma = \eta g^2` step size.

Source: arXiv:2502.20847v1, Sections 4.1 and 4.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Vector = Sequence[Any]
#: (winner, loser, weight of this pair in the sum)
Pair = tuple[int, int, Any]


def mean(p: Vector, x: Vector) -> Any:
    r""":math:`\sum_i p_i x_i`."""
    return sum(a * b for a, b in zip(p, x, strict=True))


def softmax_jacobian(p: Vector) -> list[list[Any]]:
    r""":math:`\partial p_i/\partial s_j = p_i(\delta_{ij} - p_j)` (Eq 9)."""
    return [[a * ((i == j) - b) for j, b in enumerate(p)] for i, a in enumerate(p)]


def to_logits(p: Vector, gradient: Vector) -> list[Any]:
    r"""Gradient in logits from the gradient in probabilities: :math:`p_k(G_k - \sum_j p_jG_j)`.

    A constant added to all :math:`G_k` changes nothing: only the part of the gradient along the simplex acts.
    """
    centre = mean(p, gradient)
    return [a * (g - centre) for a, g in zip(p, gradient, strict=True)]


def probability_change(p: Vector, ds: Vector) -> list[Any]:
    r"""First-order change of probabilities from a change of logits: :math:`p_i(\Delta s_i - \sum_j p_j\Delta s_j)`."""
    return to_logits(p, ds)


def kappa(p: Vector, i: int, j: int, reference: Vector | None = None) -> Any:
    r"""Confidence of DPO at :math:`\beta = 1` in a pair: :math:`\kappa_{ij} = \frac{p_iq_j}{p_iq_j + p_jq_i}`.

    It is :math:`\sigma(\log\frac{p_i}{q_i} - \log\frac{p_j}{q_j})`,
    rational for rational policies; ``reference=None`` is the uniform one.
    """
    qi, qj = (1, 1) if reference is None else (reference[i], reference[j])
    return p[i] * qj / (p[i] * qj + p[j] * qi)


def pair_weights(p: Vector, pairs: Iterable[Pair], reference: Vector | None = None) -> list[Any]:
    r""":math:`w_i = \sum \tau_{ij}(1-\kappa_{ij})` over a data set: a pair adds to its winner, takes from its loser."""
    w = [0 * x for x in p]
    for winner, loser, weight in pairs:
        push = weight * (1 - kappa(p, winner, loser, reference))
        w[winner] += push
        w[loser] -= push
    return w


def alpha(p: Vector) -> list[Any]:
    r""":math:`\alpha_i = \sum_{j\ne i} p_i/(p_i+p_j)`; with utilities instead of probabilities, :math:`\beta_i`."""
    return [sum(a / (a + b) for j, b in enumerate(p) if j != i) for i, a in enumerate(p)]


def expected_pairs(u: Vector) -> list[Pair]:
    """Each pair drawn once, in both orders, weighted by how often that order is the label: :math:`u_i/(u_i+u_j)`."""
    n = len(u)
    return [(i, j, u[i] / (u[i] + u[j])) for i in range(n) for j in range(n) if i != j]
