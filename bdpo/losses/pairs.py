r"""Objectives of a winner and a loser, each pair on its own.

They differ in three places: what is compared (log-ratios, or log-probs without a reference; sums or means over
tokens), what is done with the margin (logistic, squared, hinge), and whether the likelihood of the winner is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdpo.losses._common import LENGTHS, PAIR, check_settings, minus_log_sigmoid, read


def ipo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    r"""Identity preference optimisation: the margin is regressed on a finite target.

    :math:`\mathcal{L} = \left(m - \frac{1}{2\beta}\right)^2` with
    :math:`m = \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        As in `dpo`: sums over tokens.
    beta
        The paper's :math:`\tau`, above 0, per nat. A larger beta asks for a smaller margin, :math:`\frac{1}{2\beta}`,
        and keeps the policy nearer the reference. 0.1 is customary and asks for 5 nats.

    Returns
    -------
    Tensor
        One loss a pair, at least 0, in nats squared; 0 where the margin is the target.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`.

    Notes
    -----
    Unlike with `dpo`, a margin beyond the target is pushed back. Near the target errors are relative to
    :math:`|m| + \frac{1}{2\beta}`. The equation sums over tokens; TRL, on the word of IPO's authors, divides each
    log-ratio by its length first: pass log-probs divided by the lengths to get that loss.

    Source: Eq 17 of arXiv:2310.12036v2, without the expectation.
    """
    check_settings(beta=beta)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = (win - ref_win) - (lose - ref_lose)
    return (margin - 1 / (2 * beta)).square().to(policy_chosen_logps.dtype)


def hinge(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    r"""DPO with a hinge in place of the logistic loss: pairs beyond the margin are left alone.

    :math:`\mathcal{L} = \max(0,\ 1 - \beta m)` with
    :math:`m = \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        As in `dpo`.
    beta
        Above 0, per nat. A larger beta is content with a smaller margin, :math:`\frac1\beta`.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`.

    Notes
    -----
    At the corner, :math:`m = \frac1\beta`, the derivative is taken as 0. Near it errors are relative to
    :math:`1 + |\beta m|`. The paper calls this "hinge-norm" and writes :math:`\gamma` for beta; TRL calls it "hinge",
    torchtune "RSO". For the hinge on log-probs without a reference see `slic`.

    Source: Section 3 of arXiv:2309.06657.
    """
    check_settings(beta=beta)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = (win - ref_win) - (lose - ref_lose)
    return torch.relu(1 - beta * margin).to(policy_chosen_logps.dtype)


def conservative_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    r"""Conservative DPO: DPO with smoothed labels, whose best margin is finite.

    :math:`\mathcal{L} = -(1-\varepsilon)\log\sigma(\beta m) - \varepsilon\log\sigma(-\beta m)
    = -\log\sigma(\beta m) + \varepsilon\beta m` with :math:`m` as in `dpo`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        As in `dpo`.
    label_smoothing
        :math:`\varepsilon`, the share of labels taken to be flipped, from 0 to below ½. A larger one stops earlier, at
        :math:`\beta m = \log\frac{1-\varepsilon}{\varepsilon}`; 0 gives DPO.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for a ``label_smoothing`` outside its range.

    Notes
    -----
    Computed in the second form: one logarithm, no difference of large numbers. Near the best margin the gradient's
    error is relative to :math:`\sigma(-\beta m) + \varepsilon`.

    Source: E. Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023.
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    x = beta * ((win - ref_win) - (lose - ref_lose))
    return (minus_log_sigmoid(x, x.dtype) + label_smoothing * x).to(policy_chosen_logps.dtype)


def robust_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    r"""Robust DPO: under flipped labels its mean is the DPO loss of the clean ones.

    :math:`\mathcal{L} = \frac{-(1-\varepsilon)\log\sigma(\beta m) + \varepsilon\log\sigma(-\beta m)}{1-2\varepsilon}
    = -\log\sigma(\beta m) - \frac{\varepsilon}{1-2\varepsilon}\beta m` with :math:`m` as in `dpo`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        As in `dpo`.
    label_smoothing
        :math:`\varepsilon`, the share of labels that are flipped, from 0 to below ½. A larger one pulls harder at
        pairs that are already told apart; 0 gives DPO.

    Returns
    -------
    Tensor
        One loss a pair, of either sign: without a lower bound as the margin grows.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for a ``label_smoothing`` outside its range.

    Notes
    -----
    The correction has the opposite sign of `conservative_dpo`'s: that one stops at a finite margin, this one never
    does, and its gradient in the margin keeps at least the size :math:`\frac{\beta\varepsilon}{1-2\varepsilon}`. Where
    the two terms of the value cancel, its error is relative to the sum of their sizes.

    Source: the unbiased loss of arXiv:2403.00409 (Section 3.1), computed in the second form.
    """
    check_settings(beta=beta, label_smoothing=label_smoothing)
    win, lose, ref_win, ref_lose = read(
        PAIR, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    x = beta * ((win - ref_win) - (lose - ref_lose))
    slope = label_smoothing / (1 - 2 * label_smoothing)
    return (minus_log_sigmoid(x, x.dtype) - slope * x).to(policy_chosen_logps.dtype)


def dpo_sft(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    sft_weight: float = 1.0,
) -> Tensor:
    r"""DPO with the winner's mean negative log-prob added, which holds the winner up.

    :math:`\mathcal{L} = -\log\sigma(\beta m) - \frac{\omega}{|y_w|}\log\pi(y_w)` with :math:`m` as in `dpo`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        As in `dpo`.
    chosen_lengths
        :math:`|y_w|`: the number of tokens summed over, at least 1.
    sft_weight
        :math:`\omega`, at least 0. A larger one weighs imitation of the winner more; 0 gives DPO.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for lengths below 1 and a negative ``sft_weight``.

    Notes
    -----
    The paper puts its weight on the other term: divide its loss by its :math:`\alpha`, and :math:`\omega = 1/\alpha`.
    Its response is reasoning and answer together. TRL's "rpo_alpha" was :math:`\omega`, with the mean over all tokens
    of the batch instead of a mean for every pair.

    Source: Eq 1 of arXiv:2404.19733.
    """
    check_settings(beta=beta, sft_weight=sft_weight)
    win, lose, ref_win, ref_lose, length = read(
        (*PAIR, LENGTHS[0]),
        *(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths),
    )
    x = beta * ((win - ref_win) - (lose - ref_lose))
    return (minus_log_sigmoid(x, x.dtype) - sft_weight * (win / length)).to(policy_chosen_logps.dtype)


def cpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    sft_weight: float = 1.0,
) -> Tensor:
    r"""Contrastive preference optimisation: DPO under a uniform reference, and the winner's negative log-prob.

    :math:`\mathcal{L} = -\log\sigma\big(\beta(\log\pi(y_w) - \log\pi(y_l))\big) - \omega\log\pi(y_w)`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps
        :math:`\log\pi(y_w)` and :math:`\log\pi(y_l)`: sums over tokens, in nats.
    beta
        Above 0, per nat. A larger beta saturates the first term at a smaller gap.
    sft_weight
        :math:`\omega`, at least 0. A larger one weighs imitation of the winner more; 0 leaves the contrast alone. The
        paper has 1.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for a negative ``sft_weight``.

    Notes
    -----
    The second term is the paper's: a sum over tokens. Public implementations take the mean over all tokens of the
    batch instead. For that, pass ``sft_weight=0`` and add the mean yourself.

    Source: Eq 3 of arXiv:2401.08417 and the likelihood term of its Section 3.
    """
    check_settings(beta=beta, sft_weight=sft_weight)
    win, lose = read(PAIR[:2], policy_chosen_logps, policy_rejected_logps)
    x = beta * (win - lose)
    return (minus_log_sigmoid(x, x.dtype) - sft_weight * win).to(policy_chosen_logps.dtype)


def slic(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    delta: float = 1.0,
    sft_weight: float = 0.1,
) -> Tensor:
    r"""SLiC-HF: a hinge on the gap of the log-probs, and the winner's negative log-prob.

    :math:`\mathcal{L} = \max\big(0,\ \delta - \log\pi(y_w) + \log\pi(y_l)\big) - \omega\log\pi(y_w)`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps
        :math:`\log\pi(y_w)` and :math:`\log\pi(y_l)`: sums over tokens, in nats.
    delta
        The gap asked for, in nats, at least 0. A larger delta keeps pairs in play for longer.
    sft_weight
        :math:`\omega`, at least 0. A larger one weighs imitation of the winner more; 0 leaves the hinge alone.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for a negative ``delta`` or ``sft_weight``.

    Notes
    -----
    The paper regularises on a response of its own, the target of the fine-tuning before; here that is the winner, as
    in the public implementation whose defaults these are (HALOs). At the corner the derivative of the hinge is taken
    as 0; near it errors are relative to the sizes of the terms. For the hinge on log-ratios see `hinge`.

    Source: Eq 1 of arXiv:2305.10425.
    """
    check_settings(delta=delta, sft_weight=sft_weight)
    win, lose = read(PAIR[:2], policy_chosen_logps, policy_rejected_logps)
    return (torch.relu(delta - (win - lose)) - sft_weight * win).to(policy_chosen_logps.dtype)


def simpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> Tensor:
    r"""Simple preference optimisation: mean log-probs, no reference, a target margin.

    :math:`\mathcal{L} = -\log\sigma\left(\frac{\beta}{|y_w|}\log\pi(y_w) - \frac{\beta}{|y_l|}\log\pi(y_l)
    - \gamma\right)`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps
        :math:`\log\pi(y_w)` and :math:`\log\pi(y_l)`: sums over tokens, in nats; the division is done here.
    chosen_lengths, rejected_lengths
        :math:`|y_w|` and :math:`|y_l|`: the numbers of tokens summed over, at least 1.
    beta
        Above 0, per nat a token. A larger beta saturates the loss at a smaller margin.
    gamma
        The target margin, at least 0, in the units of the reward :math:`\frac{\beta}{|y|}\log\pi(y)`, as in the paper.
        A larger gamma asks for more. The authors' code takes the ratio :math:`\gamma/\beta`, 0.25 by default, which is
        this default; TRL's "simpo_gamma" is this gamma.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for lengths below 1 and a negative ``gamma``.

    Notes
    -----
    Source: Eq 6 of arXiv:2405.14734v3.
    """
    check_settings(beta=beta, gamma=gamma)
    win, lose, length_win, length_lose = read(
        (*PAIR[:2], *LENGTHS), policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    )
    return minus_log_sigmoid(beta * (win / length_win - lose / length_lose) - gamma, policy_chosen_logps.dtype)


def orpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    odds_weight: float = 0.1,
) -> Tensor:
    r"""Odds-ratio preference optimisation: the winner's mean negative log-prob, and a logistic loss of the odds ratio.

    :math:`\mathcal{L} = -\log p_w - \lambda\log\sigma\left(\log\frac{p_w}{1-p_w} - \log\frac{p_l}{1-p_l}\right)`
    with :math:`\log p = \frac{1}{|y|}\log\pi(y)`, so that :math:`p` is the geometric mean of the tokens' probabilities

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps
        :math:`\log\pi(y_w)` and :math:`\log\pi(y_l)`: sums over tokens, in nats, below 0; the division is done here.
    chosen_lengths, rejected_lengths
        :math:`|y_w|` and :math:`|y_l|`: the numbers of tokens summed over, at least 1.
    odds_weight
        :math:`\lambda`, at least 0: "beta" in TRL and Liger, "alpha" in the authors' code. A larger one weighs the
        contrast more against imitation of the winner. It multiplies a loss and not a margin, hence the other name.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for lengths below 1, a negative ``odds_weight``, and a log-prob of exactly 0, whose odds are
        infinite.

    Notes
    -----
    The log-odds are :math:`a - \log(-\mathrm{expm1}(a))` at :math:`a = \log p`. Of the usual
    :math:`\log(1 - e^a)`, nothing is left near :math:`a = 0`: in float32 it is minus infinity from
    :math:`a \approx -3\cdot10^{-8}` on.

    Source: Eqs 6 and 7 of arXiv:2403.07691v2.
    """
    check_settings(odds_weight=odds_weight)
    win, lose, length_win, length_lose = read(
        (*PAIR[:2], *LENGTHS),
        *(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths),
        certain=False,
    )
    mean_win, mean_lose = win / length_win, lose / length_lose
    log_odds_ratio = _log_odds(mean_win) - _log_odds(mean_lose)
    contrast = minus_log_sigmoid(log_odds_ratio, log_odds_ratio.dtype)
    return (odds_weight * contrast - mean_win).to(policy_chosen_logps.dtype)


def _log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))``, accurate for p near 0 and near 1."""
    return log_p - (-torch.expm1(log_p)).log()
