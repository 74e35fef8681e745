r"""The six objectives that the paper compares.

With policy :math:`\pi`, reference :math:`\pi_{\mathrm{ref}}`, winner :math:`y_w` and loser :math:`y_l`, all six are

.. math:: \mathcal{L} = -\log\sigma(\beta\,m), \qquad
   m = \lambda_w \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \lambda_l \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)},

and differ in the weights :math:`\lambda_w, \lambda_l`, which may depend on the policy, and in whether these reach the
value or only the gradient.

**detach_lambda.** The paper marks one policy term as detached, in Eq 25, and does not say whether gradients pass
through :math:`\lambda`. ``True``, the default of every loss, holds :math:`\lambda` constant in the backward pass,
because the paper introduces it as a weight of gradients and only a constant is one: the gradient of the winner's
log-prob is then never positive and that of the loser's never negative, and their proportion is the one that
:math:`\lambda` says. ``False`` differentiates the formula as it stands. What this does to each loss is said in its
docstring and checked in ``tests/test_losses.py``.

Nothing is detached but :math:`\lambda` and the term that Eq 25 detaches.

Source: arXiv:2502.20847v1, Eq 1 and Section 5 (Eqs 25-29); defaults from its Appendix B, the synthetic experiment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdpo.losses._common import PAIR, check_settings, minus_log_sigmoid, read


def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Direct preference optimisation: both responses weigh the same.

    :math:`m = \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps
        :math:`\log\pi(y_w)` and :math:`\log\pi(y_l)`: sums over tokens, in nats, of any shapes that broadcast.
    ref_chosen_logps, ref_rejected_logps
        The same under the reference.
    beta
        Above 0, per nat. A larger beta saturates the loss at a smaller margin: it keeps the policy nearer the
        reference. The paper uses 1 on synthetic data and states none for language models, where 0.1 is customary.
    detach_lambda
        No effect: the weights are the constant 1. Taken so that a training loop may pass it to every loss.

    Returns
    -------
    Tensor
        One loss a pair, at least 0, in the broadcast shape and the dtype of the log-probs.

    Raises
    ------
    TypeError
        For log-probs that are not floating-point tensors of one dtype, and for settings of the wrong type.
    ValueError
        For log-probs that are positive, infinite or NaN, on different devices or of shapes that do not broadcast;
        for a ``beta`` that is not a positive finite number.

    Notes
    -----
    Source: Eq 1 of arXiv:2502.20847v1, without the expectation.
    """
    check_settings(beta=beta, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = (win - ref_win) - (lose - ref_lose)
    return minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_asym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO, asymmetric: DPO's value, the winner's gradient multiplied by :math:`\lambda \ge 1`.

    :math:`m = \lambda\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}
    - (\lambda-1)\log\frac{\bar\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)}` with :math:`\bar\pi` the detached policy and
    :math:`\lambda = 1 + \mathrm{clip}(\log\frac{\pi(y_w)}{\pi(y_l)}, 0, \Delta\lambda_{\max})`

    As printed, Eq 25 closes a parenthesis late, which puts the detached term inside the loser's logarithm; this is the
    reading that leaves the value unchanged, as the text says it should. It is computed as DPO's margin plus
    :math:`(\lambda-1)(\log\pi(y_w) - \log\bar\pi(y_w))`, so that the value is that of `dpo` to the last bit.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        As in `dpo`.
    clip
        :math:`\Delta\lambda_{\max}` in nats, at least 0. A larger clip lets :math:`\lambda` grow further; 0 gives DPO.
        The paper uses 0.5 on synthetic data and 0.3 for language models.
    detach_lambda
        No effect on value or gradient: :math:`\lambda` multiplies a difference that is always zero. Only second
        derivatives see it.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for a ``clip`` that is not a finite number of at least 0.

    Notes
    -----
    At the bounds of the clip, a tie among them, the derivative of :math:`\lambda` is that from inside.

    Source: Eqs 25 and 26 of arXiv:2502.20847v1 with :math:`\Delta\lambda_{\min} = 0`.
    """
    check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, 0.0, clip, detach_lambda)
    margin = (win - ref_win) - (lose - ref_lose) + (lam - 1) * (win - win.detach())
    return minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_sym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO, symmetric: as `nbdpo_asym`, but :math:`\lambda` may also fall below 1.

    :math:`\lambda = 1 + \mathrm{clip}(\log\frac{\pi(y_w)}{\pi(y_l)}, \frac{1}{1+\Delta\lambda_{\max}} - 1,
    \Delta\lambda_{\max})`, between :math:`\frac{1}{1+\Delta\lambda_{\max}}` and :math:`1+\Delta\lambda_{\max}`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, detach_lambda
        As in `nbdpo_asym`.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `nbdpo_asym`.

    Notes
    -----
    Source: Eqs 25 and 26 of arXiv:2502.20847v1.
    """
    check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, -clip / (1 + clip), clip, detach_lambda)
    margin = (win - ref_win) - (lose - ref_lose) + (lam - 1) * (win - win.detach())
    return minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_v2_asym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO v2, asymmetric: :math:`\lambda \ge 1` multiplies the winner's log-ratio, value included.

    :math:`m = \lambda\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}` with
    :math:`\lambda` as in `nbdpo_asym`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip
        As in `nbdpo_asym`.
    detach_lambda
        ``True``: the gradient of `nbdpo_asym`, taken at this margin. ``False``: where the clip does not bind,
        :math:`r = \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)}` joins both weights,
        :math:`\partial m/\partial\log\pi(y_w) = \lambda + r` and :math:`\partial m/\partial\log\pi(y_l) = -(1 + r)`.
        The gradient is then that of the value, which is what v2 is for; but it pushes the winner down
        once :math:`r < -\lambda` and the loser up once :math:`r < -1`, and it jumps where the clip sets in: hence the
        default.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `nbdpo_asym`.

    Notes
    -----
    At the bounds of the clip, an equal pair among them, the derivative of :math:`\lambda` is that from inside.

    Source: Eqs 26 and 27 of arXiv:2502.20847v1 with :math:`\Delta\lambda_{\min} = 0`.
    """
    check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, 0.0, clip, detach_lambda)
    margin = lam * (win - ref_win) - (lose - ref_lose)
    return minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_v2_sym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO v2, symmetric: as `nbdpo_v2_asym`, but :math:`\lambda` may also fall below 1.

    :math:`m = \lambda\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}` with
    :math:`\lambda` as in `nbdpo_sym`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, detach_lambda
        As in `nbdpo_v2_asym`.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `nbdpo_asym`.

    Notes
    -----
    Source: Eqs 26 and 27 of arXiv:2502.20847v1.
    """
    check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, -clip / (1 + clip), clip, detach_lambda)
    margin = lam * (win - ref_win) - (lose - ref_lose)
    return minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def bdpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Balanced DPO: each log-ratio is weighted by the other response's share of the total log-prob.

    :math:`m = \lambda_w\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)}
    - (1-\lambda_w)\log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}` with
    :math:`\lambda_w = \frac{\log\pi(y_l)}{\log\pi(y_w) + \log\pi(y_l)}`

    Since :math:`\lambda_w\log\pi(y_w) = (1-\lambda_w)\log\pi(y_l)`, the value depends on the policy through the ratio
    :math:`\log\pi(y_w)/\log\pi(y_l)` alone:
    :math:`m = (1-\lambda_w)\log\pi_{\mathrm{ref}}(y_l) - \lambda_w\log\pi_{\mathrm{ref}}(y_w)`.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        As in `dpo`.
    detach_lambda
        ``True``: :math:`\partial m/\partial\log\pi` is :math:`\lambda_w` for the winner, :math:`-(1-\lambda_w)` for the
        loser. ``False``: both are multiplied by
        :math:`\frac{\log\pi_{\mathrm{ref}}(y_w) + \log\pi_{\mathrm{ref}}(y_l)}{\log\pi(y_w) + \log\pi(y_l)}`. The ratio
        of the two, and all of the gradient at :math:`\pi = \pi_{\mathrm{ref}}`, are the same in either reading; but
        this factor fades as the policy's log-probs sink and grows without bound as they near 0. Hence the default.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`.

    Notes
    -----
    Where both of the policy's log-probs are exactly 0, :math:`\lambda_w` has no limit; it is taken as the constant
    :math:`\frac12`, its value for every equal pair. The gradient there is that of :math:`\lambda_w = \frac12` if
    detached, and 0 if not.

    Source: Eqs 28 and 29 of arXiv:2502.20847v1.
    """
    check_settings(beta=beta, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam_win, lam_lose = _shares(win, lose)
    margin = lam_win.detach() * (win - ref_win) - lam_lose.detach() * (lose - ref_lose)
    if not detach_lambda:
        # The same margin without the policy's log-probs, which cancel. Differentiating the line above would subtract
        # nearly equal numbers when the policy's log-probs are far from the reference's; this has terms of one sign.
        short = lam_lose * ref_lose - lam_win * ref_win
        margin = margin.detach() + (short - short.detach())
    return minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def _imbalance_ratio(win: Tensor, lose: Tensor, low: float, high: float, detach: bool) -> Tensor:
    r""":math:`\lambda` of Eq 26; at its bounds ``clamp`` has the derivative from inside."""
    lam = 1 + (win - lose).clamp(low, high)
    return lam.detach() if detach else lam


def _shares(win: Tensor, lose: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\lambda_w` of Eq 29 and :math:`1-\lambda_w`, the constants ½ where both log-probs are 0.

    Both come from the ratio of the log-prob nearer 0 to the farther one, which lies in [0, 1]: no subtraction loses
    digits, neither in the shares nor in their derivatives.
    """
    winner_nearer = lose <= win
    nearer, farther = torch.where(winner_nearer, win, lose), torch.where(winner_nearer, lose, win)
    certain = farther == 0
    ratio = torch.where(certain, 1, nearer / torch.where(certain, 1, farther))
    smaller, larger = ratio / (1 + ratio), 1 / (1 + ratio)
    return torch.where(winner_nearer, larger, smaller), torch.where(winner_nearer, smaller, larger)
