r"""The gradient of a pair loss in probabilities, log-probabilities and logits, and how unequal its two parts are.

The same loss has another gradient in each coordinate, so "which response is pulled harder" has an answer only once the
coordinate is named. From :math:`g_y = \partial L/\partial\log\pi(y)` for winner and loser alone,

==================  =====================================================
coordinate          derivative for a response :math:`y` of the pair
==================  =====================================================
``"probability"``   :math:`g_y/\pi(y)`
``"log"``           :math:`g_y`
``"logit"``         :math:`g_y - \pi(y)\,(g_w + g_l)`
==================  =====================================================

Source: Definition 1 (Eq 8), arXiv:2502.20847v1; Lemma 1 (Eq 9) for the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

COORDINATES = ("probability", "log", "logit")


def _known(coordinate: str) -> None:
    if coordinate not in COORDINATES:
        raise ValueError(f"coordinate is {coordinate!r}; allowed: {', '.join(COORDINATES)}")


def convert(g_w: Any, g_l: Any, p_w: Any, p_l: Any, coordinate: str) -> tuple[Any, Any]:
    r"""Derivatives in a coordinate, from those in log-probabilities.

    :math:`\frac{\partial L}{\partial\pi} = \frac{g}{\pi},\qquad \frac{\partial L}{\partial s} = g - \pi\,(g_w+g_l)`

    Plain arithmetic: exact on fractions and SymPy expressions, elementwise on tensors.

    Source: Lemma 1, arXiv:2502.20847v1.

    Parameters
    ----------
    g_w, g_l
        :math:`\partial L/\partial\log\pi` of winner and loser.
    p_w, p_l
        Their probabilities, positive.
    coordinate
        ``"probability"``, ``"log"`` or ``"logit"``. The logit of any third response :math:`k` has the derivative
        :math:`-\pi_k\,(g_w+g_l)`.

    Returns
    -------
    tuple
        The derivatives of winner and loser.

    Raises
    ------
    ValueError
        If the coordinate is unknown.
    """
    _known(coordinate)
    if coordinate == "probability":
        return g_w / p_w, g_l / p_l
    if coordinate == "log":
        return g_w, g_l
    return g_w - p_w * (g_w + g_l), g_l - p_l * (g_w + g_l)


def category(winner: Any, loser: Any) -> str:
    r"""The word of Definition 1 for one pair of derivatives, taken to the letter.

    balanced if :math:`\partial_w+\partial_l = 0`; else positively imbalanced if :math:`|\partial_w| > |\partial_l|`;
    else negatively imbalanced

    Source: Definition 1, arXiv:2502.20847v1.

    Parameters
    ----------
    winner, loser
        The two derivatives, in whatever coordinate; exact numbers, since balance is an equality.

    Returns
    -------
    str
        ``"balanced"``, ``"positively imbalanced"`` or ``"negatively imbalanced"``.
    """
    if winner + loser == 0:
        return "balanced"
    return "positively imbalanced" if abs(winner) > abs(loser) else "negatively imbalanced"


def gradient(
    loss: Callable[..., Tensor],
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    coordinate: str = "log",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    r"""Derivatives of each pair's loss for its winner and its loser, by automatic differentiation in that coordinate.

    :math:`\left(\frac{\partial L}{\partial c(y_w)},\ \frac{\partial L}{\partial c(y_l)}\right)`, where :math:`c` is
    :math:`\pi`, :math:`\log\pi` or :math:`s`

    Source: Definition 1, arXiv:2502.20847v1.

    Parameters
    ----------
    loss
        Takes the four log-probabilities and ``options``, returns one loss a pair, as those of :mod:`bdpo.losses`.
    chosen, rejected, ref_chosen, ref_rejected
        Log-probabilities in nats, of one shape or broadcastable.
    coordinate
        ``"probability"`` treats :math:`\pi(y_w), \pi(y_l)` as independent, which they are if there is a third response;
        ``"logit"`` puts the rest :math:`1-\pi(y_w)-\pi(y_l)` on a third response.
    **options
        Passed to the loss, such as ``beta=0.1``.

    Returns
    -------
    tuple of Tensor
        The derivatives, of the pairs' common shape.

    Raises
    ------
    ValueError
        If the coordinate is unknown, a probability is 0 in this floating-point format, or a pair has more than all of
        the probability.
    """
    import torch

    _known(coordinate)
    *logps, ref_chosen, ref_rejected = torch.broadcast_tensors(
        chosen.detach(), rejected.detach(), ref_chosen, ref_rejected
    )
    p_w, p_l = (x.exp() for x in logps)
    if coordinate == "log":
        leaves = [x.clone().requires_grad_() for x in logps]
        policy = leaves
    elif coordinate == "probability":
        if bool(((p_w == 0) | (p_l == 0)).any()):
            least = float(torch.minimum(logps[0], logps[1]).min())
            raise ValueError(
                f"a log-probability is {least:g}, whose probability is 0 in {p_w.dtype}; differentiate in the log "
                "coordinate and compare sizes with log_ratio(), which needs no probability"
            )
        leaves = [x.clone().requires_grad_() for x in (p_w, p_l)]
        policy = [x.log() for x in leaves]
    else:
        most = float((p_w + p_l).max())
        if most > 1 + 1e-6:
            raise ValueError(f"chosen and rejected have probability {most:g} together; allowed: up to 1")
        rest = (1 - p_w - p_l).clamp(min=0).log()
        leaves = [x.clone().requires_grad_() for x in (*logps, rest)]
        policy = list(torch.stack(leaves, -1).log_softmax(-1).unbind(-1))[:2]
    total = loss(policy[0], policy[1], ref_chosen, ref_rejected, **options).sum()
    winner, loser = torch.autograd.grad(total, leaves[:2])
    return winner, loser


def log_ratio(g_w: Tensor, g_l: Tensor, chosen: Tensor, rejected: Tensor, *, coordinate: str = "probability") -> Tensor:
    r"""How much harder the winner is pulled than the loser, in nats.

    :math:`\log\left|\frac{\partial L}{\partial c(y_w)}\right| - \log\left|\frac{\partial L}{\partial c(y_l)}\right|`

    Positive: the winner's derivative is larger ("positively imbalanced"); 0: equal sizes; negative: the loser's. Works
    on log-probabilities whose probabilities are 0 in floating point.

    Source: Definition 1 and Eq 2, arXiv:2502.20847v1.

    Parameters
    ----------
    g_w, g_l
        :math:`\partial L/\partial\log\pi` of winner and loser, as :func:`gradient` returns them.
    chosen, rejected
        The policy's log-probabilities, in nats.
    coordinate
        In which coordinate the sizes are compared.

    Returns
    -------
    Tensor
        One number a pair; infinite if just one derivative is 0, NaN if both are.

    Raises
    ------
    ValueError
        If the coordinate is unknown.
    """
    winner, loser = _log_sizes(g_w, g_l, chosen, rejected, coordinate)
    return winner - loser


def mean_log_ratio(
    g_w: Tensor, g_l: Tensor, chosen: Tensor, rejected: Tensor, *, coordinate: str = "probability"
) -> Tensor:
    r"""The same for a whole data set: the sizes are averaged over the pairs before they are compared.

    :math:`\log\mathbb{E}\left|\frac{\partial L}{\partial c(y_w)}\right|
    - \log\mathbb{E}\left|\frac{\partial L}{\partial c(y_l)}\right|`

    For a loss that falls in the winner and rises in the loser its sign is the class of Definition 1 in expectation. In
    probabilities one very unlikely response can decide it, because its pair counts :math:`1/\pi` times.

    Source: Definition 1 (Eq 8), arXiv:2502.20847v1.

    Parameters
    ----------
    g_w, g_l, chosen, rejected, coordinate
        As for :func:`log_ratio`; the mean runs over all pairs.

    Returns
    -------
    Tensor
        One number.

    Raises
    ------
    ValueError
        If the coordinate is unknown or there is no pair.
    """
    winner, loser = _log_sizes(g_w, g_l, chosen, rejected, coordinate)
    if winner.numel() == 0:
        raise ValueError("there is no pair to average over; give at least 1")
    return winner.flatten().logsumexp(0) - loser.flatten().logsumexp(0)


def _log_sizes(g_w: Tensor, g_l: Tensor, chosen: Tensor, rejected: Tensor, coordinate: str) -> tuple[Tensor, Tensor]:
    """Logarithms of the sizes of both derivatives."""
    _known(coordinate)
    if coordinate == "probability":
        return g_w.abs().log() - chosen, g_l.abs().log() - rejected
    winner, loser = convert(g_w, g_l, chosen.exp(), rejected.exp(), coordinate)
    return winner.abs().log(), loser.abs().log()
