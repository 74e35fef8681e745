r"""Objectives that adapt to the margins of the batch: α-DPO shifts the target, β-DPO scales β.

Both keep running statistics of the margin in their authors' code. Here these are arguments: the caller updates them,
``mean = 0.9 * mean + 0.1 * margins.mean()`` and the same with the standard deviation, and passes them in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdpo.losses._common import LENGTHS, PAIR, check_settings, minus_log_sigmoid, read


def log_ratio_margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    r"""The margin whose statistics `alpha_dpo` and `beta_dpo` take: the difference of the two log-ratios.

    :math:`m = r_w - r_l` with :math:`r = \log\frac{\pi(y)}{\pi_{\mathrm{ref}}(y)}`, each divided by its length if
    lengths are given

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        As in `dpo`.
    chosen_lengths, rejected_lengths
        Numbers of tokens, both or neither: pass them for `alpha_dpo`, leave them out for `beta_dpo`.

    Returns
    -------
    Tensor
        One margin a pair, in nats (a token, with lengths), detached.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also if one of the lengths is given without the other.
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise TypeError("chosen_lengths and rejected_lengths go together: pass both, or neither")
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if chosen_lengths is None or rejected_lengths is None:
        win, lose, ref_win, ref_lose = read(PAIR, *logps)
        return ((win - ref_win) - (lose - ref_lose)).detach().to(policy_chosen_logps.dtype)
    win, lose, ref_win, ref_lose, length_win, length_lose = read(
        (*PAIR, *LENGTHS), *logps, chosen_lengths, rejected_lengths
    )
    margin = (win - ref_win) / length_win - (lose - ref_lose) / length_lose
    return margin.detach().to(policy_chosen_logps.dtype)


def alpha_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    margin_mean: Tensor,
    margin_std: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    r"""α-DPO: SimPO whose target margin is larger for pairs that the policy already tells apart.

    :math:`\mathcal{L} = -\log\sigma\Big(\beta u - \mathrm{sg}\big[\gamma + \alpha\,\tfrac{m - \mu}{s}\big]\Big)` with
    :math:`u = \frac{\log\pi(y_w)}{|y_w|} - \frac{\log\pi(y_l)}{|y_l|}` and
    :math:`m = \frac1{|y_w|}\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)}
    - \frac1{|y_l|}\log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}`; sg stops the gradient

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        As in `dpo`: sums over tokens; the division is done here.
    chosen_lengths, rejected_lengths
        :math:`|y_w|` and :math:`|y_l|`: the numbers of tokens summed over, at least 1.
    margin_mean, margin_std
        :math:`\mu` and :math:`s > 0`: running mean and standard deviation of :math:`m`, which `log_ratio_margin`
        computes when lengths are passed to it. Scalars, in nats a token.
    beta, gamma
        As in `simpo`.
    alpha
        At least 0, in units of the target margin a standard deviation. A larger alpha spreads the targets further; 0
        gives SimPO.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for lengths below 1, a ``margin_std`` that is not positive, a negative ``alpha`` or ``gamma``.

    Notes
    -----
    The whole target is a constant of the backward pass, so the gradient is that of SimPO at another margin, and not
    that of the value. The authors' code multiplies the whole target by beta: its :math:`\alpha` is this one divided by
    beta, its "gamma_beta_ratio" this gamma divided by beta. The default of ``alpha`` is our choice.

    Source: the final objective of arXiv:2410.10148v4 (AlphaDPO), stop-gradient and normalisation as there.
    """
    check_settings(beta=beta, gamma=gamma, alpha=alpha)
    win, lose, ref_win, ref_lose, length_win, length_lose, mean, std = read(
        (*PAIR, *LENGTHS, "margin_mean", "margin_std"),
        *(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps),
        *(chosen_lengths, rejected_lengths, margin_mean, margin_std),
    )
    gap = win / length_win - lose / length_lose
    margin = (win - ref_win) / length_win - (lose - ref_lose) / length_lose
    target = (gamma + alpha * ((margin - mean) / std)).detach()
    return minus_log_sigmoid(beta * gap - target, policy_chosen_logps.dtype)


def beta_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    margin_mean: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    beta_min: float = 1e-3,
) -> Tensor:
    r"""β-DPO: DPO whose β grows with the mean margin of the batch.

    :math:`\mathcal{L} = -\log\sigma(\beta_B m)` with :math:`m` as in `dpo` and
    :math:`\beta_B = \mathrm{sg}\big[\max\big(\beta_{\min},\ \beta\,(1 + \alpha(\overline{m} - \mu))\big)\big]`, where
    :math:`\overline{m}` is the mean over all pairs given; sg stops the gradient

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        As in `dpo`. All pairs that are passed together make up the batch of :math:`\overline{m}`; select them with
        `beta_dpo_filter` first if outliers are to be left out.
    margin_mean
        :math:`\mu`, the paper's :math:`M_0`: the running mean of :math:`m`, a scalar in nats.
    beta
        Above 0, per nat: the β of a batch whose mean margin is :math:`\mu`.
    alpha
        At least 0, per nat. A larger alpha lets β follow the batch further; 0 gives DPO.
    beta_min
        The floor of :math:`\beta_B`, above 0. The formula alone goes negative, which would turn preferences round.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for a ``margin_mean`` that is not finite, a negative ``alpha``, a ``beta_min`` not above 0.

    Notes
    -----
    A pair sees its batch, through one mean: it is not the same over a batch of 8 and over twice 4, and under
    ``torch.func.vmap`` every mapped pair is a batch of its own. Under data parallelism the mean is that of the
    process's pairs, where the authors gather all. As in their code the margin has no factor beta, the floor is 1e-3,
    and the example setting of ``alpha`` is 0.6.

    Source: the batch-level β of arXiv:2407.08639, stop-gradient and floor from the authors' code.
    """
    check_settings(beta=beta, alpha=alpha, beta_min=beta_min)
    win, lose, ref_win, ref_lose, mean = read(
        (*PAIR, "margin_mean"),
        *(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, margin_mean),
    )
    margin = (win - ref_win) - (lose - ref_lose)
    beta_batch = (beta * (1 + alpha * (margin.detach().mean() - mean))).clamp(min=beta_min).detach()
    return minus_log_sigmoid(beta_batch * margin, policy_chosen_logps.dtype)


def beta_dpo_filter(
    margins: Tensor,
    margin_mean: Tensor,
    margin_std: Tensor,
    *,
    keep: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Which pairs β-DPO trains on: a draw without replacement that prefers margins near the running mean.

    weight of a pair: :math:`\exp\left(-\frac12\left(\frac{m-\mu}{s}\right)^2\right)`

    Parameters
    ----------
    margins
        :math:`m` of every pair, of shape [batch], as `log_ratio_margin` returns it without lengths.
    margin_mean, margin_std
        :math:`\mu` and :math:`s > 0`: running mean and standard deviation of the margins, scalars.
    keep
        The share of pairs to keep, above 0 and up to 1, rounded down to whole pairs, of which at least one has to
        remain: with 0.8, a batch needs two. A larger one keeps more outliers; 1 keeps all. The authors call
        :math:`1 - \mathrm{keep}` the filtering ratio and use 0.2.
    generator
        The source of randomness; give one to get the same pairs again.

    Returns
    -------
    Tensor
        A bool for every pair, true for ``int(keep * batch)`` of them.

    Raises
    ------
    TypeError, ValueError
        For margins that are not a finite floating-point vector, statistics that are not scalars, a ``margin_std`` that
        is not positive, a ``keep`` outside its range or one that leaves none of the pairs.

    Notes
    -----
    Drawn by the largest of log-weight plus Gumbel noise, which is the same distribution as drawing one pair after the
    other in proportion to the weights; the weights themselves underflow for outliers and would leave too few.

    Source: the data filtering of arXiv:2407.08639; weights and rounding from the authors' code.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"keep = {keep!r}: it must be a number, not a {type(keep).__name__}; pass a float")
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep!r}: it is the share of pairs to keep, above 0 and up to 1; the paper has 0.8")
    m, mean, std = read(("margins", "margin_mean", "margin_std"), margins, margin_mean, margin_std)
    if m.dim() != 1:
        raise ValueError(f"margins has shape {tuple(m.shape)}: it must be one margin a pair, of shape [batch]")
    if mean.numel() != 1 or std.numel() != 1:
        shapes = f"margin_mean has shape {tuple(mean.shape)}, margin_std {tuple(std.shape)}"
        raise ValueError(f"{shapes}: they are one number each, the same for all pairs")
    count = int(keep * m.numel() + 1e-9)
    if count < 1 <= m.numel():
        raise ValueError(f"keep = {keep!r} of {m.numel()} pairs leaves none to train on; pass more pairs, or keep = 1")
    z = (m.detach() - mean.reshape(())) / std.reshape(())
    noise = -torch.empty_like(z).exponential_(generator=generator).log()
    kept = (noise - z.square() / 2).topk(count).indices
    return torch.zeros_like(m, dtype=torch.bool).index_fill(0, kept, True)
