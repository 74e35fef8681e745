r"""Kahneman-Tversky optimisation: each response is judged alone, against a reference point.

:math:`1 - \sigma(x)`, the loss of a desirable response, is computed as :math:`e^{\log\sigma(-x)}`: the difference
would lose small losses, and the derivative :math:`\sigma(1-\sigma)` of a plain sigmoid loses large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bdpo.losses._common import PAIR, check_settings, read


def kto(
    policy_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""Kahneman-Tversky optimisation of single responses that are labelled desirable or undesirable.

    :math:`\mathcal{L} = \lambda_D\,\sigma\big(\beta(z_0 - r)\big)` for a desirable response,
    :math:`\lambda_U\,\sigma\big(\beta(r - z_0)\big)` for an undesirable one, with
    :math:`r = \log\frac{\pi(y)}{\pi_{\mathrm{ref}}(y)}`

    Parameters
    ----------
    policy_logps, ref_logps
        :math:`\log\pi(y)` and :math:`\log\pi_{\mathrm{ref}}(y)`: sums over tokens, in nats.
    desirable
        A bool for every response.
    kl
        The reference point :math:`z_0`, at least 0, in nats: what :func:`kto_kl` estimates. It is detached. A larger
        one makes desirable responses look worse and undesirable ones better.
    beta
        Above 0, per nat. A larger beta saturates the loss nearer to the reference point.
    desirable_weight, undesirable_weight
        :math:`\lambda_D` and :math:`\lambda_U`, at least 0, to make up for an imbalance of the labels.

    Returns
    -------
    Tensor
        One loss a response, between 0 and its weight.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for labels that are not bool, a negative ``kl`` and negative weights.

    Notes
    -----
    The gradient vanishes on both sides: a response far on the wrong side is given up as noise. Returned is
    :math:`\lambda_y - v(x, y)` in the paper's notation.

    Source: Eq 8 of arXiv:2402.01306v4.
    """
    check_settings(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    policy, ref, desirable, kl = read(
        ("policy_logps", "ref_logps", "desirable", "kl"), policy_logps, ref_logps, desirable, kl
    )
    gain = beta * ((policy - ref) - kl.detach())
    weight = torch.where(desirable, desirable_weight, torch.full_like(gain, undesirable_weight))  # not in float32
    return (weight * logsigmoid(torch.where(desirable, -gain, gain)).exp()).to(policy_logps.dtype)


def kto_kl(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    r"""The reference point of KTO from mismatched responses: their mean log-ratio, at least 0, without a gradient.

    :math:`z_0 = \max\left(0,\ \frac1n\sum_i \log\frac{\pi(y_i' \mid x_i)}{\pi_{\mathrm{ref}}(y_i' \mid x_i)}\right)`,
    where :math:`y_i'` belongs to another prompt than :math:`x_i`

    Parameters
    ----------
    policy_logps, ref_logps
        Log-probs of responses that were shifted by one prompt within the batch, sums over tokens.

    Returns
    -------
    Tensor
        A scalar in the dtype of the log-probs, detached: what `kto` takes as ``kl``. Under data parallelism, average
        the log-ratios over all processes first.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for an empty batch, which has no mean.

    Notes
    -----
    It estimates a divergence only in spirit: :math:`y'` is not drawn from the policy, so the mean can be negative,
    hence the clamp.

    Source: Section 4 of arXiv:2402.01306v4.
    """
    policy, ref = read(("policy_logps", "ref_logps"), policy_logps, ref_logps)
    ratios = policy - ref
    if ratios.numel() == 0:
        raise ValueError("policy_logps is empty: a mean needs at least one mismatched response")
    return ratios.detach().mean().clamp(min=0).to(policy_logps.dtype)


def kto_pair(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    detach_kl: bool = True,
) -> Tensor:
    r"""KTO on a batch of pairs, the winners' reference point estimated from the losers and the other way round.

    :math:`\mathcal{L} = \tfrac12\sigma\big(\beta(z_l - r_w)\big) + \tfrac12\sigma\big(\beta(r_l - z_w)\big)` with the
    log-ratios :math:`r_w, r_l` and :math:`z_w = \max(0, \overline{r_w})`, :math:`z_l = \max(0, \overline{r_l})`,
    means over all pairs given

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        As in `dpo`. All pairs that are passed together make up the batch of the two means.
    beta
        Above 0, per nat. A larger beta saturates the loss nearer to the reference points.
    detach_kl
        ``True``: the reference points are constants, as the KTO paper says of its own. ``False``: gradients pass
        through them, as they did in the code that this loss comes from; a winner's log-prob is then also
        raised by the losers' losses, through :math:`z_w`.

    Returns
    -------
    Tensor
        One loss a pair, between 0 and 1: the mean of the losses of its two responses.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`.

    Notes
    -----
    A pair sees its batch, through two means: it is not the same over a batch of 8 and over twice 4, and under
    ``torch.func.vmap`` every mapped pair is a batch of its own. With gradients through the means, the errors of the
    gradients are relative to the sum of the sizes of the terms.

    The public implementations (the first SimpleKTO trainer of HALOs; TRL's "kto_pair", removed in 2024) keep the
    gradient and return the two halves one after the other, so that their mean is the mean of this. The KTO authors
    withdrew the loss from their paper in favour of `kto`: pairs share a prompt, which biases the estimate.

    Source: Eq 7 of the first KTO report (HALOs repository, December 2023).
    """
    check_settings(beta=beta, detach_kl=detach_kl)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    r_win, r_lose = torch.broadcast_tensors(win - ref_win, lose - ref_lose)
    z_win, z_lose = r_win.mean().clamp(min=0), r_lose.mean().clamp(min=0)
    if detach_kl:
        z_win, z_lose = z_win.detach(), z_lose.detach()
    losses = logsigmoid(beta * (z_lose - r_win)).exp() + logsigmoid(beta * (r_lose - z_win)).exp()
    return (losses / 2).to(policy_chosen_logps.dtype)
